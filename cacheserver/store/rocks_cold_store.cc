// The cold store on RocksDB. The only file that includes it.
//
// Facts behind the settings (feasibility notes, section 5; Debian's 7.8): BlobDB gains nothing at 8
// KiB values; MultiGet is serial without io_uring, so parallelism comes from calling Get on many
// threads; flushing instead of a write-ahead log is 1.7x faster for bulk data. Pages hold floats,
// so they are not compressed. Iterators may pass a table that they cannot read and end without an
// error (until 8.5.2, beside range tombstones and at the first block of a file of a lower level).
#include <fcntl.h>
#include <rocksdb/db.h>
#include <rocksdb/env.h>
#include <rocksdb/filter_policy.h>
#include <rocksdb/listener.h>
#include <rocksdb/rate_limiter.h>
#include <rocksdb/slice_transform.h>
#include <rocksdb/sst_file_reader.h>
#include <rocksdb/statistics.h>
#include <rocksdb/table.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <shared_mutex>
#include <utility>

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
  if (s.IsIOError() || s.IsBusy() || s.IsTryAgain() || s.IsAborted()) return Unavailable(text);
  return Internal(text);
}

// Of a store that does not open. RocksDB calls a damaged name in its files an I/O error, a bad
// argument or a thing not found, as the damage has it.
Status FromOpen(const rocksdb::Status& s, const std::string& directory) {
  const Status status = FromRocks(s, "open " + directory);
  switch (status.code()) {
    case StatusCode::kOk:
    case StatusCode::kResourceExhausted:
    case StatusCode::kDataLoss:
    case StatusCode::kFailedPrecondition:
      return status;
    default:
      return DataLoss(status.message() +
                      "; make the folder readable and writable, or, if its files are damaged, move "
                      "--data-dir away to start empty");
  }
}

// Counts what happens in the background and says it once per kind in the log.
class Watcher final : public rocksdb::EventListener {
 public:
  void OnBackgroundError(rocksdb::BackgroundErrorReason, rocksdb::Status* s) override {
    {
      std::lock_guard lock(mutex_);
      last_ = *s;
    }
    stopped = true;
    if (errors++ == 0) LogError("cold store background error", {{"status", s->ToString()}});
  }
  void OnStallConditionsChanged(const rocksdb::WriteStallInfo& info) override {
    if (info.condition.cur != rocksdb::WriteStallCondition::kNormal) stalls.fetch_add(1);
  }
  rocksdb::Status last() const {
    std::lock_guard lock(mutex_);
    return last_;
  }
  std::atomic<bool> stopped{
      false};  // a write has failed, or a flush: the store is to be opened again
  std::atomic<uint64_t> errors{0};
  std::atomic<uint64_t> stalls{0};

 private:
  mutable std::mutex mutex_;
  rocksdb::Status last_;
};

// RocksDB's warnings go to our log. Its own would be one more file on the disk, and an assertion in
// Debian's build ends the process when that file cannot be written because the disk is full.
class Diary final : public rocksdb::Logger {
 public:
  Diary() : Logger(rocksdb::WARN_LEVEL) {}
  using Logger::Logv;
  void Logv(const char* format, va_list values) override {
    char text[512];
    std::vsnprintf(text, sizeof text, format, values);
    LogWarn("cold store", {{"rocksdb", text}});
  }
};

// The smallest key above all keys with this prefix; empty: there is none.
std::string PrefixEnd(std::string_view prefix) {
  std::string end(prefix);
  while (!end.empty() && static_cast<unsigned char>(end.back()) == 0xff) end.pop_back();
  if (!end.empty()) end.back() = static_cast<char>(static_cast<unsigned char>(end.back()) + 1);
  return end;
}

// An open store. Unlogged: there is no log. Flushes are atomic over the columns, so the disk always
// has everything up to some write and nothing of what came after it; a log would be a second way to
// be durable.
class Opened {
 public:
  static Result<std::unique_ptr<Opened>> Open(const ColdStoreOptions& options,
                                              const std::shared_ptr<Watcher>& watcher);
  ~Opened() {
    for (auto* handle : columns_) {
      if (handle != nullptr) (void)db_->DestroyColumnFamilyHandle(handle);
    }
    if (db_ != nullptr) (void)db_->Close();
  }

