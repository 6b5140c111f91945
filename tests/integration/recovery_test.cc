// Durable contexts across kill -9 of a real server: what was acknowledged is back, byte for byte
// and with the same selections; what was not is absent; and a working set larger than memory is
// answered in full.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <chrono>
#include <set>
#include <thread>

#include "cacheserver/store/cold_store.h"
#include "cacheserver/test_chain.h"
#include "cacheserver/test_worker.h"
#include "tests/support/process.h"

namespace icecache::test {
namespace {

constexpr uint32_t kPages = 12;

std::vector<std::string> Args(const TempDir& dir, const std::string& memory = "256MiB") {
  // Test workers turn their loop only while they wait: leases that a busy machine does not end.
  return {"--memory-size", memory,   "--threads",  std::to_string(kShards),
          "--lease-ms",    "120000", "--data-dir", dir.path("data")};
}

// Prefills, seals with its window and publishes.
void MakeContext(Worker& worker, const std::string& name, uint32_t tokens, bool durable,
                 const std::string& policy = "cluster_tree") {
  ASSERT_TRUE(worker.Create(name, policy).ok());
  const Status filled = worker.Prefill(tokens);
  ASSERT_TRUE(filled.ok()) << filled.ToString();
  const ContextId id = worker.grant().context.id;
  ASSERT_TRUE(worker.control().Call<wire::Done>(wire::Seal{id}).ok());
  const auto published = worker.control().Call<wire::Done>(wire::Publish{id, durable});
  ASSERT_TRUE(published.ok()) << published.status().ToString();
}

Status OpenContext(Worker& worker, const std::string& name) {
  KV_ASSIGN_OR_RETURN(const wire::Grant grant,
                      worker.control().Call<wire::Grant>(wire::Open{name}));
  return worker.Attach(grant);
}

// What a selection answers, in words that can be compared: names, bytes and order of the pages.
std::string Answer(Worker& worker, uint16_t layer, uint16_t head, uint64_t seed, uint32_t tokens,
                   uint32_t next) {
  const std::vector<float> queries = worker.rows(layer, head).Queries(seed, kShape.group(), tokens);
  const Result<Worker::Selected> selected = worker.Select(layer, head, queries, kPages, next, 0);
  if (!selected.ok()) return selected.status().ToString();
  std::string text;
  for (const wire::PagePayload& page : selected->reply.heads[0].pages) {
    text += std::to_string(page.segment.value) + "/" + std::to_string(page.page.value) + "v" +
            std::to_string(page.version) + "#" + std::to_string(page.checksum) + ":";
    for (const auto part : {page.k_rows, page.v_rows, page.positions}) {
      text.append(reinterpret_cast<const char*>(part.data()), part.size());
    }
  }
  const std::span<const float> residual = selected->reply.heads[0].residual;
  text.append(reinterpret_cast<const char*>(residual.data()), residual.size_bytes());
  return text;
}

std::vector<std::string> Answers(Worker& worker, uint32_t tokens, uint32_t next) {
  std::vector<std::string> answers;
  ForEachSlice([&](uint16_t layer, uint16_t head) {
    for (uint64_t seed = 1; seed <= 12; ++seed) {
      answers.push_back(Answer(worker, layer, head, seed, tokens, next));
    }
  });
  return answers;
}

class Recovery : public ::testing::TestWithParam<const char*> {
 protected:
  TempDir dir_;
};
INSTANTIATE_TEST_SUITE_P(Policies, Recovery,
                         ::testing::Values("cluster_tree", "dci_tree", "exact", "sequential"),
                         [](const auto& i) { return std::string(i.param); });

TEST_P(Recovery, DurableContextIsBackByteForByteWithTheSameSelections) {
  constexpr uint32_t kTokens = 900, kMore = 200;
  TestServer server(Args(dir_));
  std::vector<std::string> before;
  {
    Worker writer(server.address(), 5);
    MakeContext(writer, "doc", kTokens, true, GetParam());
    // A fork that has decoded: a chain of two segments.
    ASSERT_TRUE(writer.Fork("doc", "longer").ok());
    uint32_t next = kTokens - kWindow;
    for (uint32_t i = 0; i < kMore; ++i, ++next) {
      ForEachSlice([&](uint16_t layer, uint16_t head) {
        const auto queries = writer.rows(layer, head).Queries(i, kShape.group(), next);
        ASSERT_TRUE(writer.Select(layer, head, queries, 1, next, 1).ok());
      });
    }
    ForEachSlice([&](uint16_t layer, uint16_t head) {
      ASSERT_TRUE(writer.PutRows(layer, head, next, kWindow).ok());
    });
    const ContextId id = writer.grant().context.id;
    ASSERT_TRUE(writer.control().Call<wire::Done>(wire::Seal{id}).ok());
    ASSERT_TRUE(writer.control().Call<wire::Done>(wire::Publish{id, true}).ok());
    ASSERT_TRUE(OpenContext(writer, "longer").ok());
    before = Answers(writer, next, next);
  }
  server.process().Signal(SIGKILL);
  server.process().Wait(std::chrono::seconds(10));
  server.Restart();
  Worker reader(server.address(), 5);
  const wire::ContextList list = *reader.control().Call<wire::ContextList>(wire::List{});
  ASSERT_EQ(list.contexts.size(), 2u);
  for (const wire::ContextInfo& context : list.contexts) EXPECT_TRUE(context.durable);
  ASSERT_TRUE(OpenContext(reader, "longer").ok());
  const uint32_t next = kTokens + kMore - kWindow;
  // The first round reads what it needs from disk; a second one shows that nothing depends on it.
  (void)Answers(reader, next, next);
  const std::vector<std::string> after = Answers(reader, next, next);
  ASSERT_EQ(after.size(), before.size());
  for (size_t i = 0; i < after.size(); ++i) EXPECT_TRUE(after[i] == before[i]) << "query " << i;
  // It can be forked and decoded on, and everything in it counts.
  ASSERT_TRUE(reader.Fork("longer", "child").ok());
  ForEachSlice([&](uint16_t layer, uint16_t head) {
    const Result<OwnedMessage> tail = reader.FetchRows(layer, head, wire::RowsPart::kTail);
    ASSERT_TRUE(tail.ok()) << tail.status().ToString();
    reader.CheckStep(layer, head, next + kWindow + 1, next + 1, 1, 1u << 10, 77);
  });
}

TEST(RecoveryOf, WhatWasNotDurableIsAbsent) {
  TempDir dir;
  TestServer server(Args(dir));
  {
    Worker writer(server.address(), 1), other(server.address(), 2), third(server.address(), 3);
    MakeContext(writer, "kept", 400, true);
    MakeContext(other, "memory only", 400, false);
    MakeContext(third, "dropped", 400, true);
    ASSERT_TRUE(third.control().Call<wire::Done>(wire::Drop{"dropped"}).ok());
    ASSERT_TRUE(third.Create("unfinished", "exact").ok());
    ASSERT_TRUE(third.PutRows(0, 0, 0, 100).ok());
  }
  server.process().Signal(SIGKILL);
  server.process().Wait(std::chrono::seconds(10));
  server.Restart();
  Worker reader(server.address(), 1);
  const wire::ContextList list = *reader.control().Call<wire::ContextList>(wire::List{});
  ASSERT_EQ(list.contexts.size(), 1u);
  EXPECT_EQ(list.contexts[0].name, "kept");
  EXPECT_FALSE(OpenContext(reader, "memory only").ok());
  // Names of what is gone are free.
  MakeContext(reader, "dropped", 300, true);
}

std::set<std::string> Names(Worker& worker) {
  std::set<std::string> names;
  const wire::ContextList list = *worker.control().Call<wire::ContextList>(wire::List{});
  for (const wire::ContextInfo& context : list.contexts) names.insert(context.name);
  return names;
}

// Both chains end in the same segment; their records must not be one.
TEST(RecoveryOf, AForkThatAddedNothingIsADurableContextOfItsOwn) {
  TempDir dir;
  TestServer server(Args(dir));
  const auto restart = [&] {
    server.process().Signal(SIGKILL);
    server.process().Wait(std::chrono::seconds(10));
    server.Restart();
  };
  std::vector<std::string> before;
  {
    Worker writer(server.address(), 4);
    MakeContext(writer, "doc", 400, true);
    for (const char* name : {"twin", "third"}) {
      ASSERT_TRUE(writer.Fork("doc", name).ok());
      const ContextId id = writer.grant().context.id;
      ASSERT_TRUE(writer.control().Do(wire::Seal{id}).ok());
      ASSERT_TRUE(writer.control().Do(wire::Publish{id, true}).ok());
    }
    ASSERT_TRUE(OpenContext(writer, "doc").ok());
    before = Answers(writer, 400, 400 - kWindow);
  }
  restart();
  {
    Worker reader(server.address(), 4);
    EXPECT_THAT(Names(reader), ::testing::ElementsAre("doc", "third", "twin"));
    ASSERT_TRUE(reader.control().Do(wire::Drop{"third"}).ok());
    ASSERT_TRUE(OpenContext(reader, "doc").ok());
    EXPECT_TRUE(Answers(reader, 400, 400 - kWindow) == before);
    ASSERT_TRUE(reader.control().Do(wire::Drop{"doc"}).ok());
  }
  restart();
  Worker reader(server.address(), 4);
  EXPECT_THAT(Names(reader), ::testing::ElementsAre("twin"));
  ASSERT_TRUE(OpenContext(reader, "twin").ok());
  EXPECT_TRUE(Answers(reader, 400, 400 - kWindow) == before);
}

// The cut is a segment like any other: on disk, back after kill -9, and its parent is what it was.
TEST(RecoveryOf, AForkAtATokenOfADurableContextIsDurable) {
  TempDir dir;
  TestServer server(Args(dir));
  {
    Worker writer(server.address(), 6);
    MakeContext(writer, "doc", 700, true);
  }
  const auto restart = [&] {
    server.process().Signal(SIGKILL);
    server.process().Wait(std::chrono::seconds(10));
    server.Restart();
  };
  restart();  // the parent's pages and index are on disk only
  {
    Worker worker(server.address(), 6);
    ASSERT_TRUE(worker.Fork({.parent = "doc", .name = "early", .tokens = 333}).ok());
    const ContextId id = worker.grant().context.id;
    ASSERT_TRUE(worker.control().Do(wire::Seal{id}).ok());
    const Status published = worker.control().Do(wire::Publish{id, true});
    ASSERT_TRUE(published.ok()) << published.ToString();
    ASSERT_TRUE(worker.control().Do(wire::Drop{"doc"}).ok());
  }
  restart();
  Worker reader(server.address(), 6);
  const Status opened = OpenContext(reader, "early");
  ASSERT_TRUE(opened.ok()) << opened.ToString();
  ForEachSlice([&](uint16_t layer, uint16_t head) {
    reader.CheckStep(layer, head, 333, 333 - kWindow, 0, 1u << 10, 5);
    reader.CheckStep(layer, head, 333, 333 - kWindow, 0, 3, 6);
  });
}

// Publishes contexts until the server is killed under it at a random moment.
std::set<std::string> PublishUntilKilled(TestServer& server, uint64_t seed, int round) {
  std::set<std::string> acknowledged;
  Worker writer(server.address(), seed);
  std::mt19937_64 random(seed + static_cast<uint64_t>(round));
  std::thread killer([&server, wait = random() % 900] {
    std::this_thread::sleep_for(std::chrono::milliseconds(100 + wait));
    server.process().Signal(SIGKILL);
  });
  for (int i = 0; i < 1000; ++i) {
    const std::string name = std::to_string(round) + "." + std::to_string(i);
    const uint32_t tokens = 300 + random() % 300;
    if (!writer.Create(name, "cluster_tree").ok() || !writer.Prefill(tokens).ok()) break;
    const ContextId id = writer.grant().context.id;
    if (!writer.control().Call<wire::Done>(wire::Seal{id}).ok()) break;
    if (!writer.control().Call<wire::Done>(wire::Publish{id, true}).ok()) break;
    acknowledged.insert(name);
  }
  killer.join();
  server.process().Wait(std::chrono::seconds(10));
  return acknowledged;
}

TEST(RecoveryOf, KilledAtAnyMomentAContextIsWholeOrAbsent) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  TempDir dir;
  TestServer server(Args(dir));
  std::set<std::string> acknowledged;
  for (int round = 0; round < 5; ++round) {
    const std::set<std::string> more = PublishUntilKilled(server, seed, round);
    acknowledged.insert(more.begin(), more.end());
    server.Restart();
    Worker reader(server.address(), seed);
    std::set<std::string> there;
    const wire::ContextList list = *reader.control().Call<wire::ContextList>(wire::List{});
    for (const wire::ContextInfo& context : list.contexts) there.insert(context.name);
    EXPECT_THAT(there, ::testing::IsSupersetOf(acknowledged));
    for (const wire::ContextInfo& context : list.contexts) {
      if (!context.name.starts_with(std::to_string(round) + ".")) continue;
      ASSERT_TRUE(OpenContext(reader, context.name).ok()) << context.name;
      const uint32_t tokens = context.tokens;
      ForEachSlice([&](uint16_t layer, uint16_t head) {
        reader.CheckStep(layer, head, tokens, tokens - kWindow, 0, 1u << 10, seed);
      });
    }
  }
}

// Segments that the store holds, as soon as they are so many: a server takes its time to delete
// others.
size_t SegmentsOnDisk(TestServer& server, const TempDir& dir, size_t count) {
  std::set<std::string> segments;
  for (int tries = 1; tries <= 40 && segments.size() != count; ++tries) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50 * tries));
    server.process().Signal(SIGTERM);
    server.process().Wait(std::chrono::seconds(30));
    segments.clear();
    {
      auto store = OpenRocksColdStore({.directory = dir.path("data")});
      KV_CHECK(store.ok());
      KV_CHECK((*store)
                   ->Scan(ColdColumn::kRecords, "segment/",
                          [&](std::string_view key, std::string_view) {
                            segments.insert(std::string(key));
                            return true;
                          })
                   .ok());
    }
    server.Restart();
  }
  return segments.size();
}

