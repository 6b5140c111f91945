// Token sketches: of each token of a page, the deviation from the page's mean in a few dimensions,
// in 4 bits each: about an eighth of a deviation is lost, little next to the dimensions that are
// not sketched (docs/index.md).
//
// The block of a page holds 16 tokens as [dims / 8][16][4] bytes: byte i of four has dimension
// 8k + i in its low half and 8k + 4 + i in its high half, so that one load brings eight dimensions
// of all tokens, which two dpbusd multiply with the query. A code c stands for (2c - 15) scale.
//
// A token's logit is the page's centre (mean and what the sketch leaves out) plus the query's
// product with the deviation. Sums of exponentials over pages come first, for all pages; single
// tokens only of the few pages where they matter, from blocks that are then in the cache.
//
// Cost, group of 4, 32 dimensions, AVX-512: about 40 cycles a page, half of them exponentials; a
// page is 256 bytes, so that memory is the limit when blocks come from there.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/quantized.h"

namespace icecache {

inline constexpr int kSketchBits = 4;
constexpr size_t SketchBytes(uint32_t dims) { return size_t{dims} * kBlockRows * kSketchBits / 8; }

// Writes a block from deltas[count, dims] of `count` tokens, 16 at most; dims is a multiple of 8.
// Returns the scale, 0 when all deviations are next to nothing.
float PackSketch(const float* deltas, uint32_t count, uint32_t dims, uint8_t* block);

// One page: of the 16 lanes of its block the first `fill` are tokens, maybe none. A page without
// any costs nothing beside three like it.
struct SketchPage {
  const uint8_t* block;
  float scale;
  uint32_t fill;
};

// Exponents are cut here, so that sums stay finite. Below -87 the exponential is 0; between, its
// relative error is below 1e-5.
inline constexpr float kSketchExponentMax = 60.0f;

// sum[g * stride + i] = sum over the tokens of page i of exp(centre[g * stride + i] + q_g . token).
// Where no token of four pages in a row reaches exp(least[g]), their exponentials are not worth
// their time: then sum keeps what it held, but at most 16 exp(least[g]) a page. REQUIRES: queries
// of one digit.
void SumSketches(const QuantizedQueries& queries, const SketchPage* pages, uint32_t count,
                 const float* centre, const float* least, size_t stride, float* sum);

// All sums, and top[g * stride + i], the largest term of each.
void SumSketchesWithTops(const QuantizedQueries& queries, const SketchPage* pages, uint32_t count,
                         const float* centre, size_t stride, float* sum, float* top);

// The terms: weights[(g * stride + i) * 16 + lane], 0 beyond fill.
void ScoreSketches(const QuantizedQueries& queries, const SketchPage* pages, uint32_t count,
                   const float* centre, size_t stride, float* weights);

}  // namespace icecache