  rocksdb::DB& db() const { return *db_; }
  rocksdb::ColumnFamilyHandle* column(ColdColumn c) const {
    return columns_[static_cast<size_t>(c)];
  }
  // Reads every block of the column's tables against its checksum. Without it a damaged table of
  // records could look like an empty one: contexts would be gone, and their segments deleted.
  Status VerifyTables(ColdColumn c) const {
    rocksdb::ColumnFamilyMetaData column_files;
    db_->GetColumnFamilyMetaData(column(c), &column_files);
    rocksdb::Options options = db_->GetOptions(column(c));
    options.info_log = nullptr;  // a reader of one file warns that it cannot tell whose it is
    for (const auto& level : column_files.levels) {
      for (const auto& file : level.files) {
        rocksdb::SstFileReader reader(options);
        rocksdb::Status s = reader.Open(file.db_path + file.name);
        if (s.ok()) s = reader.VerifyChecksum();
        KV_RETURN_IF_ERROR(FromOpen(s, file.db_path + file.name));
      }
    }
    return OkStatus();
  }
  rocksdb::Status Flush() {
    return db_->Flush({},
                      std::vector<rocksdb::ColumnFamilyHandle*>(columns_.begin(), columns_.end()));
  }

 private:
  std::unique_ptr<rocksdb::DB> db_;
  std::array<rocksdb::ColumnFamilyHandle*, kColdColumns> columns_{};
};

class RocksColdStore final : public ColdStore {
 public:
  explicit RocksColdStore(ColdStoreOptions options) : options_(std::move(options)) {}

  Status Open() {
    KV_ASSIGN_OR_RETURN(opened_, Opened::Open(options_, watcher_));
    KV_RETURN_IF_ERROR(opened_->VerifyTables(ColdColumn::kRecords));
    return CheckFormat().WithContext(options_.directory);
  }

  Status Put(std::span<const ColdWrite> batch, bool durable) override {
    uint64_t bytes = 0;
    for (const ColdWrite& w : batch) {
      if (w.key.empty() || w.key.size() > limits::kColdKeyBytesMax) {
        return InvalidArgument("cold store key of " + std::to_string(w.key.size()) +
                               " bytes; expected 1.." + std::to_string(limits::kColdKeyBytesMax));
      }
      bytes += w.key.size() + w.value.size();
    }
    KV_RETURN_IF_ERROR(GoOn());
    const std::shared_lock lock(reopening_);
    KV_RETURN_IF_ERROR(CheckOpen());
    rocksdb::WriteBatch writes;
    for (const ColdWrite& w : batch) {
      KV_RETURN_IF_ERROR(FromRocks(writes.Put(opened_->column(w.column), w.key, w.value), "put"));
    }
    KV_RETURN_IF_ERROR(Wrote(opened_->db().Write(Unlogged(), &writes), "put"));
    puts_.fetch_add(1, std::memory_order_relaxed);
    put_bytes_.fetch_add(bytes, std::memory_order_relaxed);
    if (!durable) return OkStatus();
    KV_RETURN_IF_ERROR(Flush());
    return CheckPersisted(batch);
  }

  Result<std::optional<std::string>> Get(ColdColumn c, std::string_view key) const override {
    gets_.fetch_add(1, std::memory_order_relaxed);
    const std::shared_lock lock(reopening_);
    KV_RETURN_IF_ERROR(CheckOpen());
    std::string value;
    const rocksdb::Status s = opened_->db().Get(ReadHow(), opened_->column(c),
                                                rocksdb::Slice(key.data(), key.size()), &value);
    if (s.IsNotFound()) {
      misses_.fetch_add(1, std::memory_order_relaxed);
      return std::optional<std::string>();
    }
    KV_RETURN_IF_ERROR(FromRocks(s, "get"));
    return std::optional<std::string>(std::move(value));
  }

