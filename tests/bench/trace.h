// Traces: K, V and queries of one head slice, synthetic or dumped, for measuring selection
// policies.
//
// Synthetic names (issue text and notes/sparse.md section 4 say why each exists):
//   clustered        512 Gaussian centres in R^D plus 0.6 noise in random order; a query is a key
//   plus noise runs             the same in runs of 32 tokens of one centre weak noise 1.5 instead
//   of 0.6 calibrated:C     keys and queries under RoPE with the statistics of real heads; C is the
//   head's class:
//                    retrieval, sinky, topic, broad or diffuse (share of mass that the top 256 of
//                    32k tokens hold)
//   file:PATH@L.H    layer L, kv head H of what a model computed (icecache-worker dump-trace,
//                    worker/trace_file.h); alone, PATH means layer 0, head 0
// Isotropic traces (the first three) say little about attention: use them for speed and for
// relative recall.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "common/status.h"
#include "kernels/paged_kv.h"

namespace icecache {

struct TraceSpec {
  std::string name = "clustered";
  uint32_t keys = 32768;    // indexed by Build
  uint32_t extra_keys = 0;  // for Insert, after them
  uint32_t dim = 128;
  uint32_t group = 4;         // query heads
  uint32_t query_count = 32;  // groups
  DType dtype = DType::kF16;
  uint64_t seed = 1;
  double group_spread =
      -1;  // share of heads that look elsewhere than their group; < 0: the trace's own
  // Calibrated traces of one model share the text (topics and types of tokens) and, from layer to
  // layer, most of what a head looks for; keys, values and noise stay the trace's own. 0: from
  // `seed`, like everything else.
  uint64_t text_seed = 0;
  uint64_t look_seed = 0;
  // Queries are asked while the extra keys come, evenly spread, instead of all after the first
  // `keys`; half of the time attention that moves goes to an extra key. Calibrated traces and files
  // (where every recorded query brings one extra key).
  bool follow = false;
  double drift = 0;   // calibrated: share of topics of the extra keys that are new
  bool local = true;  // false: leave local_lse and local_out empty, which saves a scan per query
};

struct Trace {
  DType dtype = DType::kF16;
  uint32_t dim = 0, group = 0, keys = 0, extra_keys = 0, query_count = 0;
  std::vector<std::byte> k, v;  // [keys + extra_keys, dim]
  std::vector<float> queries;   // [query_count, group, dim], scaled by 1/sqrt(dim)
  std::vector<float> energy;    // [dim] mean square of 64 earlier groups' queries; empty: not known
  std::vector<float> history;   // [<= 32, group, dim] the last of those earlier queries
  std::vector<uint32_t> asked_after;  // [query_count] keys before each query; empty: `keys`
  // What sinks and window, which the worker holds, give each query head: empty when the trace has
  // none.
  std::vector<float> local_lse;  // [query_count, group]
  std::vector<float> local_out;  // [query_count, group, dim], their softmax-weighted mean value
  // Generators only, for the tests of their calibration: keys before RoPE, and how sharp queries
  // are.
  std::vector<float> keys_before_rope;  // [<= 2048, dim]
  double sharpness = 0;

  TokenRows Rows(uint32_t first, uint32_t count) const {
    const size_t at = size_t{first} * dim * DTypeBytes(dtype);
    return {dtype, dim, count, k.data() + at, v.data() + at};
  }
  const float* Query(uint32_t q) const { return queries.data() + size_t{q} * group * dim; }
};

// INVALID_ARGUMENT listing the names when there is no such trace, or naming what does not fit.
Result<Trace> MakeTrace(const TraceSpec& spec);

// Share of the mass that the `count` largest of the trace's own indexed logits hold, per query head
// (sinks and window excluded), averaged over the first `query_count` groups.
double TopMass(const Trace& trace, uint32_t count, uint32_t query_count);

// The parts of MakeTrace.
Result<Trace> MakeClusteredTrace(const TraceSpec& spec);
Result<Trace> MakeCalibratedTrace(const TraceSpec& spec, const std::string& head_class);
// `name`: PATH or PATH@L.H. Asks the last query_count recorded queries; earlier ones are history.
// The worker holds the first 16 tokens and the last 16 before the first asked query, with what came
// after; of the rest the last `keys` (and extra_keys, at most half) count. With `follow` each query
// has its own window of 16.
Result<Trace> LoadTrace(const TraceSpec& spec, const std::string& name);
// Mean squares over queries[rows, dim].
std::vector<float> EnergyOf(std::span<const float> queries, uint32_t dim);

}  // namespace icecache
