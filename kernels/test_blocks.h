// Random int8 rows in blocks with the plain rows beside them: support of the tests of scans.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "kernels/quantized.h"

namespace icecache {

// Random rows in blocks, with the plain rows kept for reference.
struct Blocks {
  Blocks(uint32_t block_count, uint32_t dim, uint64_t seed)
      : rows(size_t{block_count} * kBlockRows * dim),
        bytes(rows.size()),
        scales(block_count * kBlockRows) {
    std::mt19937_64 rng(seed);
    for (int8_t& x : rows) x = static_cast<int8_t>(static_cast<int>(rng() % 255) - 127);
    for (float& s : scales) s = 0.001f * static_cast<float>(1 + rng() % 100);
    for (uint32_t b = 0; b < block_count; ++b) {
      blocks.push_back(bytes.data() + size_t{b} * kBlockRows * dim);
      scale_rows.push_back(scales.data() + size_t{b} * kBlockRows);
      for (uint32_t lane = 0; lane < kBlockRows; ++lane) {
        PackBlockRow(rows.data() + (size_t{b} * kBlockRows + lane) * dim, dim, lane,
                     bytes.data() + size_t{b} * kBlockRows * dim);
      }
    }
  }
  std::vector<int8_t> rows;
  std::vector<uint8_t> bytes;
  std::vector<float> scales;
  std::vector<const uint8_t*> blocks;
  std::vector<const float*> scale_rows;
};

// Integer dot product of head g's digits with a row: what every instruction set must give.
inline int64_t IntegerDot(const QuantizedQueries& q, uint32_t g, const int8_t* row) {
  int64_t sum = 0;
  for (uint32_t j = 0; j < q.dim(); ++j) {
    int64_t digit = q.row(g)[j];
    if (q.digits() == 2) digit = digit * 64 + q.row(g)[q.dim() + j];
    sum += digit * row[j];
  }
  return sum;
}

inline std::vector<float> RandomRows(size_t count, uint32_t dim, uint64_t seed) {
  std::mt19937_64 rng(seed);
  std::normal_distribution<float> normal;
  std::vector<float> rows(count * dim);
  for (float& x : rows) x = normal(rng);
  return rows;
}

}  // namespace icecache
