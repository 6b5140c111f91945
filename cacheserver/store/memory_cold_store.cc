// The in-memory twin of the cold store: same promises, no disk, faults on demand.
#include <array>
#include <atomic>
#include <map>
#include <mutex>

#include "cacheserver/store/cold_store.h"
#include "common/limits.h"

namespace icecache {
namespace {

class MemoryColdStore final : public ColdStore {
 public:
  explicit MemoryColdStore(ColdFaults faults) : faults_(std::move(faults)) {}

  Status Put(std::span<const ColdWrite> batch, bool) override {
    KV_RETURN_IF_ERROR(Fault("put"));
    for (const ColdWrite& w : batch) {
      if (w.key.empty() || w.key.size() > limits::kColdKeyBytesMax) {
        return InvalidArgument("cold store key of " + std::to_string(w.key.size()) +
                               " bytes; expected 1.." + std::to_string(limits::kColdKeyBytesMax));
      }
    }
    std::lock_guard lock(mutex_);
    for (const ColdWrite& w : batch) {
      put_bytes_ += w.key.size() + w.value.size();
      column(w.column)[w.key] = w.value;
    }
    ++puts_;
    return OkStatus();
  }

  Result<std::optional<std::string>> Get(ColdColumn c, std::string_view key) const override {
    KV_RETURN_IF_ERROR(Fault("get"));
    std::lock_guard lock(mutex_);
    ++gets_;
    const auto& map = columns_[static_cast<size_t>(c)];
    const auto it = map.find(key);
    if (it == map.end()) {
      ++misses_;
      return std::optional<std::string>();
    }
    return std::optional<std::string>(it->second);
  }

  Status Scan(ColdColumn c, std::string_view prefix, const Visitor& visit) const override {
    KV_RETURN_IF_ERROR(Fault("scan"));
    Map copy;  // visitors may call back into the store
    {
      std::lock_guard lock(mutex_);
      const auto& map = columns_[static_cast<size_t>(c)];
      for (auto it = map.lower_bound(prefix); it != map.end() && it->first.starts_with(prefix);
           ++it)
        copy.insert(*it);
    }
    for (const auto& [key, value] : copy) {
      if (!visit(key, value)) break;
    }
    return OkStatus();
  }

  Status DeletePrefix(ColdColumn c, std::string_view prefix) override {
    if (prefix.empty())
      return InvalidArgument("cold store: an empty prefix would delete the whole column");
    KV_RETURN_IF_ERROR(Fault("delete"));
    std::lock_guard lock(mutex_);
    Map& map = column(c);
    auto it = map.lower_bound(prefix);
    while (it != map.end() && it->first.starts_with(prefix)) it = map.erase(it);
    return OkStatus();
  }

  uint64_t losses() const override { return 0; }
  Status Sync() override { return Fault("sync"); }

  void VisitCounters(const CounterVisitor& visit) const override {
    std::lock_guard lock(mutex_);
    visit("puts", static_cast<double>(puts_));
    visit("put_bytes", static_cast<double>(put_bytes_));
    visit("gets", static_cast<double>(gets_));
    visit("get_misses", static_cast<double>(misses_));
    double bytes = 0;
    for (const Map& map : columns_) {
      for (const auto& [key, value] : map) bytes += static_cast<double>(key.size() + value.size());
    }
    visit("disk_bytes", bytes);
    visit("write_stalls", 0);
    visit("background_errors", 0);
  }

 private:
  using Map = std::map<std::string, std::string, std::less<>>;

  Status Fault(std::string_view operation) const {
    return faults_.before ? faults_.before(operation) : OkStatus();
  }
  Map& column(ColdColumn c) { return columns_[static_cast<size_t>(c)]; }

  const ColdFaults faults_;
  mutable std::mutex mutex_;
  std::array<Map, kColdColumns> columns_;
  uint64_t puts_ = 0, put_bytes_ = 0;
  mutable uint64_t gets_ = 0, misses_ = 0;
};

}  // namespace

std::unique_ptr<ColdStore> MakeMemoryColdStore(ColdFaults faults) {
  return std::make_unique<MemoryColdStore>(std::move(faults));
}

}  // namespace icecache
