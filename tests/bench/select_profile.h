// What a trace's keys, values and queries are like: the facts by which the index's defaults are
// chosen (docs/index.md, "Real heads"), and what looking at all of it costs.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "tests/bench/trace.h"

namespace icecache {

// Named numbers:
//   top256_mass         share of the indexed mass in the 256 best tokens, mean over heads: broad
//   heads
//                       have little
//   energy_top32        share of the logits' variance, E[q_j^2] var(k_j), in the 32 strongest
//                       dimensions: what a token sketch could see
//   page_energy_top32   the same of the variance inside content pages: what it does see
//   key_variance_L, value_variance_L
//                       share of the variance that is left inside pages of layout L (content,
//                       sequential, content_value); keys in the metric of the queries
// Cost: three builds.
using TraceProfile = std::vector<std::pair<std::string, double>>;
Result<TraceProfile> ProfileTrace(const Trace& trace, uint64_t seed);

// Scores of all keys for the whole group from f32 keys, no top-k: what every index has to beat.
// The thread's CPU time, median.
double ExactScanMicros(const Trace& trace);

}  // namespace icecache
