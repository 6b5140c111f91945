// The cold store on RocksDB. The only file that includes it.
//
// Facts behind the settings (feasibility notes, section 5; Debian's 7.8): BlobDB gains nothing at 8
// KiB values; MultiGet is serial without io_uring, so parallelism comes from calling Get on many
// threads; skipping the WAL for bulk data and flushing instead is 1.7x faster. Pages hold floats,
// so they are not compressed.
#include <rocksdb/db.h>
#include <rocksdb/filter_policy.h>
#include <rocksdb/listener.h>
#include <rocksdb/rate_limiter.h>
#include <rocksdb/slice_transform.h>
#include <rocksdb/statistics.h>
#include <rocksdb/table.h>

#include <array>
#include <atomic>
#include <charconv>
#include <filesystem>

#include "cacheserver/store/cold_store.h"
#include "common/limits.h"
#include "common/log.h"

namespace icecache {
namespace {

constexpr uint32_t kFormatVersion = 1;
constexpr const char* kFormatKey =
    "!format";  // in the records column; '!' sorts before every record
constexpr std::array<const char*, kColdColumns> kColumnNames = {"pages", "index", "records"};

Status FromRocks(const rocksdb::Status& s, const std::string& what) {
  if (s.ok()) return OkStatus();
  const std::string text = "cold store: " + what + ": " + s.ToString();
  if (s.IsNoSpace() || s.subcode() == rocksdb::Status::SubCode::kNoSpace ||
      s.subcode() == rocksdb::Status::SubCode::kSpaceLimit) {
    return ResourceExhausted(text + "; free space on the disk of --data-dir");
  }
  if (s.IsCorruption()) return DataLoss(text + "; move --data-dir away to start empty");
  if (s.IsIOError() && s.ToString().find("lock") != std::string::npos) {
    return FailedPrecondition(text + "; another server uses this --data-dir, give each its own");
  }
  if (s.IsInvalidArgument()) return InvalidArgument(text);
  if (s.IsIOError()) return Unavailable(text);
  return Internal(text);
}

// Counts what happens in the background and says it once per kind in the log.
class Watcher final : public rocksdb::EventListener {
 public:
  void OnBackgroundError(rocksdb::BackgroundErrorReason, rocksdb::Status* s) override {
    if (errors.fetch_add(1) == 0)
      LogError("cold store background error", {{"status", s->ToString()}});
  }
  void OnStallConditionsChanged(const rocksdb::WriteStallInfo& info) override {
    if (info.condition.cur != rocksdb::WriteStallCondition::kNormal) stalls.fetch_add(1);
  }
  std::atomic<uint64_t> errors{0};
  std::atomic<uint64_t> stalls{0};
};

// The smallest key above all keys with this prefix; empty: there is none.
std::string PrefixEnd(std::string_view prefix) {
  std::string end(prefix);
  while (!end.empty() && static_cast<unsigned char>(end.back()) == 0xff) end.pop_back();
  if (!end.empty()) end.back() = static_cast<char>(static_cast<unsigned char>(end.back()) + 1);
  return end;
}

class RocksColdStore final : public ColdStore {
 public:
  static Result<std::unique_ptr<ColdStore>> Open(const ColdStoreOptions& options);

  ~RocksColdStore() override {
    for (auto* handle : columns_) {
      if (handle != nullptr) (void)db_->DestroyColumnFamilyHandle(handle);
    }
    if (db_ != nullptr) (void)db_->Close();
  }

