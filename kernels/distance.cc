#include "kernels/distance.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "common/limits.h"
#include "common/status.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/distance.cc"
#include "hwy/foreach_target.h"  // compiles this file once per instruction set
#include "hwy/highway.h"
#include "kernels/four_lanes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace icecache {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using Tag = hn::ScalableTag<float>;
using Vec = hn::Vec<Tag>;

// Rows handled together: 16 rows of 256 f32 elements are 16 KiB, half of the smallest L1.
constexpr uint32_t kRowBlock = 16;

// One element type: how Lanes(Tag()) elements at p become a vector of floats.
struct F32Rows {
  using Element = float;
  HWY_ATTR static Vec Load(Tag d, const Element* p) { return hn::LoadU(d, p); }
};
struct F16Rows {
  using Element = hwy::float16_t;
  HWY_ATTR static Vec Load(Tag d, const Element* p) {
    return hn::PromoteTo(d, hn::LoadU(hn::Rebind<hwy::float16_t, Tag>(), p));
  }
};
struct BF16Rows {
  using Element = uint16_t;
  HWY_ATTR static Vec Load(Tag d, const Element* p) {
    const hn::Rebind<uint32_t, Tag> du;
    const auto bits = hn::PromoteTo(du, hn::LoadU(hn::Rebind<uint16_t, Tag>(), p));
    return hn::BitCast(d, hn::ShiftLeft<16>(bits));
  }
};

// 8 rows, 1 query: 8 accumulators hide the FMA latency.
template <class Rows>
HWY_INLINE void Dot8x1(const float* q, const typename Rows::Element* rows, uint32_t dim,
                       float* scores) {
  const Tag d;
  const size_t lanes = hn::Lanes(d);
  Vec s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0;
  for (size_t j = 0; j < dim; j += lanes) {
    const Vec x = hn::LoadU(d, q + j);
    const typename Rows::Element* p = rows + j;
    s0 = hn::MulAdd(x, Rows::Load(d, p), s0);
    s1 = hn::MulAdd(x, Rows::Load(d, p + dim), s1);
    s2 = hn::MulAdd(x, Rows::Load(d, p + 2 * size_t{dim}), s2);
    s3 = hn::MulAdd(x, Rows::Load(d, p + 3 * size_t{dim}), s3);
    s4 = hn::MulAdd(x, Rows::Load(d, p + 4 * size_t{dim}), s4);
    s5 = hn::MulAdd(x, Rows::Load(d, p + 5 * size_t{dim}), s5);
    s6 = hn::MulAdd(x, Rows::Load(d, p + 6 * size_t{dim}), s6);
    s7 = hn::MulAdd(x, Rows::Load(d, p + 7 * size_t{dim}), s7);
  }
  const hn::Full128<float> d4;
  hn::StoreU(FoldFour(d, LaneSum(), s0, s1, s2, s3), d4, scores);
  hn::StoreU(FoldFour(d, LaneSum(), s4, s5, s6, s7), d4, scores + 4);
}

// Queries that meet four rows at a time: their sums fill half of the registers.
constexpr uint32_t kTileQueries = HWY_MAX_BYTES >= 64 ? 4 : 2;

// 4 rows, kQueries queries: a converted row is used kQueries times. score_stride separates queries.
template <class Rows, uint32_t kQueries>
HWY_INLINE void DotTile(const float* q, const typename Rows::Element* rows, uint32_t dim,
                        float* scores, size_t score_stride) {
  const Tag d;
  const size_t lanes = hn::Lanes(d);
  Vec sum[kQueries][4];
  for (auto& of_query : sum)
    for (Vec& s : of_query) s = hn::Zero(d);
  for (size_t j = 0; j < dim; j += lanes) {
    Vec row[4];
    for (size_t r = 0; r < 4; ++r) row[r] = Rows::Load(d, rows + r * dim + j);
    for (size_t i = 0; i < kQueries; ++i) {
      const Vec x = hn::LoadU(d, q + i * dim + j);
      for (size_t r = 0; r < 4; ++r) sum[i][r] = hn::MulAdd(x, row[r], sum[i][r]);
    }
  }
  for (size_t i = 0; i < kQueries; ++i) {
    hn::StoreU(FoldFour(d, LaneSum(), sum[i][0], sum[i][1], sum[i][2], sum[i][3]),
               hn::Full128<float>(), scores + i * score_stride);
  }
}

