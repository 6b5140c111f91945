// Hot loops over rows of K and V: dot products, conversions, weighted sums. Free functions over spans
// and scalars, vectorised with Highway and dispatched at run time to the best instruction set.
//
// All are memory-bound at one core's read bandwidth (~10-15 GB/s from DRAM) for 16-bit and f32
// rows; feasibility.md section 8 has the measurement. Rows are contiguous [rows, dim]; dim is a
// multiple of 16. No alignment is required. Results do not depend on the instruction set beyond
// the rounding of f32 sums.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

namespace icecache {

// scores[q, r] = queries[q, dim] . rows[r, dim], written at scores[q * score_stride + r].
// group: 1..kGroupMax; a row is read once for the whole group.
void DotRows(const float* queries, uint32_t group, const std::byte* rows, DType dtype, uint32_t row_count,
             uint32_t dim, float* scores, size_t score_stride);

// out[q, dim] += sum over r of weights[q * weight_stride + r] * rows[r, dim].
void AddWeightedRows(const float* weights, size_t weight_stride, uint32_t group, const std::byte* rows,
                     DType dtype, uint32_t row_count, uint32_t dim, float* out);

// Bulk conversions of `count` elements.
void ToF32(const std::byte* from, DType dtype, size_t count, float* to);
void FromF32(const float* from, size_t count, DType dtype, std::byte* to);

// True when all `count` elements are finite.
bool AllFinite(const std::byte* from, DType dtype, size_t count);

// y = exp(x - max), returns the sum; x and y may be the same array. Relative error below 2e-6 for
// x - max in [-87, 0]; below that the result is 0.
float ExpShifted(const float* x, size_t count, float max, float* y);
float MaxOf(const float* x, size_t count);  // -inf when count == 0

}  // namespace icecache