  Status Put(std::span<const ColdWrite> batch, bool durable) override {
    rocksdb::WriteBatch writes;
    uint64_t bytes = 0;
    for (const ColdWrite& w : batch) {
      if (w.key.empty() || w.key.size() > limits::kColdKeyBytesMax) {
        return InvalidArgument("cold store key of " + std::to_string(w.key.size()) +
                               " bytes; expected 1.." + std::to_string(limits::kColdKeyBytesMax));
      }
      bytes += w.key.size() + w.value.size();
      KV_RETURN_IF_ERROR(FromRocks(writes.Put(column(w.column), w.key, w.value), "put"));
    }
    rocksdb::WriteOptions how;
    how.sync = durable;
    how.disableWAL = !durable;
    KV_RETURN_IF_ERROR(FromRocks(db_->Write(how, &writes), "put"));
    puts_.fetch_add(1, std::memory_order_relaxed);
    put_bytes_.fetch_add(bytes, std::memory_order_relaxed);
    return OkStatus();
  }

  Result<std::optional<std::string>> Get(ColdColumn c, std::string_view key) const override {
    gets_.fetch_add(1, std::memory_order_relaxed);
    std::string value;
    const rocksdb::Status s =
        db_->Get(ReadHow(), column(c), rocksdb::Slice(key.data(), key.size()), &value);
    if (s.IsNotFound()) {
      misses_.fetch_add(1, std::memory_order_relaxed);
      return std::optional<std::string>();
    }
    KV_RETURN_IF_ERROR(FromRocks(s, "get"));
    return std::optional<std::string>(std::move(value));
  }

  Status Scan(ColdColumn c, std::string_view prefix, const Visitor& visit) const override {
    const std::unique_ptr<rocksdb::Iterator> it(db_->NewIterator(ReadHow(), column(c)));
    for (it->Seek(rocksdb::Slice(prefix.data(), prefix.size())); it->Valid(); it->Next()) {
      const std::string_view key(it->key().data(), it->key().size());
      if (!key.starts_with(prefix)) break;
      if (key == kFormatKey) continue;
      if (!visit(key, {it->value().data(), it->value().size()})) break;
    }
    return FromRocks(it->status(), "scan");
  }

  Status DeletePrefix(ColdColumn c, std::string_view prefix) override {
    if (prefix.empty())
      return InvalidArgument("cold store: an empty prefix would delete the whole column");
    const std::string end = PrefixEnd(prefix);
    if (end.empty())
      return InvalidArgument("cold store: a prefix of only 0xff bytes cannot be deleted");
    // In the log, unlike bulk puts: a deletion that is forgotten would bring a dropped context
    // back.
    rocksdb::WriteOptions how;
    return FromRocks(
        db_->DeleteRange(how, column(c), rocksdb::Slice(prefix.data(), prefix.size()), end),
        "delete");
  }

  Status Sync() override {
    rocksdb::FlushOptions wait;
    KV_RETURN_IF_ERROR(FromRocks(db_->Flush(wait, std::vector<rocksdb::ColumnFamilyHandle*>(
                                                      columns_.begin(), columns_.end())),
                                 "sync"));
    return FromRocks(db_->SyncWAL(), "sync");
  }

  void VisitCounters(const CounterVisitor& visit) const override {
    const auto number = [](const std::atomic<uint64_t>& n) {
      return static_cast<double>(n.load(std::memory_order_relaxed));
    };
    visit("puts", number(puts_));
    visit("put_bytes", number(put_bytes_));
    visit("gets", number(gets_));
    visit("get_misses", number(misses_));
    double bytes = 0;
    for (auto* handle : columns_) {
      uint64_t value = 0;
      if (db_->GetIntProperty(handle, rocksdb::DB::Properties::kTotalSstFilesSize, &value))
        bytes += static_cast<double>(value);
    }
    visit("disk_bytes", bytes);
    visit("write_stalls", number(watcher_->stalls));
    visit("background_errors", number(watcher_->errors));
  }

 private:
  rocksdb::ColumnFamilyHandle* column(ColdColumn c) const {
    return columns_[static_cast<size_t>(c)];
  }
  static rocksdb::ReadOptions ReadHow() {
    rocksdb::ReadOptions how;
    how.verify_checksums = true;
    return how;
  }
  Status CheckFormat();

