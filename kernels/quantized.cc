// HWY_WANT_AVX3_DL: Highway leaves the VNNI generation of AVX-512 out unless asked.
#define HWY_WANT_AVX3_DL
#include "kernels/quantized.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "common/limits.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/quantized.cc"
#include "hwy/cache_control.h"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "kernels/block_dot-inl.h"

HWY_BEFORE_NAMESPACE();
ICECACHE_WITH_VNNI
namespace icecache {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using Floats = hn::CappedTag<float, 16>;
using FloatVec = hn::Vec<Floats>;

// The kHeads heads from `head` on, kDigits rows each, against kBlocks blocks.
template <int kHeads, int kDigits, int kBlocks>
HWY_INLINE void ScoreTile(const QuantizedQueries& q, uint32_t head, const uint8_t* const* blocks,
                          const float* const* scales, const float* base, float* out,
                          size_t out_stride) {
  alignas(64) int32_t dots[kBlocks][kHeads * kDigits][kBlockRows];
  const Floats d;
  const hn::Rebind<int32_t, Floats> di;
  DotBlocks<8, kHeads * kDigits, kBlocks>(blocks, q.row(head), q.dim(), q.dim(), dots);
  for (int h = 0; h < kHeads; ++h) {
    const auto step = hn::Set(d, q.step(head + h));
    const auto shift = hn::Set(d, base[head + h]);
    const auto bias = hn::Set(di, 128 * q.sum(head + h));
    for (int b = 0; b < kBlocks; ++b) {
      float* to = out + (head + h) * out_stride + b * kBlockRows;
      for (size_t lane = 0; lane < kBlockRows; lane += hn::Lanes(d)) {
        auto sum = hn::LoadU(di, dots[b][h * kDigits] + lane);
        if constexpr (kDigits == 2) {
          sum = hn::Add(hn::ShiftLeft<6>(sum), hn::LoadU(di, dots[b][h * 2 + 1] + lane));
        }
        const auto dot = hn::Mul(hn::ConvertTo(d, hn::Sub(sum, bias)), step);
        hn::StoreU(hn::MulAdd(dot, hn::LoadU(d, scales[b] + lane), shift), d, to + lane);
      }
    }
  }
}

template <int kHeads, int kDigits>
void ScoreHeads(const QuantizedQueries& q, uint32_t head, const uint8_t* const* blocks,
                const float* const* scales, uint32_t count, const float* base, float* out,
                size_t out_stride) {
  constexpr int kTogether = kBlocksTogether<kHeads * kDigits>;
  uint32_t i = 0;
  for (; i + kTogether <= count; i += kTogether) {
    ScoreTile<kHeads, kDigits, kTogether>(q, head, blocks + i, scales + i, base,
                                          out + size_t{i} * kBlockRows, out_stride);
  }
  for (; i < count; ++i) {
    ScoreTile<kHeads, kDigits, 1>(q, head, blocks + i, scales + i, base,
                                  out + size_t{i} * kBlockRows, out_stride);
  }
}

template <int kDigits>
void ScoreAllHeads(const QuantizedQueries& q, const uint8_t* const* blocks,
                   const float* const* scales, uint32_t count, const float* base, float* out,
                   size_t out_stride) {
  uint32_t head = 0;
  for (; head + 4 <= q.group(); head += 4) {
    ScoreHeads<4, kDigits>(q, head, blocks, scales, count, base, out, out_stride);
  }
  for (; head + 2 <= q.group(); head += 2) {
    ScoreHeads<2, kDigits>(q, head, blocks, scales, count, base, out, out_stride);
  }
  if (head < q.group())
    ScoreHeads<1, kDigits>(q, head, blocks, scales, count, base, out, out_stride);
}

void ScoreBlocksImpl(const QuantizedQueries& q, const uint8_t* const* blocks,
                     const float* const* scales, uint32_t count, const float* base, float* out,
                     size_t out_stride) {
  if (q.digits() == 2) {
    ScoreAllHeads<2>(q, blocks, scales, count, base, out, out_stride);
  } else {
    ScoreAllHeads<1>(q, blocks, scales, count, base, out, out_stride);
  }
}

// kVecs vectors of dims of kHeads heads in registers while the rows stream by.
template <int kHeads, int kVecs>
HWY_INLINE uint32_t AddRowsHeads(uint32_t j, const float* weights, size_t stride,
                                 const int8_t* const* rows, uint32_t count, uint32_t dim,
                                 float* out) {
  const Floats d;
  const hn::Rebind<int8_t, Floats> d8;
  const hn::Rebind<int32_t, Floats> d32;
  const auto lanes = static_cast<uint32_t>(hn::Lanes(d));
  for (; j + kVecs * lanes <= dim; j += kVecs * lanes) {
    FloatVec acc[kHeads][kVecs];
    for (int h = 0; h < kHeads; ++h)
      for (int v = 0; v < kVecs; ++v)
        acc[h][v] = hn::LoadU(d, out + size_t{dim} * h + j + v * lanes);
    for (uint32_t i = 0; i < count; ++i) {
      FloatVec x[kVecs];
      for (int v = 0; v < kVecs; ++v)
        x[v] = hn::ConvertTo(d, hn::PromoteTo(d32, hn::LoadU(d8, rows[i] + j + v * lanes)));
      for (int h = 0; h < kHeads; ++h) {
        const auto w = hn::Set(d, weights[h * stride + i]);
        for (int v = 0; v < kVecs; ++v) acc[h][v] = hn::MulAdd(w, x[v], acc[h][v]);
      }
    }
    for (int h = 0; h < kHeads; ++h)
      for (int v = 0; v < kVecs; ++v)
        hn::StoreU(acc[h][v], d, out + size_t{dim} * h + j + v * lanes);
  }
  return j;
}

void AddInt8RowsImpl(const float* weights, size_t stride, uint32_t group, const int8_t* const* rows,
                     uint32_t count, uint32_t dim, float* out) {
  constexpr uint32_t kTile = 64;
  for (uint32_t first = 0; first < count; first += kTile) {
    const uint32_t n = std::min(kTile, count - first);
    const int8_t* const* tile = rows + first;
    uint32_t head = 0;
    for (; head + 4 <= group; head += 4) {
      const float* w = weights + head * stride + first;
      float* to = out + size_t{head} * dim;
      AddRowsHeads<4, 1>(AddRowsHeads<4, 2>(0, w, stride, tile, n, dim, to), w, stride, tile, n,
                         dim, to);
    }
    for (; head < group; ++head) {
      const float* w = weights + head * stride + first;
      float* to = out + size_t{head} * dim;
      AddRowsHeads<1, 1>(AddRowsHeads<1, 4>(0, w, stride, tile, n, dim, to), w, stride, tile, n,
                         dim, to);
    }
  }
}

size_t IndicesAtLeastImpl(const float* x, size_t count, float bound, uint32_t* out) {
  const Floats d;
  const hn::Rebind<uint32_t, Floats> du;
  const size_t lanes = hn::Lanes(d);
  const auto limit = hn::Set(d, bound);
  const auto step = hn::Set(du, static_cast<uint32_t>(lanes));
  auto index = hn::Iota(du, 0);  // counted up: made anew, GCC would build it lane by lane
  size_t found = 0, i = 0;
  for (; i + lanes <= count; i += lanes) {
    // No branch, which would be foretold wrongly half of the time; and to a register and then to
    // memory: compressing into memory is microcode on some CPUs.
    const auto mask = hn::RebindMask(du, hn::Ge(hn::LoadU(d, x + i), limit));
    hn::StoreU(hn::Compress(index, mask), du, out + found);
    index = hn::Add(index, step);
    found += hn::CountTrue(du, mask);
  }
  for (; i < count; ++i) {
    if (x[i] >= bound) out[found++] = static_cast<uint32_t>(i);
  }
  return found;
}

float QuantizeRowImpl(const float* row, uint32_t dim, int8_t* q) {
  const Floats d;
  const hn::Rebind<int8_t, Floats> d8;
  auto top = hn::Zero(d);
  for (uint32_t j = 0; j < dim; j += static_cast<uint32_t>(hn::Lanes(d))) {
    top = hn::Max(top, hn::Abs(hn::LoadU(d, row + j)));
  }
  const float scale = hn::GetLane(hn::MaxOfLanes(d, top)) / 127.0f;
  const auto inverse = hn::Set(d, scale > 1e-30f ? 1.0f / scale : 0.0f);
  for (uint32_t j = 0; j < dim; j += static_cast<uint32_t>(hn::Lanes(d))) {
    const auto i = hn::NearestInt(hn::Mul(hn::LoadU(d, row + j), inverse));
    hn::StoreU(hn::DemoteTo(d8, i), d8, q + j);
  }
  return scale > 1e-30f ? scale : 0.0f;
}

}  // namespace HWY_NAMESPACE
}  // namespace icecache
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace icecache {

HWY_EXPORT(ScoreBlocksImpl);
HWY_EXPORT(AddInt8RowsImpl);
HWY_EXPORT(QuantizeRowImpl);
HWY_EXPORT(IndicesAtLeastImpl);

float QuantizeRow(const float* row, uint32_t dim, int8_t* q) {
  return HWY_DYNAMIC_DISPATCH(QuantizeRowImpl)(row, dim, q);
}

void PackBlockRow(const int8_t* row, uint32_t dim, uint32_t lane, uint8_t* block) {
  for (uint32_t j = 0; j < dim; j += 4) {
    uint32_t quad;
    std::memcpy(&quad, row + j, 4);
    quad ^= 0x80808080u;  // two's complement + 128
    std::memcpy(block + (size_t{j} * kBlockRows) + lane * 4, &quad, 4);
  }
}

void UnpackBlockRow(const uint8_t* block, uint32_t dim, uint32_t lane, int8_t* row) {
  for (uint32_t j = 0; j < dim; j += 4) {
    uint32_t quad;
    std::memcpy(&quad, block + (size_t{j} * kBlockRows) + lane * 4, 4);
    quad ^= 0x80808080u;
    std::memcpy(row + j, &quad, 4);
  }
}

void ClearBlockRow(uint32_t dim, uint32_t lane, uint8_t* block) {
  for (uint32_t j = 0; j < dim; j += 4)
    std::memset(block + (size_t{j} * kBlockRows) + lane * 4, 128, 4);
}

void QuantizedQueries::Assign(const float* queries, uint32_t group, uint32_t dim, uint32_t digits) {
  group_ = group;
  dim_ = dim;
  digits_ = digits;
  rows_.resize(size_t{group} * digits * dim);
  step_.resize(group);
  sum_.resize(group);
  // High digits stay in [-63, 63]: 2 * 255 * 63 fits the 16 bits of maddubs. Low digits are in
  // [-32, 31].
  const int32_t range = digits == 2 ? 63 * 64 + 31 : 63;
  for (uint32_t g = 0; g < group; ++g) {
    const float* q = queries + size_t{g} * dim;
    uint32_t top_bits = 0;  // of |q|: integers order like floats that are not negative
    for (uint32_t j = 0; j < dim; ++j) {
      top_bits = std::max(top_bits, std::bit_cast<uint32_t>(q[j]) & 0x7fffffffu);
    }
    const bool finite = top_bits < 0x7f800000u;
    const auto top = std::bit_cast<float>(top_bits);
    const float inverse = finite && top > 1e-30f ? static_cast<float>(range) / top : 0.0f;
    step_[g] = inverse > 0 ? top / static_cast<float>(range) : 0.0f;
    int32_t sum = 0;
    if (inverse == 0) {
      std::fill_n(rows_.data() + size_t{g} * digits * dim, size_t{digits} * dim, int8_t{0});
      sum_[g] = 0;
      continue;
    }
    int8_t* high = rows_.data() + size_t{g} * digits * dim;
    for (uint32_t j = 0; j < dim; ++j) {
      const int32_t x = RoundToInt(q[j] * inverse);
      sum += x;
      if (digits == 2) {
        const int32_t top_digit = (x + 32) >> 6;
        high[j] = static_cast<int8_t>(top_digit);
        high[dim + j] = static_cast<int8_t>(x - top_digit * 64);
      } else {
        high[j] = static_cast<int8_t>(x);
      }
    }
    sum_[g] = sum;
  }
}

void ScoreBlocks(const QuantizedQueries& queries, const uint8_t* const* blocks,
                 const float* const* scales, uint32_t count, const float* base, float* out,
                 size_t out_stride) {
  HWY_DYNAMIC_DISPATCH(ScoreBlocksImpl)(queries, blocks, scales, count, base, out, out_stride);
}

void AddInt8Rows(const float* weights, size_t stride, uint32_t group, const int8_t* const* rows,
                 uint32_t count, uint32_t dim, float* out) {
  HWY_DYNAMIC_DISPATCH(AddInt8RowsImpl)(weights, stride, group, rows, count, dim, out);
}

size_t IndicesAtLeast(const float* x, size_t count, float bound, uint32_t* out) {
  return HWY_DYNAMIC_DISPATCH(IndicesAtLeastImpl)(x, count, bound, out);
}

}  // namespace icecache
#endif  // HWY_ONCE