// 4 rows, 1 query: what the other two leave over. Missing rows repeat the last one.
template <class Rows>
HWY_INLINE void Dot4x1(const float* q, const typename Rows::Element* rows, uint32_t row_count,
                       uint32_t dim, float* scores) {
  const Tag d;
  const size_t lanes = hn::Lanes(d);
  const typename Rows::Element* p[4];
  for (uint32_t i = 0; i < 4; ++i) p[i] = rows + size_t{HWY_MIN(i, row_count - 1)} * dim;
  Vec s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0;
  for (size_t j = 0; j < dim; j += lanes) {
    const Vec x = hn::LoadU(d, q + j);
    s0 = hn::MulAdd(x, Rows::Load(d, p[0] + j), s0);
    s1 = hn::MulAdd(x, Rows::Load(d, p[1] + j), s1);
    s2 = hn::MulAdd(x, Rows::Load(d, p[2] + j), s2);
    s3 = hn::MulAdd(x, Rows::Load(d, p[3] + j), s3);
  }
  HWY_ALIGN float out[4];
  hn::Store(FoldFour(d, LaneSum(), s0, s1, s2, s3), hn::Full128<float>(), out);
  for (uint32_t i = 0; i < HWY_MIN(4u, row_count); ++i) scores[i] = out[i];
}

template <class Rows>
HWY_INLINE void DotBlock(const float* queries, uint32_t group, const typename Rows::Element* rows,
                         uint32_t row_count, uint32_t dim, float* scores, size_t score_stride) {
  uint32_t q = 0;
  for (; q + kTileQueries <= group; q += kTileQueries) {
    const float* x = queries + size_t{q} * dim;
    float* s = scores + q * score_stride;
    uint32_t r = 0;
    for (; r + 4 <= row_count; r += 4)
      DotTile<Rows, kTileQueries>(x, rows + size_t{r} * dim, dim, s + r, score_stride);
    if (r < row_count)
      for (uint32_t i = 0; i < kTileQueries; ++i)
        Dot4x1<Rows>(x + size_t{i} * dim, rows + size_t{r} * dim, row_count - r, dim,
                     s + i * score_stride + r);
  }
  for (; q < group; ++q) {
    const float* x = queries + size_t{q} * dim;
    float* s = scores + q * score_stride;
    uint32_t r = 0;
    for (; r + 8 <= row_count; r += 8) Dot8x1<Rows>(x, rows + size_t{r} * dim, dim, s + r);
    for (; r < row_count; r += 4)
      Dot4x1<Rows>(x, rows + size_t{r} * dim, row_count - r, dim, s + r);
  }
}

template <class Rows>
HWY_INLINE void Convert(const typename Rows::Element* from, size_t count, float* to) {
  const Tag d;
  const size_t lanes = hn::Lanes(d);
  size_t i = 0;
  for (; i + lanes <= count; i += lanes) hn::StoreU(Rows::Load(d, from + i), d, to + i);
  if (i == count) return;
  HWY_ALIGN typename Rows::Element in[hn::MaxLanes(d)] = {};
  HWY_ALIGN float out[hn::MaxLanes(d)];
  for (size_t k = i; k < count; ++k) hwy::CopyBytes<sizeof(in[0])>(from + k, in + (k - i));
  hn::Store(Rows::Load(d, in), d, out);
  for (size_t k = i; k < count; ++k) to[k] = out[k - i];
}

template <class Rows>
HWY_INLINE void DotRowsOf(const float* queries, uint32_t group, const std::byte* bytes,
                          uint32_t row_count, uint32_t dim, float* scores, size_t score_stride) {
  const auto* rows = reinterpret_cast<const typename Rows::Element*>(bytes);
  // With many queries a row is converted once and then used from L1.
  const bool convert_first = group > 4 && sizeof(typename Rows::Element) < 4;
  HWY_ALIGN float block[size_t{kRowBlock} * limits::kHeadDimMax];
  for (uint32_t r = 0; r < row_count; r += kRowBlock) {
    const uint32_t n = HWY_MIN(kRowBlock, row_count - r);
    const typename Rows::Element* from = rows + size_t{r} * dim;
    if (convert_first && dim <= limits::kHeadDimMax) {
      Convert<Rows>(from, size_t{n} * dim, block);
      DotBlock<F32Rows>(queries, group, block, n, dim, scores + r, score_stride);
    } else {
      DotBlock<Rows>(queries, group, from, n, dim, scores + r, score_stride);
    }
  }
}

