#include "common/metrics.h"

#include <bit>
#include <cmath>
#include <cstdio>
#include <map>
#include <variant>

#include "common/status.h"

namespace icecache {
namespace {

enum class Kind { kCounter, kGauge, kHistogram };

std::string Escape(std::string_view value) {
  std::string out;
  for (const char c : value) {
    if (c == '\\' || c == '"') out += '\\';
    if (c == '\n') {
      out += "\\n";
      continue;
    }
    out += c;
  }
  return out;
}

std::string RenderLabels(const MetricLabels& labels) {
  std::string out;
  for (const auto& [key, value] : labels)
    out += (out.empty() ? "" : ",") + key + "=\"" + Escape(value) + "\"";
  return out;
}

std::string Braced(const std::string& labels) { return labels.empty() ? "" : "{" + labels + "}"; }

std::string Seconds(double s) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%.9g", s);
  return buffer;
}

void RenderHistogram(const std::string& name, const std::string& labels, const Histogram& h,
                     std::string* out) {
  uint64_t cumulative = 0;
  const std::string comma = labels.empty() ? "" : labels + ",";
  for (int i = 0; i < Histogram::kBuckets; ++i) {
    cumulative += h.bucket(i);
    *out += name + "_bucket{" + comma + "le=\"" + Seconds(std::ldexp(1e-6, i)) + "\"} " +
            std::to_string(cumulative) + "\n";
  }
  cumulative += h.bucket(Histogram::kBuckets);
  *out += name + "_bucket{" + comma + "le=\"+Inf\"} " + std::to_string(cumulative) + "\n";
  *out += name + "_sum" + Braced(labels) + " " + Seconds(h.sum_seconds()) + "\n";
  *out += name + "_count" + Braced(labels) + " " + std::to_string(cumulative) + "\n";
}

}  // namespace

void Histogram::ObserveSeconds(double seconds) {
  const double ns = seconds > 0 ? seconds * 1e9 : 0;
  const auto whole_ns =
      ns < 9e18 ? static_cast<uint64_t>(ns) : uint64_t{9'000'000'000'000'000'000u};
  const uint64_t us = (whole_ns + 999) / 1000;  // round up: a bucket's bound is inclusive
  const int index = us <= 1 ? 0 : std::bit_width(us - 1);
  buckets_[static_cast<size_t>(index < kBuckets ? index : kBuckets)].fetch_add(
      1, std::memory_order_relaxed);
  sum_ns_.fetch_add(whole_ns, std::memory_order_relaxed);
}

uint64_t Histogram::count() const {
  uint64_t n = 0;
  for (const auto& b : buckets_) n += b.load(std::memory_order_relaxed);
  return n;
}

double Histogram::sum_seconds() const {
  return static_cast<double>(sum_ns_.load(std::memory_order_relaxed)) * 1e-9;
}

struct MetricsRegistry::Impl {
  struct Family {
    Kind kind;
    std::string help;
    std::map<std::string, std::unique_ptr<Counter>> counters;
    std::map<std::string, std::unique_ptr<Gauge>> gauges;
    std::map<std::string, std::unique_ptr<Histogram>> histograms;
  };
  mutable std::mutex mutex;  // guards the maps; the metrics themselves are atomics
  std::map<std::string, Family, std::less<>> families;

  Family& Get(std::string_view name, std::string_view help, Kind kind) {
    auto [it, made] = families.try_emplace(std::string(name));
    if (made) {
      it->second.kind = kind;
      it->second.help = help;
    }
    KV_CHECK(it->second.kind == kind);
    return it->second;
  }
};

MetricsRegistry::MetricsRegistry() : impl_(std::make_unique<Impl>()) {}
MetricsRegistry::~MetricsRegistry() = default;

namespace {
template <typename T>
T& GetOrMake(std::map<std::string, std::unique_ptr<T>>& map, const MetricLabels& labels) {
  auto& slot = map[RenderLabels(labels)];
  if (!slot) slot = std::make_unique<T>();
  return *slot;
}
}  // namespace

Counter& MetricsRegistry::GetCounter(std::string_view name, std::string_view help,
                                     MetricLabels labels) {
  std::lock_guard lock(impl_->mutex);
  return GetOrMake(impl_->Get(name, help, Kind::kCounter).counters, labels);
}
Gauge& MetricsRegistry::GetGauge(std::string_view name, std::string_view help,
                                 MetricLabels labels) {
  std::lock_guard lock(impl_->mutex);
  return GetOrMake(impl_->Get(name, help, Kind::kGauge).gauges, labels);
}
Histogram& MetricsRegistry::GetHistogram(std::string_view name, std::string_view help,
                                         MetricLabels labels) {
  std::lock_guard lock(impl_->mutex);
  return GetOrMake(impl_->Get(name, help, Kind::kHistogram).histograms, labels);
}

std::string MetricsRegistry::RenderPrometheus() const {
  std::lock_guard lock(impl_->mutex);
  std::string out;
  for (const auto& [name, family] : impl_->families) {
    static constexpr const char* kKinds[] = {"counter", "gauge", "histogram"};
    out += "# HELP " + name + " " + family.help + "\n# TYPE " + name + " " +
           kKinds[static_cast<int>(family.kind)] + "\n";
    const bool seconds = name.ends_with("_seconds_total");
    for (const auto& [labels, c] : family.counters) {
      const std::string value =
          seconds ? Seconds(static_cast<double>(c->value()) * 1e-9) : std::to_string(c->value());
      out += name + Braced(labels) + " " + value + "\n";
    }
    for (const auto& [labels, g] : family.gauges)
      out += name + Braced(labels) + " " + std::to_string(g->value()) + "\n";
    for (const auto& [labels, h] : family.histograms) RenderHistogram(name, labels, *h, &out);
  }
  return out;
}

}  // namespace icecache
