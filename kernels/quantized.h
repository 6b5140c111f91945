// Scans of int8 summaries: blocks of 16 rows interleaved by four dimensions.
//
// A block holds 16 rows (page means, or the tokens of one page) of `dim` signed bytes as
// [dim / 4][16][4], each byte stored as value + 128. One load then brings four dimensions of 16
// rows, which is what maddubs (AVX2) and dpbusd (VNNI) multiply with a broadcast query: a dot
// product of 16 rows needs no horizontal sum. Queries are split into signed digits of 7 bits, so
// that a pair of products fits 16 bits: two digits give 12-bit queries (page means), one gives 7
// bits (token sketches). Integer results are the same on every instruction set.
//
// Cost: 64 bytes of a block per dim quad; ~5 us per MiB and query digit from cache with AVX2.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace icecache {

inline constexpr uint32_t kBlockRows = 16;

// To nearest, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no bits for a fraction.
// Vectorises, which lrintf does not.
inline int32_t RoundToInt(float x) {
  constexpr float kShift = 12582912.0f;
  return static_cast<int32_t>((x + kShift) - kShift);
}

// Symmetric quantisation of row[dim] to int8 with scale max|x| / 127: q = round(x / scale). A row
// of zeros has scale 0. Returns the scale.
float QuantizeRow(const float* row, uint32_t dim, int8_t* q);

// Writes or reads row `lane` of a block.
void PackBlockRow(const int8_t* row, uint32_t dim, uint32_t lane, uint8_t* block);
void UnpackBlockRow(const uint8_t* block, uint32_t dim, uint32_t lane, int8_t* row);
// Fills lane with zeros (the byte 128).
void ClearBlockRow(uint32_t dim, uint32_t lane, uint8_t* block);

// Queries of a group as digits. Reusable: Assign keeps the memory.
class QuantizedQueries {
 public:
  // queries[group, dim]; digits: 1 or 2. A query with a non-finite element becomes zero.
  void Assign(const float* queries, uint32_t group, uint32_t dim, uint32_t digits);

  uint32_t group() const { return group_; }
  uint32_t dim() const { return dim_; }
  uint32_t digits() const { return digits_; }
  const int8_t* row(uint32_t head) const { return rows_.data() + size_t{head} * digits_ * dim_; }
  float step(uint32_t head) const { return step_[head]; }  // value of one integer unit
  int32_t sum(uint32_t head) const { return sum_[head]; }  // of the query's integers

 private:
  uint32_t group_ = 0, dim_ = 0, digits_ = 0;
  std::vector<int8_t> rows_;  // [group][digits][dim]: high digit, then low
  std::vector<float> step_;
  std::vector<int32_t> sum_;
};

// out[g * out_stride + 16 i + lane] = base[g] + q_g . row(lane of blocks[i]), for i in [0, count).
// scales[i][16] are the rows' scales.
void ScoreBlocks(const QuantizedQueries& queries, const uint8_t* const* blocks,
                 const float* const* scales, uint32_t count, const float* base, float* out,
                 size_t out_stride);

// out[g * dim + d] += sum over i of weights[g * stride + i] * rows[i][d]. dim is a multiple of 16.
void AddInt8Rows(const float* weights, size_t stride, uint32_t group, const int8_t* const* rows,
                 uint32_t count, uint32_t dim, float* out);

// Writes the indices i < count with x[i] >= bound to out, ascending, and returns how many there
// are. out has room for count + 16.
size_t IndicesAtLeast(const float* x, size_t count, float bound, uint32_t* out);

}  // namespace icecache
