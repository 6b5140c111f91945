#include "tests/conformance/cold_store_suite.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>

#include "tests/support/process.h"

namespace icecache::test {
namespace {

std::unique_ptr<ColdStore> OpenRocksAs(const ColdStoreOptions& options) {
  auto store = OpenRocksColdStore(options);
  EXPECT_TRUE(store.ok()) << store.status().ToString();
  return store.ok() ? std::move(store).value() : nullptr;
}

std::unique_ptr<ColdStore> OpenRocks(const std::string& directory) {
  return OpenRocksAs({.directory = directory});
}

// Past the page cache, and with a bound on the rate. A file system that cannot is a reason to do
// without, as --cold-direct-io says.
std::unique_ptr<ColdStore> OpenRocksDirect(const std::string& directory) {
  const std::string probe = directory + "/probe";
  const int fd = ::open(probe.c_str(), O_CREAT | O_RDWR | O_DIRECT, 0600);
  if (fd >= 0) ::close(fd);
  std::filesystem::remove(probe);
  return OpenRocksAs(
      {.directory = directory, .write_bytes_per_second = 64u << 20, .direct_io = fd >= 0});
}

INSTANTIATE_TEST_SUITE_P(All, ColdStoreSuite,
                         ::testing::Values(ColdStoreParam{"Rocks", OpenRocks, true},
                                           ColdStoreParam{"RocksDirect", OpenRocksDirect, true},
                                           ColdStoreParam{"Memory",
                                                          [](const std::string&) {
                                                            return MakeMemoryColdStore();
                                                          },
                                                          false}),
                         [](const auto& i) { return i.param.name; });

TEST_P(ColdStoreSuite, ReturnsWhatWasPutAndNothingElse) {
  TempDir dir;
  auto store = GetParam().open(dir.path());
  const std::string binary("\0\xff\x00k", 4);
  const std::vector<ColdWrite> batch = {{ColdColumn::kPages, binary, std::string(8192, 'p')},
                                        {ColdColumn::kIndex, binary, ""},
                                        {ColdColumn::kRecords, "r", "1"}};
  ASSERT_TRUE(store->Put(batch, false).ok());
  EXPECT_EQ(store->Get(ColdColumn::kPages, binary).value().value(), std::string(8192, 'p'));
  EXPECT_EQ(store->Get(ColdColumn::kIndex, binary).value().value(), "");
  EXPECT_FALSE(store->Get(ColdColumn::kRecords, binary).value().has_value());  // columns are apart
  EXPECT_FALSE(store->Get(ColdColumn::kPages, "absent").value().has_value());
}

TEST_P(ColdStoreSuite, RefusesKeysOutsideTheLimits) {
  TempDir dir;
  auto store = GetParam().open(dir.path());
  for (const size_t bytes : {size_t{0}, limits::kColdKeyBytesMax + 1}) {
    const std::vector<ColdWrite> batch = {{ColdColumn::kPages, "good", "v"},
                                          {ColdColumn::kPages, std::string(bytes, 'k'), "v"}};
    EXPECT_EQ(store->Put(batch, false).code(), StatusCode::kInvalidArgument);
  }
  EXPECT_TRUE(ReadAll(*store, ColdColumn::kPages).empty()) << "a refused batch writes nothing";
  EXPECT_EQ(store->DeletePrefix(ColdColumn::kPages, "").code(), StatusCode::kInvalidArgument);
}

TEST_P(ColdStoreSuite, RandomOperationsMatchAMap) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  TempDir dir;
  auto store = GetParam().open(dir.path());
  std::map<std::string, std::string> model[kColdColumns];
  const auto key = [&] {
    std::string k(1 + random() % 3, 'a');
    for (char& c : k) c = "ab\xff"[random() % 3];
    return k;
  };
  for (int step = 0; step < 400; ++step) {
    const auto column = static_cast<ColdColumn>(random() % kColdColumns);
    auto& expected = model[static_cast<size_t>(column)];
    switch (random() % 6) {
      case 0:
      case 1:
      case 2: {
        std::vector<ColdWrite> batch;
        for (uint64_t i = 0; i < 1 + random() % 4; ++i) {
          batch.push_back(
              {column, key(), std::string(random() % 100, static_cast<char>(random()))});
        }
        for (const ColdWrite& w : batch) expected[w.key] = w.value;
        ASSERT_TRUE(store->Put(batch, random() % 8 == 0).ok());
        break;
      }
      case 3: {
        const std::string prefix = key();
        if (prefix.find_first_not_of('\xff') == std::string::npos) break;
        ASSERT_TRUE(store->DeletePrefix(column, prefix).ok());
        std::erase_if(expected, [&](const auto& e) { return e.first.starts_with(prefix); });
        break;
      }
      case 4:
        if (random() % 10 == 0) {
          ASSERT_TRUE(store->Sync().ok());
          if (GetParam().keeps_data) {
            store.reset();
            store = GetParam().open(dir.path());
          }
        }
        break;
      default: {
        const std::string k = key();
        const auto got = store->Get(column, k).value();
        ASSERT_EQ(got.has_value(), expected.count(k) == 1);
        if (got.has_value()) {
          ASSERT_EQ(*got, expected.at(k));
        }
      }
    }
    const std::string prefix = random() % 2 ? "" : key();
    std::map<std::string, std::string> matching;
    for (const auto& e : expected) {
      if (e.first.starts_with(prefix)) matching.insert(e);
    }
    ASSERT_EQ(ReadAll(*store, column, prefix), matching) << "step " << step;
  }
}

TEST_P(ColdStoreSuite, ManyThreadsReadWhileOneWrites) {
  TempDir dir;
  auto store = GetParam().open(dir.path());
  const auto value = [](int i) { return std::string(1000, static_cast<char>('a' + i % 26)); };
  const auto put = [&](int i) {
    const ColdWrite w{ColdColumn::kPages, "key" + std::to_string(i), value(i)};
    return store->Put({&w, 1}, false);
  };
  for (int i = 0; i < 50; ++i) ASSERT_TRUE(put(i).ok());
  std::vector<std::thread> readers;
  for (int t = 0; t < 3; ++t) {
    readers.emplace_back([&] {
      for (int i = 0; i < 500; ++i) {
        const auto got = store->Get(ColdColumn::kPages, "key" + std::to_string(i % 50));
        ASSERT_TRUE(got.ok() && got->has_value());
        ASSERT_EQ(**got, value(i % 50));
      }
    });
  }
  for (int i = 50; i < 200; ++i) EXPECT_TRUE(put(i).ok());
  for (std::thread& r : readers) r.join();
}

TEST(RocksColdStore, DurablePutsSurviveAKilledProcess) {
  TempDir dir;
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {  // dies without closing anything
    auto store = OpenRocksColdStore({.directory = dir.path("db")});
    if (!store.ok()) _exit(1);
    const std::vector<ColdWrite> bulk = {{ColdColumn::kPages, "page", "content"},
                                         {ColdColumn::kIndex, "node", "summary"}};
    const ColdWrite record{ColdColumn::kRecords, "context", "page"};
    const ColdWrite late{ColdColumn::kPages, "late", "never synced"};
    // A durable put brings what was written before it to the disk too.
    if (!(*store)->Put(bulk, false).ok() || !(*store)->Put({&record, 1}, true).ok()) _exit(2);
    if (!(*store)->Put({&late, 1}, false).ok()) _exit(3);
    _exit(0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  auto store = OpenRocks(dir.path("db"));
  EXPECT_EQ(store->Get(ColdColumn::kPages, "page").value(), "content");
  EXPECT_EQ(store->Get(ColdColumn::kIndex, "node").value(), "summary");
  EXPECT_EQ(store->Get(ColdColumn::kRecords, "context").value(), "page");
  EXPECT_FALSE(store->Get(ColdColumn::kPages, "late").value().has_value());
}

TEST(RocksColdStore, NewerFormatIsRefusedWithBothNumbers) {
  TempDir dir;
  {
    auto store = OpenRocks(dir.path("db"));
    const ColdWrite format{ColdColumn::kRecords, "!format", "999"};
    ASSERT_TRUE(store->Put({&format, 1}, true).ok());
  }
  const auto store = OpenRocksColdStore({.directory = dir.path("db")});
  ASSERT_EQ(store.status().code(), StatusCode::kFailedPrecondition);
  EXPECT_THAT(store.status().message(),
              ::testing::AllOf(::testing::HasSubstr("999"), ::testing::HasSubstr("up to 1")));
}

// Only the least time: more is the machine's.
TEST(RocksColdStore, BackgroundWritesKeepToTheirRate) {
  TempDir dir;
  const auto store = OpenRocksAs({.directory = dir.path(), .write_bytes_per_second = 4u << 20});
  std::mt19937_64 random(5);
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < 64; ++i) {  // 4 MiB that do not compress
    ColdWrite write{ColdColumn::kPages, "page" + std::to_string(i), std::string(64u << 10, '\0')};
    for (char& byte : write.value) byte = static_cast<char>(random());
    ASSERT_TRUE(store->Put({&write, 1}, false).ok());
  }
  ASSERT_TRUE(store->Sync().ok());
  EXPECT_GE(std::chrono::steady_clock::now() - start, std::chrono::milliseconds(500));
}

TEST(RocksColdStore, SecondOpenerIsTurnedAway) {
  TempDir dir;
  auto first = OpenRocks(dir.path("db"));
  const auto second = OpenRocksColdStore({.directory = dir.path("db")});
  EXPECT_EQ(second.status().code(), StatusCode::kFailedPrecondition) << second.status().ToString();
}

TEST(RocksColdStore, CorruptFilesAreDataLossNotWrongData) {
  TempDir dir;
  {
    auto store = OpenRocks(dir.path("db"));
    std::vector<ColdWrite> batch;
    for (int i = 0; i < 64; ++i)
      batch.push_back({ColdColumn::kPages, "key" + std::to_string(i), std::string(8192, 'x')});
    ASSERT_TRUE(store->Put(batch, false).ok());
    ASSERT_TRUE(store->Sync().ok());
  }
  for (const auto& entry : std::filesystem::directory_iterator(dir.path("db"))) {
    if (entry.path().extension() != ".sst" || entry.file_size() < 100000) continue;
    std::fstream file(entry.path(), std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(50000);
    file.write("broken", 6);
  }
  const auto store = OpenRocksColdStore({.directory = dir.path("db")});
  int wrong = 0, lost = 0;
  if (store.ok()) {
    for (int i = 0; i < 64; ++i) {
      const auto got = (*store)->Get(ColdColumn::kPages, "key" + std::to_string(i));
      lost += !got.ok();
      if (!got.ok()) {
        EXPECT_EQ(got.status().code(), StatusCode::kDataLoss);
      }
      if (got.ok() && *got != std::string(8192, 'x')) ++wrong;
    }
  }
  EXPECT_EQ(wrong, 0);
  EXPECT_TRUE(!store.ok() || lost > 0) << "the damage went unnoticed";
}

TEST(RocksColdStore, ADamagedTableNeverHidesARecordFromAScan) {
  TempDir dir;
  {
    auto store = OpenRocks(dir.path("good"));
    const ColdWrite dropped{ColdColumn::kRecords, "context/1", std::string(300, 'd')};
    const ColdWrite kept{ColdColumn::kRecords, "context/2", std::string(300, 'k')};
    ASSERT_TRUE(store->Put({&dropped, 1}, true).ok());
    ASSERT_TRUE(store->Put({&kept, 1}, true).ok());
    ASSERT_TRUE(store->DeletePrefix(ColdColumn::kRecords, dropped.key).ok());
    ASSERT_TRUE(store->Sync().ok());
  }
  using Records = std::map<std::string, std::string>;
  const auto scan = [](const std::string& directory) -> Result<Records> {
    KV_ASSIGN_OR_RETURN(const auto store, OpenRocksColdStore({.directory = directory}));
    Records records;
    KV_RETURN_IF_ERROR(store->Scan(ColdColumn::kRecords, "context/",
                                   [&](std::string_view key, std::string_view value) {
                                     return records.emplace(key, value).second;
                                   }));
    return records;
  };
  const Records expected = {{"context/2", std::string(300, 'k')}};
  int complaints = 0;
  for (const auto& entry : std::filesystem::directory_iterator(dir.path("good"))) {
    if (entry.path().extension() != ".sst") continue;
    for (uint64_t at = 0; at < entry.file_size(); at += 97) {
      std::filesystem::remove_all(dir.path("bad"));
      std::filesystem::copy(dir.path("good"), dir.path("bad"));
      const std::string file = dir.path("bad") + "/" + entry.path().filename().string();
      std::string bytes = ReadFile(file);
      bytes[at] = static_cast<char>(bytes[at] ^ 0x5a);
      WriteFile(file, bytes);
      const Result<Records> found = scan(dir.path("bad"));
      complaints += found.ok() ? 0 : 1;
      EXPECT_TRUE(!found.ok() || *found == expected) << file << ", byte " << at;
    }
  }
  EXPECT_GT(complaints, 0);
  const Result<Records> undamaged = scan(dir.path("good"));
  ASSERT_TRUE(undamaged.ok()) << undamaged.status().ToString();
  EXPECT_EQ(*undamaged, expected);
}

TEST(MemoryColdStore, InjectedFaultsSurfaceAndPass) {
  bool full = true;
  auto store = MakeMemoryColdStore({[&](std::string_view op) {
    return full && op == "put" ? ResourceExhausted("disk full") : OkStatus();
  }});
  const ColdWrite w{ColdColumn::kPages, "k", "v"};
  EXPECT_EQ(store->Put({&w, 1}, true).code(), StatusCode::kResourceExhausted);
  full = false;
  EXPECT_TRUE(store->Put({&w, 1}, true).ok());
}

}  // namespace
}  // namespace icecache::test
