// ColdStore: the seam to the tier below memory. Named blobs in three columns, written in atomic
// batches.
//
// What is kept there is write-once: pages and index images of sealed segments, and small records
// that say which contexts exist. The disk has everything up to some write and nothing of what came
// after it. So the caller puts pages and index first, then the record, durably: a record on disk proves
// that everything it names is there, and a crash in between leaves blobs that no record names (the
// caller deletes them at start).
//
// Implementations: RocksDB (rocks_cold_store.cc, the only file that knows it) and an in-memory
// twin. Both pass tests/conformance/cold_store_suite.h. All methods may be called from many threads
// at once and block; they belong on the cold pool, never on a shard.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "common/status.h"

namespace icecache {

// Stable numbers: they name column families on disk.
enum class ColdColumn : uint8_t { kPages = 0, kIndex = 1, kRecords = 2 };
inline constexpr int kColdColumns = 3;

struct ColdWrite {
  ColdColumn column = ColdColumn::kPages;
  std::string key;  // 1..kColdKeyBytesMax bytes, any values; ordered as unsigned bytes
  std::string value;
};

class ColdStore {
 public:
  virtual ~ColdStore() = default;

  // Writes all or none. durable: on disk when it returns, like everything written before; otherwise at
  // the next Sync.
  // RESOURCE_EXHAUSTED: disk full. DATA_LOSS: the store is corrupt. Both leave earlier data
  // readable.
  virtual Status Put(std::span<const ColdWrite> batch, bool durable) = 0;

  // nullopt: no such key. DATA_LOSS when the stored bytes fail their check.
  virtual Result<std::optional<std::string>> Get(ColdColumn column, std::string_view key) const = 0;

  // Calls visit for every key that starts with `prefix`, in key order, until it returns false.
  using Visitor = std::function<bool(std::string_view key, std::string_view value)>;
  virtual Status Scan(ColdColumn column, std::string_view prefix, const Visitor& visit) const = 0;

  // Removes every key that starts with `prefix` (not empty). Durable at the next Sync.
  virtual Status DeletePrefix(ColdColumn column, std::string_view prefix) = 0;

  // Everything written before is on disk when this returns, unless a loss came between.
  virtual Status Sync() = 0;
  // How often writes that were not synced have been lost: after a failure (disk full) the store is
  // opened again with what is on disk. Whoever puts in parts compares before the first and after
  // the Sync.
  virtual uint64_t losses() const = 0;

  // "puts", "put_bytes", "gets", "get_misses", "disk_bytes", "write_stalls", "background_errors".
  using CounterVisitor = std::function<void(std::string_view name, double value)>;
  virtual void VisitCounters(const CounterVisitor& visit) const = 0;
};

struct ColdStoreOptions {
  std::string directory;
  uint64_t write_bytes_per_second = 0;  // bound on background writes; 0: none
  uint64_t cache_bytes =
      32u << 20;           // block cache: pages that matter are in the pool, so it stays small
  bool direct_io = false;  // bypass the page cache (not every file system can)
};

// Opens or creates the store. FAILED_PRECONDITION when it was written by a newer format (with both
// numbers) or is in use by another process; DATA_LOSS when it is corrupt; each with the directory
// and the remedy.
Result<std::unique_ptr<ColdStore>> OpenRocksColdStore(const ColdStoreOptions& options);

// Keeps everything in a map. faults: lets tests make the next operations fail like a full or broken
// disk.
struct ColdFaults {
  std::function<Status(std::string_view operation)>
      before;  // "put" | "get" | "scan" | "delete" | "sync"; may be empty
};
std::unique_ptr<ColdStore> MakeMemoryColdStore(ColdFaults faults = {});

}  // namespace icecache
