// Metrics: counters, gauges and histograms, rendered as Prometheus text (0.0.4).
//
// One Registry per process, built in main() and handed in; no singleton. A metric is made once, at
// start, and lives as long as its registry; Add/Set/Observe are one relaxed atomic operation and
// may be called on any thread. Names follow the rules of Prometheus: `icecache_` first, base unit
// last,
// `_total` on counters only. A counter of seconds (`_seconds_total`) counts nanoseconds and is
// shown in seconds. Label values are bounded: tenants and reasons, never contexts.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace icecache {

using MetricLabels = std::vector<std::pair<std::string, std::string>>;

class Counter {
 public:
  void Add(uint64_t n = 1) { value_.fetch_add(n, std::memory_order_relaxed); }
  // For a count that somebody else keeps, and that never goes down.
  void Set(uint64_t n) { value_.store(n, std::memory_order_relaxed); }
  uint64_t value() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<uint64_t> value_{0};
};

class Gauge {
 public:
  void Set(int64_t v) { value_.store(v, std::memory_order_relaxed); }
  void Add(int64_t n) { value_.fetch_add(n, std::memory_order_relaxed); }
  int64_t value() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<int64_t> value_{0};
};

// Fixed powers-of-two buckets from 1 us to ~8.4 s: latencies in seconds, one layout for all.
class Histogram {
 public:
  static constexpr int kBuckets = 24;  // upper bounds 2^0 .. 2^23 us, then +Inf
  void ObserveSeconds(double seconds);
  uint64_t count() const;
  double sum_seconds() const;
  uint64_t bucket(int i) const {
    return buckets_[static_cast<size_t>(i)].load(std::memory_order_relaxed);
  }

 private:
  std::array<std::atomic<uint64_t>, kBuckets + 1> buckets_{};
  std::atomic<uint64_t> sum_ns_{0};
};

// All metrics of the process, by name and labels. Any thread.
class MetricsRegistry {
 public:
  MetricsRegistry();
  ~MetricsRegistry();
  MetricsRegistry(const MetricsRegistry&) = delete;
  MetricsRegistry& operator=(const MetricsRegistry&) = delete;

  // The metric of that name and those labels, made on first use. The help text of the first call is
  // kept. A name is of one kind for ever (KV_CHECK).
  Counter& GetCounter(std::string_view name, std::string_view help, MetricLabels labels = {});
  Gauge& GetGauge(std::string_view name, std::string_view help, MetricLabels labels = {});
  Histogram& GetHistogram(std::string_view name, std::string_view help, MetricLabels labels = {});

  std::string RenderPrometheus() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace icecache