// Chains of four that become one, many in a row, until the server is killed under it: whatever was
// on the disk by then, every chain is whole, and the next server goes on with what is left.
TEST(RecoveryOf, KilledWhileChainsAreMergedEveryChainIsWhole) {
  constexpr uint32_t kEach = 200, kChains = 6, kLong = 4 * kEach;
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  TempDir dir;
  TestServer server(Args(dir));
  {
    Worker writer(server.address(), 8);
    for (uint32_t i = 0; i < kChains; ++i) {
      const std::string name = "doc" + std::to_string(i);
      MakeChain(writer, name, 4, kEach, false, {}, 0, true);
      if (HasFatalFailure()) return;
      for (const char* parent : {".0", ".1", ".2"}) {
        ASSERT_TRUE(writer.control().Do(wire::Drop{name + parent}).ok());
      }
    }
  }
  uint32_t merged = 0;
  for (int round = 0; merged < kChains; ++round) {
    ASSERT_LT(round, 40) << merged << " merged";
    Worker reader(server.address(), 8);
    // Unread contexts are left alone.
    for (uint32_t i = 0; i < kChains; ++i) {
      const std::string name = "doc" + std::to_string(i) + ".3";
      const Status opened = OpenContext(reader, name);
      ASSERT_TRUE(opened.ok()) << name << ": " << opened.ToString();
      EXPECT_EQ(reader.grant().context.tokens, kLong);
      ForEachSlice([&](uint16_t layer, uint16_t head) {
        reader.CheckStep(layer, head, kLong, kLong - kWindow, 0, 1u << 10, seed);
      });
    }
    if (HasFatalFailure()) return;
    // The first rounds die between nothing and the first merges; later ones get further.
    const auto begin = std::chrono::steady_clock::now();
    const auto patience = std::chrono::milliseconds(200 * round);
    while (server.Metric("icecache_segments_merged_total") < 1 &&
           std::chrono::steady_clock::now() - begin < std::chrono::seconds(4) + patience) {
    }
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 100000));
    server.process().Signal(SIGKILL);
    server.process().Wait(std::chrono::seconds(10));
    server.Restart();
    Worker after(server.address(), 8);
    merged = 0;
    const auto list = after.control().Call<wire::ContextList>(wire::List{});
    ASSERT_TRUE(list.ok());
    ASSERT_EQ(list->contexts.size(), kChains);
    for (const wire::ContextInfo& context : list->contexts) {
      ASSERT_TRUE(context.segments.size() == 1 || context.segments.size() == 4) << context.name;
      merged += context.segments.size() == 1;
    }
  }
  // Nothing of the old segments is left.
  EXPECT_EQ(SegmentsOnDisk(server, dir, kChains), kChains);
}