void DotRowsTarget(const float* queries, uint32_t group, const std::byte* rows, DType dtype,
                   uint32_t row_count, uint32_t dim, float* scores, size_t score_stride) {
  switch (dtype) {
    case DType::kF32:
      return DotRowsOf<F32Rows>(queries, group, rows, row_count, dim, scores, score_stride);
    case DType::kF16:
      return DotRowsOf<F16Rows>(queries, group, rows, row_count, dim, scores, score_stride);
    case DType::kBF16:
      return DotRowsOf<BF16Rows>(queries, group, rows, row_count, dim, scores, score_stride);
  }
}

// Columns [0, kVectors * lanes) of out for kQueries queries: the sums stay in registers over all
// rows.
template <class Rows, size_t kQueries, size_t kVectors>
HWY_INLINE void AddTile(const float* weights, size_t weight_stride,
                        const typename Rows::Element* rows, uint32_t row_count, uint32_t dim,
                        float* out) {
  const Tag d;
  const size_t lanes = hn::Lanes(d);
  Vec sum[kQueries][kVectors];
  for (size_t q = 0; q < kQueries; ++q)
    for (size_t c = 0; c < kVectors; ++c) sum[q][c] = hn::LoadU(d, out + q * dim + c * lanes);
  for (uint32_t r = 0; r < row_count; ++r) {
    const typename Rows::Element* p = rows + size_t{r} * dim;
    Vec row[kVectors];
    for (size_t c = 0; c < kVectors; ++c) row[c] = Rows::Load(d, p + c * lanes);
    for (size_t q = 0; q < kQueries; ++q) {
      const Vec w = hn::Set(d, weights[q * weight_stride + r]);
      for (size_t c = 0; c < kVectors; ++c) sum[q][c] = hn::MulAdd(w, row[c], sum[q][c]);
    }
  }
  for (size_t q = 0; q < kQueries; ++q)
    for (size_t c = 0; c < kVectors; ++c) hn::StoreU(sum[q][c], d, out + q * dim + c * lanes);
}

template <class Rows, size_t kQueries, size_t kVectors>
HWY_INLINE size_t AddColumns(size_t j, const float* weights, size_t weight_stride,
                             const typename Rows::Element* rows, uint32_t row_count, uint32_t dim,
                             float* out) {
  const size_t step = kVectors * hn::Lanes(Tag());
  for (; j + step <= dim; j += step)
    AddTile<Rows, kQueries, kVectors>(weights, weight_stride, rows + j, row_count, dim, out + j);
  return j;
}

template <class Rows>
HWY_INLINE void AddBlock(const float* weights, size_t weight_stride, uint32_t group,
                         const typename Rows::Element* rows, uint32_t row_count, uint32_t dim,
                         float* out) {
  uint32_t q = 0;
  for (; q + 4 <= group; q += 4) {
    const float* w = weights + q * weight_stride;
    float* o = out + size_t{q} * dim;
    const size_t j = AddColumns<Rows, 4, 2>(0, w, weight_stride, rows, row_count, dim, o);
    AddColumns<Rows, 4, 1>(j, w, weight_stride, rows, row_count, dim, o);
  }
  for (; q < group; ++q) {
    const float* w = weights + q * weight_stride;
    float* o = out + size_t{q} * dim;
    size_t j = AddColumns<Rows, 1, 8>(0, w, weight_stride, rows, row_count, dim, o);
    j = AddColumns<Rows, 1, 2>(j, w, weight_stride, rows, row_count, dim, o);
    AddColumns<Rows, 1, 1>(j, w, weight_stride, rows, row_count, dim, o);
  }
}

template <class Rows>
HWY_INLINE void AddRowsOf(const float* weights, size_t weight_stride, uint32_t group,
                          const std::byte* bytes, uint32_t row_count, uint32_t dim, float* out) {
  const auto* rows = reinterpret_cast<const typename Rows::Element*>(bytes);
  const bool convert_first = group > 4 && sizeof(typename Rows::Element) < 4;
  HWY_ALIGN float block[size_t{kRowBlock} * limits::kHeadDimMax];
  for (uint32_t r = 0; r < row_count; r += kRowBlock) {
    const uint32_t n = HWY_MIN(kRowBlock, row_count - r);
    const typename Rows::Element* from = rows + size_t{r} * dim;
    if (convert_first && dim <= limits::kHeadDimMax) {
      Convert<Rows>(from, size_t{n} * dim, block);
      AddBlock<F32Rows>(weights + r, weight_stride, group, block, n, dim, out);
    } else {
      AddBlock<Rows>(weights + r, weight_stride, group, from, n, dim, out);
    }
  }
}

