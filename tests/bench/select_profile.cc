#include "tests/bench/select_profile.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "cacheserver/select/cluster_tree.h"
#include "kernels/distance.h"
#include "kernels/memory.h"
#include "tests/bench/measure.h"

namespace icecache {
namespace {

// Per dimension: sum of (x - mean)^2 over rows of tokens[begin, end).
void AddDeviations(const float* rows, uint32_t dim, std::span<const uint32_t> tokens,
                   std::vector<double>* sum) {
  std::vector<double> mean(dim, 0.0);
  for (const uint32_t t : tokens)
    for (uint32_t j = 0; j < dim; ++j)
      mean[j] += rows[size_t{t} * dim + j] / static_cast<double>(tokens.size());
  for (const uint32_t t : tokens) {
    for (uint32_t j = 0; j < dim; ++j) {
      const double x = rows[size_t{t} * dim + j] - mean[j];
      (*sum)[j] += x * x;
    }
  }
}

std::vector<double> Weighted(const std::vector<double>& sum, const std::vector<float>& energy) {
  std::vector<double> weighted(sum);
  for (size_t j = 0; j < weighted.size() && !energy.empty(); ++j) weighted[j] *= energy[j];
  return weighted;
}

double Total(const std::vector<double>& x) { return std::accumulate(x.begin(), x.end(), 0.0); }

double TopShare(std::vector<double> x, size_t count) {
  std::sort(x.begin(), x.end(), std::greater<>());
  const auto top = static_cast<ptrdiff_t>(std::min(count, x.size()));
  const double all = Total(x);
  return all > 0 ? std::accumulate(x.begin(), x.begin() + top, 0.0) / all : 0.0;
}

}  // namespace

Result<TraceProfile> ProfileTrace(const Trace& trace, uint64_t seed) {
  using Layout = ClusterTreeOptions::Layout;
  constexpr size_t kSketched = 32;
  const TokenRows rows = trace.Rows(0, trace.keys);
  std::vector<float> k(size_t{trace.keys} * trace.dim), v(k.size());
  ToF32(rows.k, rows.dtype, k.size(), k.data());
  ToF32(rows.v, rows.dtype, v.size(), v.data());
  std::vector<uint32_t> all(trace.keys);
  std::iota(all.begin(), all.end(), 0u);
  std::vector<double> key_all(trace.dim, 0.0), value_all(trace.dim, 0.0);
  AddDeviations(k.data(), trace.dim, all, &key_all);
  AddDeviations(v.data(), trace.dim, all, &value_all);
  const std::vector<double> logits = Weighted(key_all, trace.energy);
  TraceProfile profile = {{"top256_mass", TopMass(trace, 256, trace.query_count)},
                          {"energy_top32", TopShare(logits, kSketched)}};
  const std::pair<const char*, Layout> layouts[] = {{"sequential", Layout::kSequential},
                                                    {"content_value", Layout::kContentValue},
                                                    {"content", Layout::kContent}};
  for (const auto& [name, layout] : layouts) {
    ClusterTreeOptions options;
    options.layout = layout;
    auto policy = MakeClusterTree({trace.dtype, trace.dim, seed}, options);
    BuildHints hints;
    hints.query_energy = trace.energy;
    KV_ASSIGN_OR_RETURN(const PageLayout pages, policy->Build(rows, hints));
    std::vector<double> key(trace.dim, 0.0), value(trace.dim, 0.0);
    for (uint32_t p = 0; p < pages.page_count(); ++p) {
      const auto tokens =
          std::span(pages.tokens)
              .subspan(pages.page_begin[p], pages.page_begin[p + 1] - pages.page_begin[p]);
      AddDeviations(k.data(), trace.dim, tokens, &key);
      AddDeviations(v.data(), trace.dim, tokens, &value);
    }
    const std::vector<double> inside = Weighted(key, trace.energy);
    profile.emplace_back(std::string("key_variance_") + name,
                         Total(inside) / std::max(1e-30, Total(logits)));
    profile.emplace_back(std::string("value_variance_") + name,
                         Total(value) / std::max(1e-30, Total(value_all)));
    if (layout == Layout::kContent)
      profile.emplace_back("page_energy_top32", TopShare(inside, kSketched));
  }
  return profile;
}

double ExactScanMicros(const Trace& trace) {
  const size_t count = size_t{trace.keys} * trace.dim;
  HostBuffer keys = HostBuffer::Allocate(count * sizeof(float)).value();
  ToF32(trace.k.data(), trace.dtype, count, reinterpret_cast<float*>(keys.data()));
  std::vector<float> scores(size_t{trace.group} * trace.keys);
  std::vector<double> micros;
  const double clock_us = ThreadClockCostMicros();
  const uint32_t rounds = std::clamp<uint32_t>(8000000 / trace.keys, 5, 100);
  for (uint32_t i = 0; i < rounds; ++i) {
    const double begin = ThreadCpuMicros();
    DotRows(trace.Query(i % trace.query_count), trace.group, keys.data(), DType::kF32, trace.keys,
            trace.dim, scores.data(), trace.keys);
    micros.push_back(ThreadCpuMicros() - begin - clock_us);
  }
  return Quantile(micros, 0.5);
}

}  // namespace icecache