// Somebody goes back to an older server: it changes nothing and says what to do.
TEST(RecoveryOf, ARecordOfANewerServerIsRefusedAndKept) {
  TempDir dir;
  {
    TestServer server(Args(dir));
    Worker writer(server.address(), 5);
    MakeContext(writer, "doc", 400, true);
    server.process().Signal(SIGKILL);
    server.process().Wait(std::chrono::seconds(10));
  }
  char written = 0;  // the version of this server's records
  const auto set_version = [&](char version) {
    auto store = OpenRocksColdStore({.directory = dir.path("data")});
    ASSERT_TRUE(store.ok()) << store.status().ToString();
    ColdWrite record{ColdColumn::kRecords, "", ""};
    ASSERT_TRUE((*store)
                    ->Scan(ColdColumn::kRecords, "context/",
                           [&](std::string_view key, std::string_view value) {
                             record.key = key;
                             record.value = value;
                             return false;
                           })
                    .ok());
    ASSERT_GT(record.value.size(), 5u);
    if (written == 0) written = record.value[4];
    record.value[4] = version;
    ASSERT_TRUE((*store)->Put({&record, 1}, true).ok());
  };
  set_version(9);
  {
    std::vector<std::string> args = Args(dir);
    args.insert(args.end(), {"--port", "0", "--http-port", "0"});
    Process refused("icecache-server", args);
    const ProcessResult r = refused.Wait(std::chrono::seconds(20));
    EXPECT_TRUE(r.exited);
    EXPECT_EQ(r.exit_code, static_cast<int>(StatusCode::kFailedPrecondition));
    EXPECT_THAT(refused.Err(),
                ::testing::AllOf(::testing::HasSubstr(dir.path("data")),
                                 ::testing::HasSubstr("record of a durable context"),
                                 ::testing::HasSubstr("format 9"),
                                 ::testing::HasSubstr("up to " + std::to_string(written)),
                                 ::testing::HasSubstr("use a newer server")));
  }
  set_version(written);
  TestServer server(Args(dir));
  Worker reader(server.address(), 5);
  EXPECT_TRUE(OpenContext(reader, "doc").ok());
}