  std::shared_ptr<Watcher> watcher_ = std::make_shared<Watcher>();
  std::unique_ptr<rocksdb::DB> db_;
  std::array<rocksdb::ColumnFamilyHandle*, kColdColumns> columns_{};
  std::atomic<uint64_t> puts_{0}, put_bytes_{0};
  mutable std::atomic<uint64_t> gets_{0}, misses_{0};
};

rocksdb::ColumnFamilyOptions ColumnOptions(const ColdStoreOptions& options,
                                           const std::shared_ptr<rocksdb::Cache>& cache) {
  (void)options;
  rocksdb::BlockBasedTableOptions table;
  table.block_cache = cache;
  table.filter_policy.reset(rocksdb::NewBloomFilterPolicy(10));
  rocksdb::ColumnFamilyOptions column;
  column.table_factory.reset(rocksdb::NewBlockBasedTableFactory(table));
  column.compression = rocksdb::kNoCompression;
  column.write_buffer_size = 32u << 20;
  return column;
}

Result<std::unique_ptr<ColdStore>> RocksColdStore::Open(const ColdStoreOptions& options) {
  std::error_code error;
  std::filesystem::create_directories(options.directory, error);
  if (error) {
    return InvalidArgument("--data-dir " + options.directory + ": " + error.message() +
                           "; name a directory that can be written");
  }
  auto store = std::make_unique<RocksColdStore>();
  rocksdb::DBOptions db;
  db.create_if_missing = true;
  db.create_missing_column_families = true;
  db.atomic_flush = true;  // unlogged puts over several columns stay all or none
  db.use_direct_reads = options.direct_io;
  db.use_direct_io_for_flush_and_compaction = options.direct_io;
  db.listeners.push_back(store->watcher_);
  db.keep_log_file_num = 4;
  if (options.write_bytes_per_second > 0) {
    db.rate_limiter.reset(
        rocksdb::NewGenericRateLimiter(static_cast<int64_t>(options.write_bytes_per_second)));
  }
  const auto cache = rocksdb::NewLRUCache(options.cache_bytes);
  std::vector<rocksdb::ColumnFamilyDescriptor> columns = {{rocksdb::kDefaultColumnFamilyName, {}}};
  for (const char* name : kColumnNames) columns.emplace_back(name, ColumnOptions(options, cache));
  std::vector<rocksdb::ColumnFamilyHandle*> handles;
  rocksdb::DB* raw = nullptr;
  KV_RETURN_IF_ERROR(FromRocks(rocksdb::DB::Open(db, options.directory, columns, &handles, &raw),
                               "open " + options.directory));
  store->db_.reset(raw);
  (void)raw->DestroyColumnFamilyHandle(handles[0]);
  std::copy(handles.begin() + 1, handles.end(), store->columns_.begin());
  KV_RETURN_IF_ERROR(store->CheckFormat());
  return std::unique_ptr<ColdStore>(std::move(store));
}

Status RocksColdStore::CheckFormat() {
  KV_ASSIGN_OR_RETURN(const std::optional<std::string> stored,
                      Get(ColdColumn::kRecords, kFormatKey));
  if (!stored.has_value()) {
    const ColdWrite format{ColdColumn::kRecords, kFormatKey, std::to_string(kFormatVersion)};
    return Put({&format, 1}, true);
  }
  uint32_t version = 0;
  const auto [end, error] =
      std::from_chars(stored->data(), stored->data() + stored->size(), version);
  if (error != std::errc() || end != stored->data() + stored->size() || version == 0) {
    return DataLoss("cold store: its format record is '" + *stored +
                    "', expected a number; move --data-dir away to start empty");
  }
  if (version > kFormatVersion) {
    return FailedPrecondition("cold store: written in format " + stored.value() +
                              ", this server reads up to " + std::to_string(kFormatVersion) +
                              "; use a newer server or another --data-dir");
  }
  return OkStatus();
}

}  // namespace

Result<std::unique_ptr<ColdStore>> OpenRocksColdStore(const ColdStoreOptions& options) {
  return RocksColdStore::Open(options);
}

}  // namespace icecache