void AddWeightedRowsTarget(const float* weights, size_t weight_stride, uint32_t group,
                           const std::byte* rows, DType dtype, uint32_t row_count, uint32_t dim,
                           float* out) {
  switch (dtype) {
    case DType::kF32:
      return AddRowsOf<F32Rows>(weights, weight_stride, group, rows, row_count, dim, out);
    case DType::kF16:
      return AddRowsOf<F16Rows>(weights, weight_stride, group, rows, row_count, dim, out);
    case DType::kBF16:
      return AddRowsOf<BF16Rows>(weights, weight_stride, group, rows, row_count, dim, out);
  }
}

void F16ToF32Target(const std::byte* from, size_t count, float* to) {
  Convert<F16Rows>(reinterpret_cast<const hwy::float16_t*>(from), count, to);
}

void BF16ToF32Target(const std::byte* from, size_t count, float* to) {
  Convert<BF16Rows>(reinterpret_cast<const uint16_t*>(from), count, to);
}

void F32ToF16Target(const float* from, size_t count, std::byte* to) {
  const Tag d;
  const hn::Rebind<hwy::float16_t, Tag> d16;
  const size_t lanes = hn::Lanes(d);
  size_t i = 0;
  for (; i + lanes <= count; i += lanes)
    hn::StoreU(hn::DemoteTo(d16, hn::LoadU(d, from + i)), d16,
               reinterpret_cast<hwy::float16_t*>(to) + i);
  if (i == count) return;
  HWY_ALIGN float in[hn::MaxLanes(d)] = {};
  HWY_ALIGN hwy::float16_t out[hn::MaxLanes(d)];
  std::memcpy(in, from + i, (count - i) * sizeof(float));
  hn::Store(hn::DemoteTo(d16, hn::Load(d, in)), d16, out);
  std::memcpy(to + 2 * i, out, 2 * (count - i));
}

// e^x for x <= 88: x = n ln2 + r, |r| <= ln2 / 2, degree-6 polynomial for e^r - 1 - r (Cephes'
// coefficients), 2^n through the exponent field. x < -87 gives 0, so 2^n is never denormal.
HWY_INLINE Vec ExpOf(Tag d, Vec x) {
  const hn::RebindToSigned<Tag> di;
  const auto alive = hn::Ge(x, hn::Set(d, -87.0f));
  const Vec y = hn::Min(hn::Max(x, hn::Set(d, -87.0f)), hn::Set(d, 88.0f));
  const Vec n = hn::Round(hn::Mul(y, hn::Set(d, 1.44269504088896341f)));
  Vec r = hn::NegMulAdd(n, hn::Set(d, 0.693359375f), y);
  r = hn::NegMulAdd(n, hn::Set(d, -2.12194440e-4f), r);
  Vec p = hn::Set(d, 1.9875691500e-4f);
  p = hn::MulAdd(p, r, hn::Set(d, 1.3981999507e-3f));
  p = hn::MulAdd(p, r, hn::Set(d, 8.3334519073e-3f));
  p = hn::MulAdd(p, r, hn::Set(d, 4.1665795894e-2f));
  p = hn::MulAdd(p, r, hn::Set(d, 1.6666665459e-1f));
  p = hn::MulAdd(p, r, hn::Set(d, 5.0000001201e-1f));
  p = hn::Add(hn::MulAdd(hn::Mul(p, r), r, r), hn::Set(d, 1.0f));
  const auto bits = hn::ShiftLeft<23>(hn::Add(hn::ConvertTo(di, n), hn::Set(di, 127)));
  return hn::IfThenElseZero(alive, hn::Mul(p, hn::BitCast(d, bits)));
}

float ExpShiftedTarget(const float* x, size_t count, float max, float* y) {
  const Tag d;
  const size_t lanes = hn::Lanes(d);
  const Vec shift = hn::Set(d, max);
  Vec sum = hn::Zero(d);
  size_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const Vec e = ExpOf(d, hn::Sub(hn::LoadU(d, x + i), shift));
    hn::StoreU(e, d, y + i);
    sum = hn::Add(sum, e);
  }
  if (i < count) {
    HWY_ALIGN float in[hn::MaxLanes(d)];
    HWY_ALIGN float out[hn::MaxLanes(d)];
    for (size_t k = 0; k < lanes; ++k)
      in[k] = i + k < count ? x[i + k] : -std::numeric_limits<float>::infinity();
    const Vec e = ExpOf(d, hn::Sub(hn::Load(d, in), shift));
    hn::Store(e, d, out);
    for (size_t k = 0; i + k < count; ++k) y[i + k] = out[k];
    sum = hn::Add(sum, e);
  }
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

