// HWY_WANT_AVX3_DL: Highway leaves the VNNI generation of AVX-512 out unless asked.
#define HWY_WANT_AVX3_DL
#include "kernels/sketch.h"

#include <algorithm>
#include <cmath>

#include "common/limits.h"
#include "common/status.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/sketch.cc"
#include "hwy/cache_control.h"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "kernels/block_dot-inl.h"
#include "kernels/four_lanes-inl.h"

HWY_BEFORE_NAMESPACE();
ICECACHE_WITH_VNNI
namespace icecache {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using Floats = hn::CappedTag<float, 16>;
using FloatVec = hn::Vec<Floats>;

constexpr float kLog2E = 1.44269504f;
constexpr int kPagesTogether = 4;  // what FoldFour reduces at once
constexpr size_t kLanes = hn::MaxLanes(Floats());
constexpr size_t kParts = kBlockRows / kLanes;
constexpr uint32_t kPagesForeseen = 16;  // fetched ahead: memory answers after some 500 cycles

// What is wanted of a page.
enum class Want { kSum, kSumAndTop, kWeights };

// Coefficients of a polynomial for 2^r: minimax, relative error 2.6e-6 over an interval of
// length 1.
HWY_INLINE FloatVec Polynomial(FloatVec r) {
  const Floats d;
  auto p = hn::Set(d, 9.570101908e-3f);
  p = hn::MulAdd(p, r, hn::Set(d, 5.591786032e-2f));
  p = hn::MulAdd(p, r, hn::Set(d, 2.402474483e-1f));
  p = hn::MulAdd(p, r, hn::Set(d, 6.931218147e-1f));
  return hn::MulAdd(p, r, hn::Set(d, 9.999992614e-1f));
}

// 2^x, x cut at 60 log2 e; below -126 as good as 0. 2^n times a polynomial of the rest.
HWY_INLINE FloatVec Exp2(FloatVec x) {
  const Floats d;
  x = hn::Min(x, hn::Set(d, kSketchExponentMax * kLog2E));
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
  const FloatVec n{_mm512_roundscale_ps(x.raw, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  return FloatVec{_mm512_scalef_ps(Polynomial(hn::Sub(x, n)).raw, n.raw)};
#else
  // Adding 1.5 * 2^23 leaves n in the low bits, from where it is shifted into the exponent.
  const hn::Rebind<int32_t, Floats> di;
  const auto shift = hn::Set(d, 12582912.0f);
  const auto alive = hn::Ge(x, hn::Set(d, -126.0f));
  const auto n = hn::Add(x, shift);
  const auto p = Polynomial(hn::Sub(x, hn::Sub(n, shift)));
  const auto bits = hn::Add(hn::BitCast(di, p), hn::ShiftLeft<23>(hn::BitCast(di, n)));
  return hn::IfThenElseZero(alive, hn::BitCast(d, bits));
#endif
}

// dots[page][head][lane] of four pages, as many at a time as registers allow.
template <int kHeads>
HWY_INLINE void DotFourPages(const QuantizedQueries& q, uint32_t head, const SketchPage* pages,
                             int32_t (*dots)[kHeads][kBlockRows]) {
  constexpr int kBlocks = std::min(kPagesTogether, kBlocksTogether<kHeads>);
  for (int p = 0; p < kPagesTogether; p += kBlocks) {
    const uint8_t* blocks[kBlocks];
    for (int b = 0; b < kBlocks; ++b) blocks[b] = pages[p + b].block;
    DotBlocks<kSketchBits, kHeads, kBlocks>(blocks, q.row(head), q.dim(), q.dim(), dots + p);
  }
}

using FourVecs = FloatVec[kParts][kPagesTogether];

HWY_INLINE bool AllBelow(const FourVecs& x, float least) {
  const Floats d;
  auto top = hn::Max(hn::Max(x[0][0], x[0][1]), hn::Max(x[0][2], x[0][3]));
  for (size_t part = 1; part < kParts; ++part) {
    for (const FloatVec& v : x[part]) top = hn::Max(top, v);
  }
  return hn::AllFalse(d, hn::Ge(top, hn::Set(d, least)));
}

template <class Op>
HWY_INLINE hn::Vec<hn::Full128<float>> FoldParts(Op op, const FourVecs& x) {
  FloatVec all[kPagesTogether] = {x[0][0], x[0][1], x[0][2], x[0][3]};
  for (size_t part = 1; part < kParts; ++part) {
    for (int p = 0; p < kPagesTogether; ++p) all[p] = op(all[p], x[part][p]);
  }
  return FoldFour(Floats(), op, all[0], all[1], all[2], all[3]);
}

// kHeads heads from `head` on and four pages; centre, out and top point at the first page of head
// 0.
template <int kHeads, Want kWant>
HWY_INLINE void FourPages(const QuantizedQueries& q, uint32_t head, const SketchPage* pages,
                          const float* centre, const float* least, size_t stride, float* out,
                          float* top) {
  alignas(64) int32_t dots[kPagesTogether][kHeads][kBlockRows];
  const Floats d;
  const hn::Rebind<int32_t, Floats> di;
  const hn::Full128<float> d4;
  hn::Mask<Floats> valid[kPagesTogether][kParts];
  for (int p = 0; p < kPagesTogether; ++p) {
    for (size_t part = 0; part < kParts; ++part) {
      const size_t from = std::min<size_t>(pages[p].fill, part * kLanes);
      valid[p][part] = hn::FirstN(d, pages[p].fill - from);
    }
  }
  alignas(16)
      const float page_scale[] = {pages[0].scale, pages[1].scale, pages[2].scale, pages[3].scale};
  const auto scales = hn::Load(d4, page_scale);
  DotFourPages<kHeads>(q, head, pages, dots);
  for (int h = 0; h < kHeads; ++h) {
    const size_t row = (head + h) * stride;
    const auto bias = hn::Set(di, -15 * q.sum(head + h));  // a code c is 2c - 15
    alignas(16) float scale[kPagesTogether], shift[kPagesTogether];
    const auto step = hn::Set(d4, q.step(head + h) * kLog2E);
    hn::Store(hn::Mul(step, scales), d4, scale);
    hn::Store(hn::Mul(hn::LoadU(d4, centre + row), hn::Set(d4, kLog2E)), d4, shift);
    FloatVec x[kParts][kPagesTogether];  // log2 of the weights
    for (int p = 0; p < kPagesTogether; ++p) {
      for (size_t part = 0; part < kParts; ++part) {
        const auto code_dot = hn::Load(di, dots[p][h] + part * kLanes);
        const auto dot = hn::Add(hn::Add(code_dot, code_dot), bias);
        x[part][p] = hn::MulAdd(hn::ConvertTo(d, dot), hn::Set(d, scale[p]), hn::Set(d, shift[p]));
      }
    }
    if (kWant == Want::kSum && AllBelow(x, least[head + h])) {
      const auto most = hn::Set(d4, kBlockRows * std::exp2(least[head + h]));
      hn::StoreU(hn::Min(hn::LoadU(d4, out + row), most), d4, out + row);
      continue;
    }
    for (int p = 0; p < kPagesTogether; ++p) {
      for (size_t part = 0; part < kParts; ++part) {
        x[part][p] = hn::IfThenElseZero(valid[p][part], Exp2(x[part][p]));
        if constexpr (kWant == Want::kWeights)
          hn::StoreU(x[part][p], d, out + (row + p) * kBlockRows + part * kLanes);
      }
    }
    if constexpr (kWant != Want::kWeights) hn::StoreU(FoldParts(LaneSum(), x), d4, out + row);
    if constexpr (kWant == Want::kSumAndTop) hn::StoreU(FoldParts(LaneMax(), x), d4, top + row);
  }
}

template <Want kWant>
void FourPagesAllHeads(const QuantizedQueries& q, const SketchPage* pages, const float* centre,
                       const float* least, size_t stride, float* out, float* top) {
  uint32_t head = 0;
  for (; head + 4 <= q.group(); head += 4) {
    FourPages<4, kWant>(q, head, pages, centre, least, stride, out, top);
  }
  for (; head + 2 <= q.group(); head += 2) {
    FourPages<2, kWant>(q, head, pages, centre, least, stride, out, top);
  }
  if (head < q.group()) FourPages<1, kWant>(q, head, pages, centre, least, stride, out, top);
}

// What four pages without a token come to.
template <Want kWant>
void NoPages(uint32_t group, size_t stride, float* out, float* top) {
  constexpr size_t kWidth = kWant == Want::kWeights ? kBlockRows : 1;
  for (uint32_t g = 0; g < group; ++g) {
    std::fill_n(out + g * stride * kWidth, kPagesTogether * kWidth, 0.0f);
    if (kWant == Want::kSumAndTop) std::fill_n(top + g * stride, kPagesTogether, 0.0f);
  }
}

// The last pages, fewer than four: made four by repeating one, and only theirs are kept.
template <Want kWant>
void FewPages(const QuantizedQueries& q, const SketchPage* pages, uint32_t count,
              const float* centre, const float* least, size_t stride, float* out, float* top) {
  constexpr size_t kWidth = kWant == Want::kWeights ? kBlockRows : 1;
  SketchPage four[kPagesTogether];
  float centres[limits::kGroupMax * kPagesTogether], tops[limits::kGroupMax * kPagesTogether];
  float outs[limits::kGroupMax * kPagesTogether * kWidth];
  for (uint32_t p = 0; p < kPagesTogether; ++p) {
    const uint32_t from = std::min(p, count - 1);
    four[p] = pages[from];
    for (uint32_t g = 0; g < q.group(); ++g) {
      centres[g * kPagesTogether + p] = centre[g * stride + from];
      if (kWant == Want::kSum) outs[g * kPagesTogether + p] = out[g * stride + from];
    }
  }
  FourPagesAllHeads<kWant>(q, four, centres, least, kPagesTogether, outs, tops);
  for (uint32_t g = 0; g < q.group(); ++g) {
    const size_t from = size_t{g} * kPagesTogether;
    std::copy_n(outs + from * kWidth, count * kWidth, out + g * stride * kWidth);
    if (kWant == Want::kSumAndTop) std::copy_n(tops + from, count, top + g * stride);
  }
}

template <Want kWant>
void AllPages(const QuantizedQueries& q, const SketchPage* pages, uint32_t count,
              const float* centre, const float* least, size_t stride, float* out, float* top) {
  constexpr size_t kWidth = kWant == Want::kWeights ? kBlockRows : 1;
  const size_t block_bytes = SketchBytes(q.dim());
  uint32_t i = 0;
  for (; i + kPagesTogether <= count; i += kPagesTogether) {
    for (uint32_t ahead = i + kPagesForeseen;
         ahead < std::min(count, i + kPagesForeseen + kPagesTogether); ++ahead) {
      for (size_t line = 0; line < block_bytes; line += 64)
        hwy::Prefetch(pages[ahead].block + line);
    }
    float* tops = top == nullptr ? nullptr : top + i;
    if ((pages[i].fill | pages[i + 1].fill | pages[i + 2].fill | pages[i + 3].fill) == 0) {
      NoPages<kWant>(q.group(), stride, out + i * kWidth, tops);
    } else {
      FourPagesAllHeads<kWant>(q, pages + i, centre + i, least, stride, out + i * kWidth, tops);
    }
  }
  if (i < count) {
    FewPages<kWant>(q, pages + i, count - i, centre + i, least, stride, out + i * kWidth,
                    top == nullptr ? nullptr : top + i);
  }
}

void SumSketchesImpl(const QuantizedQueries& q, const SketchPage* pages, uint32_t count,
                     const float* centre, const float* least, size_t stride, float* sum) {
  float least2[limits::kGroupMax];
  for (uint32_t g = 0; g < q.group(); ++g) least2[g] = least[g] * kLog2E;
  AllPages<Want::kSum>(q, pages, count, centre, least2, stride, sum, nullptr);
}

void SumSketchesWithTopsImpl(const QuantizedQueries& q, const SketchPage* pages, uint32_t count,
                             const float* centre, size_t stride, float* sum, float* top) {
  AllPages<Want::kSumAndTop>(q, pages, count, centre, nullptr, stride, sum, top);
}

void ScoreSketchesImpl(const QuantizedQueries& q, const SketchPage* pages, uint32_t count,
                       const float* centre, size_t stride, float* weights) {
  AllPages<Want::kWeights>(q, pages, count, centre, nullptr, stride, weights, nullptr);
}

}  // namespace HWY_NAMESPACE
}  // namespace icecache
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace icecache {

float PackSketch(const float* deltas, uint32_t count, uint32_t dims, uint8_t* block) {
  float top = 0;
  for (size_t i = 0; i < size_t{count} * dims; ++i) top = std::max(top, std::fabs(deltas[i]));
  const float scale = top / (1 << kSketchBits);
  const float inverse = scale > 1e-30f ? 0.5f / scale : 0.0f;
  std::fill_n(block, SketchBytes(dims), uint8_t{0});
  for (uint32_t t = 0; t < count; ++t) {
    const float* delta = deltas + size_t{t} * dims;
    for (uint32_t j = 0; j < dims; ++j) {
      const auto code = static_cast<uint32_t>(delta[j] * inverse + 8.0f);  // in [0, 16]
      block[j / 8 * kBlockRows * 4 + t * 4 + j % 4] |=
          static_cast<uint8_t>(std::min(code, 15u) << (j / 4 % 2 * kSketchBits));
    }
  }
  return inverse > 0 ? scale : 0.0f;
}

HWY_EXPORT(SumSketchesImpl);
HWY_EXPORT(SumSketchesWithTopsImpl);
HWY_EXPORT(ScoreSketchesImpl);

void SumSketches(const QuantizedQueries& queries, const SketchPage* pages, uint32_t count,
                 const float* centre, const float* least, size_t stride, float* sum) {
  KV_CHECK(queries.digits() == 1 && queries.group() <= limits::kGroupMax);
  HWY_DYNAMIC_DISPATCH(SumSketchesImpl)(queries, pages, count, centre, least, stride, sum);
}

void SumSketchesWithTops(const QuantizedQueries& queries, const SketchPage* pages, uint32_t count,
                         const float* centre, size_t stride, float* sum, float* top) {
  KV_CHECK(queries.digits() == 1 && queries.group() <= limits::kGroupMax);
  HWY_DYNAMIC_DISPATCH(SumSketchesWithTopsImpl)(queries, pages, count, centre, stride, sum, top);
}

void ScoreSketches(const QuantizedQueries& queries, const SketchPage* pages, uint32_t count,
                   const float* centre, size_t stride, float* weights) {
  KV_CHECK(queries.digits() == 1 && queries.group() <= limits::kGroupMax);
  HWY_DYNAMIC_DISPATCH(ScoreSketchesImpl)(queries, pages, count, centre, stride, weights);
}

}  // namespace icecache
#endif  // HWY_ONCE