TEST(RecoveryOf, WorkingSetOfFourTimesTheMemoryIsAnsweredInFull) {
  constexpr uint32_t kContexts = 20, kTokens = 6000;  // 6.2 MB each
  TempDir dir;
  TestServer server(Args(dir, "32MiB"));
  const auto seed_of = [](uint32_t doc) { return 100 + uint64_t{doc}; };
  for (uint32_t i = 0; i < kContexts; ++i) {
    Worker writer(server.address(), seed_of(i));
    MakeContext(writer, "doc" + std::to_string(i), kTokens, false);
    if (HasFatalFailure()) return;
  }
  EXPECT_LE(server.StatusNumber("/memory/held_bytes"), 32 << 20);
  std::mt19937_64 random(7);
  for (int step = 0; step < 40; ++step) {
    const auto doc = static_cast<uint32_t>(random() % kContexts);
    Worker reader(server.address(), seed_of(doc));
    const Status opened = OpenContext(reader, "doc" + std::to_string(doc));
    ASSERT_TRUE(opened.ok()) << opened.ToString();
    const auto layer = static_cast<uint16_t>(random() % kShape.layers);
    const auto head = static_cast<uint16_t>(random() % kShape.kv_heads);
    reader.CheckStep(layer, head, kTokens, kTokens - kWindow, 0, 1u << 10, random());
  }
  EXPECT_GT(server.StatusNumber("/tier/pages_cold"), 0);
}

}  // namespace
}  // namespace icecache::test
