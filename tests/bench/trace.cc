#include "tests/bench/trace.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "common/limits.h"
#include "kernels/distance.h"
#include "tests/bench/random.h"

namespace icecache {
namespace {

constexpr uint32_t kCentres = 512;
constexpr uint32_t kRunTokens = 32;
constexpr uint32_t kHistoryGroups = 64;

}  // namespace

std::vector<float> EnergyOf(std::span<const float> queries, uint32_t dim) {
  std::vector<float> energy(dim, 0.0f);
  const size_t rows = queries.size() / dim;
  for (size_t r = 0; r < rows; ++r)
    for (uint32_t j = 0; j < dim; ++j)
      energy[j] += queries[r * dim + j] * queries[r * dim + j] / static_cast<float>(rows);
  return energy;
}

Result<Trace> MakeClusteredTrace(const TraceSpec& spec) {
  const float noise = spec.name == "weak" ? 1.5f : 0.6f;
  const uint32_t dim = spec.dim, total = spec.keys + spec.extra_keys;
  TraceRandom random(spec.seed);
  Trace trace{.dtype = spec.dtype,
              .dim = dim,
              .group = spec.group,
              .keys = spec.keys,
              .extra_keys = spec.extra_keys,
              .query_count = spec.query_count};
  std::vector<float> centres(size_t{kCentres} * dim), value_centres(centres.size());
  random.Fill(centres.data(), centres.size(), 1.0f);
  random.Fill(value_centres.data(), centres.size(), 1.0f);
  std::vector<uint32_t> cluster(total);
  for (uint32_t t = 0; t < total; ++t)
    cluster[t] =
        spec.name == "runs" && t % kRunTokens != 0 ? cluster[t - 1] : random.Below(kCentres);

  const size_t row_bytes = size_t{dim} * DTypeBytes(spec.dtype);
  trace.k.resize(total * row_bytes);
  trace.v.resize(total * row_bytes);
  std::vector<float> key(dim), value(dim);
  std::vector<std::vector<uint32_t>> members(kCentres);
  for (uint32_t t = 0; t < total; ++t) {
    const size_t c = size_t{cluster[t]} * dim;
    for (uint32_t j = 0; j < dim; ++j) {
      key[j] = centres[c + j] + noise * random.Normal();
      value[j] = std::sqrt(0.5f) * (value_centres[c + j] + random.Normal());
    }
    FromF32(key.data(), dim, spec.dtype, trace.k.data() + t * row_bytes);
    FromF32(value.data(), dim, spec.dtype, trace.v.data() + t * row_bytes);
    if (t < spec.keys) members[cluster[t]].push_back(t);
  }

  const double spread = std::max(0.0, spec.group_spread);
  const auto draw = [&](uint32_t groups, std::vector<float>* queries) {
    queries->resize(size_t{groups} * spec.group * dim);
    for (uint32_t q = 0; q < groups; ++q) {
      const uint32_t common = cluster[random.Below(spec.keys)];
      for (uint32_t h = 0; h < spec.group; ++h) {
        const bool alone = random.Chance(static_cast<float>(spread));
        const std::vector<uint32_t>& from =
            members[alone ? cluster[random.Below(spec.keys)] : common];
        const uint32_t t = from[random.Below(static_cast<uint32_t>(from.size()))];
        ToF32(trace.k.data() + t * row_bytes, spec.dtype, dim, key.data());
        float* out = queries->data() + (size_t{q} * spec.group + h) * dim;
        for (uint32_t j = 0; j < dim; ++j)
          out[j] = (key[j] + noise * random.Normal()) / std::sqrt(static_cast<float>(dim));
      }
    }
  };
  std::vector<float> history;
  draw(kHistoryGroups, &history);
  trace.energy = EnergyOf(history, dim);
  trace.history.assign(history.begin() + static_cast<ptrdiff_t>(history.size() / 2), history.end());
  draw(spec.query_count, &trace.queries);
  return trace;
}

Result<Trace> MakeTrace(const TraceSpec& spec) {
  const std::string calibrated = "calibrated:", file = "file:";
  if (spec.name.starts_with(file)) return LoadTrace(spec, spec.name.substr(file.size()));
  if (spec.dim == 0 || spec.dim % 16 != 0 || spec.dim > limits::kHeadDimMax)
    return InvalidArgument("--dim " + std::to_string(spec.dim) +
                           ": expected a multiple of 16 up to " +
                           std::to_string(limits::kHeadDimMax));
  if (spec.group == 0 || spec.group > limits::kGroupMax)
    return InvalidArgument("--group " + std::to_string(spec.group) + ": expected 1 to " +
                           std::to_string(limits::kGroupMax));
  if (spec.keys == 0 || spec.query_count == 0)
    return InvalidArgument("--keys and --queries must be at least 1");
  if (spec.follow && spec.extra_keys == 0)
    return InvalidArgument("queries over time need tokens to add");
  if (spec.name.starts_with(calibrated))
    return MakeCalibratedTrace(spec, spec.name.substr(calibrated.size()));
  if (spec.name == "clustered" || spec.name == "runs" || spec.name == "weak") {
    if (spec.follow)
      return InvalidArgument("trace '" + spec.name + "' has no queries over time; use calibrated: "
                             "or file:");
    return MakeClusteredTrace(spec);
  }
  return InvalidArgument(
      "trace '" + spec.name +
      "' is unknown; use clustered, runs, weak, "
      "calibrated:{retrieval,sinky,topic,broad,diffuse} or file:PATH@LAYER.HEAD");
}

double TopMass(const Trace& trace, uint32_t count, uint32_t query_count) {
  std::vector<float> scores(size_t{trace.group} * trace.keys);
  query_count = std::min(query_count, trace.query_count);
  double sum = 0;
  for (uint32_t q = 0; q < query_count; ++q) {
    DotRows(trace.Query(q), trace.group, trace.k.data(), trace.dtype, trace.keys, trace.dim,
            scores.data(), trace.keys);
    for (uint32_t h = 0; h < trace.group; ++h) {
      float* x = scores.data() + size_t{h} * trace.keys;
      const uint32_t top = std::min(count, trace.keys);
      const double all = ExpShifted(x, trace.keys, MaxOf(x, trace.keys), x);
      std::nth_element(x, x + top, x + trace.keys, std::greater<>());
      sum += std::accumulate(x, x + top, 0.0) / all;
    }
  }
  return sum / (query_count * trace.group);
}

}  // namespace icecache