  Status Scan(ColdColumn c, std::string_view prefix, const Visitor& visit) const override {
    const std::shared_lock lock(reopening_);
    KV_RETURN_IF_ERROR(CheckOpen());
    const std::unique_ptr<rocksdb::Iterator> it(
        opened_->db().NewIterator(ReadHow(), opened_->column(c)));
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
    KV_RETURN_IF_ERROR(GoOn());
    const std::shared_lock lock(reopening_);
    KV_RETURN_IF_ERROR(CheckOpen());
    return Wrote(opened_->db().DeleteRange(Unlogged(), opened_->column(c),
                                           rocksdb::Slice(prefix.data(), prefix.size()), end),
                 "delete");
  }

  Status Sync() override {
    KV_RETURN_IF_ERROR(GoOn());
    const std::shared_lock lock(reopening_);
    KV_RETURN_IF_ERROR(CheckOpen());
    return Flush();
  }

  uint64_t losses() const override { return losses_; }

  void VisitCounters(const CounterVisitor& visit) const override {
    const auto number = [](const std::atomic<uint64_t>& n) {
      return static_cast<double>(n.load(std::memory_order_relaxed));
    };
    visit("puts", number(puts_));
    visit("put_bytes", number(put_bytes_));
    visit("gets", number(gets_));
    visit("get_misses", number(misses_));
    visit("write_stalls", number(watcher_->stalls));
    visit("background_errors", number(watcher_->errors));
    // Not waited for: whoever looks at metrics must not hang while the store is opened again.
    const std::shared_lock lock(reopening_, std::try_to_lock);
    if (!lock.owns_lock() || opened_ == nullptr) return;
    double bytes = 0;
    for (int c = 0; c < kColdColumns; ++c) {
      uint64_t value = 0;
      if (opened_->db().GetIntProperty(opened_->column(static_cast<ColdColumn>(c)),
                                       rocksdb::DB::Properties::kTotalSstFilesSize, &value))
        bytes += static_cast<double>(value);
    }
    visit("disk_bytes", bytes);
  }

 private:
  static rocksdb::WriteOptions Unlogged() {
    rocksdb::WriteOptions how;
    how.disableWAL = true;
    return how;
  }
  static rocksdb::ReadOptions ReadHow() {
    rocksdb::ReadOptions how;
    how.verify_checksums = true;
    return how;
  }
  Status GoOn();
  Status CheckOpen() const {
    if (opened_ != nullptr) return OkStatus();
    return Unavailable("cold store: it failed and could not be opened again; see the log");
  }
  // REQUIRES: reopening_ is held, shared.
  Status Flush() {
    const uint64_t errors = watcher_->errors;
    rocksdb::Status s = opened_->Flush();
    if (s.ok() && watcher_->errors != errors) s = watcher_->last();
    return Wrote(s, "sync");
  }
  // An acknowledged record is not taken on trust: it is read from the tables, past memory.
  Status CheckPersisted(std::span<const ColdWrite> batch) {
    rocksdb::ReadOptions how = ReadHow();
    how.read_tier = rocksdb::kPersistedTier;
    for (const ColdWrite& w : batch) {
      std::string value;
      const rocksdb::Status s = opened_->db().Get(how, opened_->column(w.column), w.key, &value);
      if (s.ok()) continue;
      watcher_->stopped = true;
      LogError("cold store: flushed, and not in its tables", {{"status", s.ToString()}});
      return Unavailable("cold store: a flushed write is not on disk: " + s.ToString());
    }
    return OkStatus();
  }
  Status Wrote(const rocksdb::Status& s, const char* what) {
    if (!s.ok()) watcher_->stopped = true;
    return FromRocks(s, what);
  }
  Status CheckFormat();

  const ColdStoreOptions options_;
  const std::shared_ptr<Watcher> watcher_ = std::make_shared<Watcher>();
  mutable std::shared_mutex reopening_;  // exclusive: while opened_ changes
  std::unique_ptr<Opened> opened_;       // nullptr: it could not be opened again
  std::atomic<uint64_t> losses_{0};
  std::atomic<uint64_t> puts_{0}, put_bytes_{0};
  mutable std::atomic<uint64_t> gets_{0}, misses_{0};
};

