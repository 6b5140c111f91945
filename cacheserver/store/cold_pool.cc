#include "cacheserver/store/cold_pool.h"

#include <boost/asio/post.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/thread_pool.hpp>
#include <mutex>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "cacheserver/store/cold_keys.h"
#include "common/limits.h"
#include "common/log.h"

namespace icecache {

struct ColdPool::Impl {
  Impl(uint32_t threads, const Clock& c, MetricsRegistry& metrics)
      : clock(c),
        degraded(metrics.GetGauge(
            "icecache_cold_store_degraded",
            "1 while writes to the cold store fail and contexts are kept in memory only.")),
        write_failures(metrics.GetCounter("icecache_cold_store_write_failures_total",
                                          "Writes that the cold store has refused.")),
        pool(threads),
        records(boost::asio::make_strand(pool)) {}

  const Clock& clock;
  Gauge& degraded;
  Counter& write_failures;
  std::mutex mutex;
  Status failure;  // of the last write that failed
  TimePoint failed_at;
  std::unordered_map<SegmentId, uint32_t> writers;
  std::unordered_set<SegmentId> doomed;
  boost::asio::thread_pool pool;
  boost::asio::strand<boost::asio::thread_pool::executor_type> records;
};

ColdPool::ColdPool(std::unique_ptr<ColdStore> store, uint32_t threads, const Clock& clock,
                   MetricsRegistry& metrics)
    : store_(std::move(store)), impl_(std::make_unique<Impl>(threads, clock, metrics)) {}

ColdPool::~ColdPool() { Stop(); }

void ColdPool::Submit(std::function<void()> task) {
  boost::asio::post(impl_->pool, std::move(task));
}

void ColdPool::SubmitRecord(std::function<void()> task) {
  boost::asio::post(impl_->records, std::move(task));
}

void ColdPool::Stop() {
  impl_->pool.stop();
  impl_->pool.join();
}

Status ColdPool::WriteHealth() const {
  std::lock_guard lock(impl_->mutex);
  if (impl_->clock.Now() - impl_->failed_at >= limits::kStoreRetryTime) return OkStatus();
  return impl_->failure;
}

Status ColdPool::NoteWrite(Status status) {
  std::lock_guard lock(impl_->mutex);
  const bool was_ok = impl_->failure.ok();
  if (!status.ok()) {
    impl_->write_failures.Add();
    if (was_ok) {
      LogError("cold store: writing fails, contexts stay in memory only",
               {{"status", status.ToString()}});
    }
    impl_->failed_at = impl_->clock.Now();
  } else if (!was_ok) {
    LogInfo("cold store: writing works again");
  }
  impl_->failure = status;
  impl_->degraded.Set(status.ok() ? 0 : 1);
  return status;
}

bool ColdPool::BeginWrite(SegmentId segment) {
  std::lock_guard lock(impl_->mutex);
  if (impl_->doomed.contains(segment)) return false;
  ++impl_->writers[segment];
  return true;
}

void ColdPool::EndWrite(SegmentId segment) {
  bool last = false;
  {
    std::lock_guard lock(impl_->mutex);
    const auto it = impl_->writers.find(segment);
    KV_CHECK(it != impl_->writers.end());
    if (--it->second > 0) return;
    impl_->writers.erase(it);
    last = impl_->doomed.contains(segment);
  }
  if (last) DeleteSegment(segment);
}

void ColdPool::DeleteSegment(SegmentId segment) {
  {
    std::lock_guard lock(impl_->mutex);
    // Ids are not used again, so what is doomed stays so; it is taken out when it is gone.
    impl_->doomed.insert(segment);
    if (impl_->writers.contains(segment)) return;
  }
  // Behind the records: a context that names the segment has been deleted by then.
  SubmitRecord([this, segment] {
    const std::string prefix = cold_keys::SegmentPrefix(segment);
    Status status = store_->DeletePrefix(ColdColumn::kPages, prefix);
    if (status.ok()) status = store_->DeletePrefix(ColdColumn::kIndex, prefix);
    if (status.ok()) {
      status = store_->DeletePrefix(ColdColumn::kRecords, cold_keys::SegmentRecord(segment));
    }
    // What could not be deleted is found by its record at the next start.
    (void)NoteWrite(status);
    std::lock_guard lock(impl_->mutex);
    impl_->doomed.erase(segment);
  });
}

}  // namespace icecache
