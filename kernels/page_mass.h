// Passes over the estimates of scanned pages, which lie in blocks of 16 slots: plain arithmetic
// that costs as much as the scan itself unless it is vectorised.
//
// blocks[count] are numbers of blocks in tables indexed by slot (block * 16 + lane); the other
// arrays are [count * 16] in the order of the scan. An empty slot has log_count -infinity. Cost: a
// few cycles per block and pass from the second-level cache.
#pragma once

#include <cstddef>
#include <cstdint>

namespace icecache {

// mass[i] = centre[i] + f(s) + log_count, s = rho * spread, f(s) = s^2 / 2 / (1 + 0.2 s): the log
// of the estimated mass of a page whose logits have mean centre[i] and standard deviation s. centre
// is limited to +-1e30 first. Returns the largest mass.
float EstimateLogMasses(const uint32_t* blocks, size_t count, const float* spread,
                        const float* log_count, float rho, float* centre, float* mass);

// centre[i] += f(rho * spread[i]) + shift, limited to 1e30; count is a multiple of 16.
void AddSpreadGains(const float* spread, size_t count, float rho, float shift, float* centre);

// top[i] = centre[i] + reach * spread + shift, -infinity in empty slots.
void EstimateTops(const uint32_t* blocks, size_t count, const float* spread, const float* log_count,
                  float reach, float shift, const float* centre, float* top);

// y[i] = max(y[i], factor * x[i]), without the old y when `first`; count is a multiple of 16.
void MaxScaled(const float* x, size_t count, float factor, bool first, float* y);
// y[i] += factor * x[i], likewise.
void AddScaled(const float* x, size_t count, float factor, bool first, float* y);

// sums[b] = sum of x[16 b .. 16 b + 15].
void SumBlocks(const float* x, size_t count, float* sums);
// y[b / depth * 16 + lane] = max over the blocks of a group of `depth` blocks, lane by lane.
void MaxOfBlockGroups(const float* x, size_t count, size_t depth, float* y);

}  // namespace icecache