// Whether the disk takes a file of a few pages.
Status ProbeDisk(const std::string& directory) {
  const std::string path = directory + "/probe";
  const std::string bytes(1u << 20, 'p');
  const int fd = ::open(path.c_str(), O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0600);
  bool written = fd >= 0;
  for (size_t at = 0; written && at < bytes.size();) {
    const ssize_t n = ::write(fd, bytes.data() + at, bytes.size() - at);
    written = n > 0;
    at += written ? static_cast<size_t>(n) : 0;
  }
  written = written && ::fsync(fd) == 0;
  const std::string reason = std::strerror(errno);
  if (fd >= 0) ::close(fd);
  ::unlink(path.c_str());
  if (written) return OkStatus();
  return ResourceExhausted("cold store: the disk takes no files: " + path + ": " + reason +
                           "; free space on the disk of --data-dir");
}

// After a failed write or flush the store is opened again, when the disk takes files. RocksDB's own
// way on, DB::Resume, does not serve: flushes that wait while it fails are told that they have
// succeeded, and with flushes of unlogged writes it can stop for ever (7.8). What was not synced is
// lost, and counted.
Status RocksColdStore::GoOn() {
  if (!watcher_->stopped) return OkStatus();
  const std::unique_lock lock(reopening_);
  if (!watcher_->stopped) return OkStatus();  // another thread was here
  KV_RETURN_IF_ERROR(ProbeDisk(options_.directory));
  ++losses_;
  opened_.reset();
  auto opened = Opened::Open(options_, watcher_);
  if (!opened.ok()) {
    LogError("cold store not opened again", {{"status", opened.status().ToString()}});
    return opened.status();
  }
  opened_ = std::move(opened).value();
  watcher_->stopped = false;
  LogInfo("cold store opened again");
  return OkStatus();
}

rocksdb::ColumnFamilyOptions ColumnOptions(const std::shared_ptr<rocksdb::Cache>& cache) {
  rocksdb::BlockBasedTableOptions table;
  table.block_cache = cache;
  table.filter_policy.reset(rocksdb::NewBloomFilterPolicy(10));
  rocksdb::ColumnFamilyOptions column;
  column.table_factory.reset(rocksdb::NewBlockBasedTableFactory(table));
  column.compression = rocksdb::kNoCompression;
  column.write_buffer_size = 32u << 20;
  return column;
}

Result<std::unique_ptr<Opened>> Opened::Open(const ColdStoreOptions& options,
                                             const std::shared_ptr<Watcher>& watcher) {
  std::error_code error;
  std::filesystem::create_directories(options.directory, error);
  if (error) {
    return InvalidArgument("--data-dir " + options.directory + ": " + error.message() +
                           "; name a directory that can be written");
  }
  rocksdb::DBOptions db;
  db.create_if_missing = true;
  db.create_missing_column_families = true;
  db.atomic_flush = true;                 // Unlogged
  db.avoid_flush_during_shutdown = true;  // what nobody has synced nobody needs
  db.max_bgerror_resume_count = 0;        // GoOn does it
  db.use_direct_reads = options.direct_io;
  db.use_direct_io_for_flush_and_compaction = options.direct_io;
  db.listeners.push_back(watcher);
  db.info_log = std::make_shared<Diary>();
  if (options.write_bytes_per_second > 0) {
    db.rate_limiter.reset(
        rocksdb::NewGenericRateLimiter(static_cast<int64_t>(options.write_bytes_per_second)));
  }
  const auto cache = rocksdb::NewLRUCache(options.cache_bytes);
  std::vector<rocksdb::ColumnFamilyDescriptor> columns = {{rocksdb::kDefaultColumnFamilyName, {}}};
  for (const char* name : kColumnNames) columns.emplace_back(name, ColumnOptions(cache));
  std::vector<rocksdb::ColumnFamilyHandle*> handles;
  rocksdb::DB* raw = nullptr;
  KV_RETURN_IF_ERROR(FromOpen(rocksdb::DB::Open(db, options.directory, columns, &handles, &raw),
                              options.directory));
  auto opened = std::make_unique<Opened>();
  opened->db_.reset(raw);
  (void)raw->DestroyColumnFamilyHandle(handles[0]);
  std::copy(handles.begin() + 1, handles.end(), opened->columns_.begin());
  return opened;
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
  auto store = std::make_unique<RocksColdStore>(options);
  KV_RETURN_IF_ERROR(store->Open());
  return std::unique_ptr<ColdStore>(std::move(store));
}

}  // namespace icecache