float MaxOfTarget(const float* x, size_t count) {
  const Tag d;
  const size_t lanes = hn::Lanes(d);
  Vec best = hn::Set(d, -std::numeric_limits<float>::infinity());
  size_t i = 0;
  for (; i + lanes <= count; i += lanes) best = hn::Max(best, hn::LoadU(d, x + i));
  float max = hn::GetLane(hn::MaxOfLanes(d, best));
  for (; i < count; ++i) max = HWY_MAX(max, x[i]);
  return max;
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace icecache
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace icecache {
HWY_EXPORT(DotRowsTarget);
HWY_EXPORT(AddWeightedRowsTarget);
HWY_EXPORT(F16ToF32Target);
HWY_EXPORT(BF16ToF32Target);
HWY_EXPORT(F32ToF16Target);
HWY_EXPORT(ExpShiftedTarget);
HWY_EXPORT(MaxOfTarget);

void DotRows(const float* queries, uint32_t group, const std::byte* rows, DType dtype,
             uint32_t row_count, uint32_t dim, float* scores, size_t score_stride) {
  KV_CHECK(dim % 16 == 0);
  HWY_DYNAMIC_DISPATCH(DotRowsTarget)
  (queries, group, rows, dtype, row_count, dim, scores, score_stride);
}

void AddWeightedRows(const float* weights, size_t weight_stride, uint32_t group,
                     const std::byte* rows, DType dtype, uint32_t row_count, uint32_t dim,
                     float* out) {
  KV_CHECK(dim % 16 == 0);
  HWY_DYNAMIC_DISPATCH(AddWeightedRowsTarget)
  (weights, weight_stride, group, rows, dtype, row_count, dim, out);
}

void ToF32(const std::byte* from, DType dtype, size_t count, float* to) {
  if (dtype == DType::kF16) return HWY_DYNAMIC_DISPATCH(F16ToF32Target)(from, count, to);
  if (dtype == DType::kBF16) return HWY_DYNAMIC_DISPATCH(BF16ToF32Target)(from, count, to);
  if (count > 0) std::memcpy(to, from, count * sizeof(float));
}

void FromF32(const float* from, size_t count, DType dtype, std::byte* to) {
  if (dtype == DType::kF16) return HWY_DYNAMIC_DISPATCH(F32ToF16Target)(from, count, to);
  if (dtype == DType::kF32) {
    if (count > 0) std::memcpy(to, from, count * sizeof(float));
    return;
  }
  for (size_t i = 0; i < count; ++i) {  // F32ToBF16, here for the compiler to vectorise
    uint32_t u;
    std::memcpy(&u, from + i, 4);
    const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const auto bits = static_cast<uint16_t>(nan ? (u >> 16) | 0x40u : rounded);
    std::memcpy(to + 2 * i, &bits, 2);
  }
}

namespace {
// An all-ones exponent is NaN or infinity. The compiler vectorises this loop.
template <class Bits>
bool NoneHasExponent(const std::byte* from, size_t count, Bits exponent) {
  constexpr size_t kBlock = 4096;  // early exit without a branch per element
  for (size_t begin = 0; begin < count; begin += kBlock) {
    const size_t end = std::min(count, begin + kBlock);
    Bits bad = 0;
    for (size_t i = begin; i < end; ++i) {
      Bits bits;
      std::memcpy(&bits, from + i * sizeof(Bits), sizeof(Bits));
      bad |= static_cast<Bits>((bits & exponent) == exponent);
    }
    if (bad != 0) return false;
  }
  return true;
}
}  // namespace

bool AllFinite(const std::byte* from, DType dtype, size_t count) {
  switch (dtype) {
    case DType::kF32:
      return NoneHasExponent<uint32_t>(from, count, 0x7f800000u);
    case DType::kF16:
      return NoneHasExponent<uint16_t>(from, count, 0x7c00u);
    case DType::kBF16:
      return NoneHasExponent<uint16_t>(from, count, 0x7f80u);
  }
  return false;
}

float ExpShifted(const float* x, size_t count, float max, float* y) {
  return HWY_DYNAMIC_DISPATCH(ExpShiftedTarget)(x, count, max, y);
}

float MaxOf(const float* x, size_t count) { return HWY_DYNAMIC_DISPATCH(MaxOfTarget)(x, count); }

}  // namespace icecache
#endif  // HWY_ONCE
