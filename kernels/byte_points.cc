// HWY_WANT_AVX3_DL: Highway leaves the VNNI generation of AVX-512 out unless asked.
#define HWY_WANT_AVX3_DL
#include "kernels/byte_points.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "kernels/quantized.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/byte_points.cc"
#include "hwy/cache_control.h"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "kernels/block_dot-inl.h"

#ifndef ICECACHE_KERNELS_BYTE_POINTS_ONCE
#define ICECACHE_KERNELS_BYTE_POINTS_ONCE
namespace icecache {
inline constexpr uint32_t kPanel = BytePanels::kColumns;
}  // namespace icecache
#endif

HWY_BEFORE_NAMESPACE();
ICECACHE_WITH_VNNI
namespace icecache {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using Floats = hn::CappedTag<float, kPanel>;
using Ints = hn::Rebind<int32_t, Floats>;
using FloatVec = hn::Vec<Floats>;
constexpr size_t kLanes = HWY_MIN(static_cast<size_t>(kPanel), HWY_MAX_BYTES / sizeof(float));
constexpr int kVecs = static_cast<int>(kPanel / kLanes);
// What meets in registers: with AVX-512, 8 points x 32 columns are half of them and hide the
// latency of dpbusd; AVX2 has 16, of which the products take three.
constexpr uint32_t kTile = HWY_MAX_BYTES >= 64 ? 8 : 4;
constexpr int kPanelTile = HWY_MAX_BYTES >= 64 ? 2 : 1;

// The next tile's points, which lie anywhere when ids choose them.
HWY_INLINE void PrefetchPoints(const BytePoints& points, size_t begin, size_t end) {
  for (size_t r = begin; r < end; ++r) {
    const uint8_t* x = points.row(r);
    for (uint32_t j = 0; j < points.dim; j += 64) hwy::Prefetch(x + j);
  }
}

// Products of kRows points with the columns of kPanels panels from `panel` on.
template <int kRows, int kPanels>
HWY_INLINE void DotPanels(const BytePanels& panels, uint32_t panel, const uint8_t* const* rows,
                          hn::Vec<Ints> (*acc)[kPanels * kVecs]) {
  const Ints di;
  constexpr int kAll = kPanels * kVecs;
  for (int v = 0; v < kAll; ++v) {
    const auto start = hn::LoadU(di, panels.columns(panel + v / kVecs).start + v % kVecs * kLanes);
    for (int r = 0; r < kRows; ++r) acc[r][v] = start;
  }
#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
  const hn::ScalableTag<int8_t> d8;
  const int8_t* from[kPanels];
  for (int p = 0; p < kPanels; ++p) from[p] = panels.panel(panel + p);
  // Four steps at a time: between two, GCC copies all sums to other registers and back.
  for (uint32_t base = 0; base < panels.dim(); base += 16) {
    for (uint32_t j = base; j < base + 16; j += 4) {
      IntVec c[kAll];
      for (int v = 0; v < kAll; ++v) {
        const size_t at = size_t{j} * kPanel + v % kVecs * kLanes * 4;
        c[v] = hn::BitCast(di, hn::LoadU(d8, from[v / kVecs] + at));
      }
      // Points outermost: one broadcast lives at a time, so that sums keep their registers.
      for (int r = 0; r < kRows; ++r) {
        const IntVec x = BroadcastQuad(reinterpret_cast<const int8_t*>(rows[r] + j));
        for (int v = 0; v < kAll; ++v) acc[r][v] = Dot4(acc[r][v], x, c[v]);
      }
    }
  }
#else
  for (int v = 0; v < kAll; ++v) {
    const int8_t* c = panels.panel(panel + v / kVecs) + v % kVecs * kLanes * 4;
    for (int r = 0; r < kRows; ++r) {
      int32_t sums[kLanes] = {};
      for (uint32_t j = 0; j < panels.dim(); ++j) {
        const int8_t* at = c + j / 4 * kPanel * 4 + j % 4;
        for (size_t lane = 0; lane < kLanes; ++lane) sums[lane] += rows[r][j] * at[lane * 4];
      }
      acc[r][v] = hn::Add(acc[r][v], hn::LoadU(di, sums));
    }
  }
#endif
}

// The largest score so far of each of some points, lane by lane, and its column.
template <int kRows>
struct Best {
  FloatVec top[kRows];
  hn::Vec<Ints> where[kRows];
};

// Hands take(row, column, scores) the scores of kRows points with kPanels panels.
template <int kRows, int kPanels, typename Take>
HWY_INLINE void ScorePanels(const BytePanels& panels, uint32_t panel, const uint8_t* const* rows,
                            const float* scales, const Take& take) {
  const Floats d;
  hn::Vec<Ints> acc[kRows][kPanels * kVecs];
  DotPanels<kRows, kPanels>(panels, panel, rows, acc);
  for (int v = 0; v < kPanels * kVecs; ++v) {
    const BytePanels::Columns& columns = panels.columns(panel + v / kVecs);
    const size_t at = v % kVecs * kLanes;
    const auto scale = hn::LoadU(d, columns.scale + at), bias = hn::LoadU(d, columns.bias + at);
    for (int r = 0; r < kRows; ++r) {
      const auto unit = hn::Mul(scale, hn::Set(d, scales[r]));
      take(r, (panel + v / kVecs) * kPanel + static_cast<uint32_t>(at),
           hn::MulAdd(hn::ConvertTo(d, acc[r][v]), unit, bias));
    }
  }
}

// The same for all panels.
template <int kRows, typename Take>
HWY_INLINE void ScoreAll(const BytePanels& panels, const uint8_t* const* rows, const float* scales,
                         const Take& take) {
  uint32_t panel = 0;
  for (; panel + kPanelTile <= panels.panel_count(); panel += kPanelTile)
    ScorePanels<kRows, kPanelTile>(panels, panel, rows, scales, take);
  for (; panel < panels.panel_count(); ++panel)
    ScorePanels<kRows, 1>(panels, panel, rows, scales, take);
}

// visit(kRows, first, rows, scales) for tiles of points, the last ones alone.
template <typename Visit>
HWY_INLINE void VisitTiles(const BytePoints& points, size_t count, const Visit& visit) {
  const uint8_t* rows[kTile];
  float scales[kTile];
  const auto load = [&](size_t r, uint32_t i) {
    rows[i] = points.row(r + i);
    scales[i] = points.scale[points.index(r + i)];
  };
  size_t r = 0;
  for (; r + kTile <= count; r += kTile) {
    for (uint32_t i = 0; i < kTile; ++i) load(r, i);
    PrefetchPoints(points, r + kTile, std::min(r + 2 * kTile, count));
    visit(std::integral_constant<int, kTile>(), r, rows, scales);
  }
  for (; r < count; ++r) {
    load(r, 0);
    visit(std::integral_constant<int, 1>(), r, rows, scales);
  }
}

// kRows points against all panels.
template <int kRows>
HWY_INLINE void NearestTile(const BytePanels& panels, const uint8_t* const* rows,
                            const float* scales, uint32_t* best, float* score) {
  const Floats d;
  const Ints di;
  Best<kRows> found;
  for (int r = 0; r < kRows; ++r) {
    found.top[r] = hn::Set(d, std::numeric_limits<float>::lowest());
    found.where[r] = hn::Zero(di);
  }
  ScoreAll<kRows>(panels, rows, scales, [&](int r, uint32_t column, FloatVec scores) HWY_ATTR {
    const auto index = hn::Add(hn::Iota(di, 0), hn::Set(di, static_cast<int32_t>(column)));
    const auto better = hn::Gt(scores, found.top[r]);
    found.top[r] = hn::IfThenElse(better, scores, found.top[r]);
    found.where[r] = hn::IfThenElse(hn::RebindMask(di, better), index, found.where[r]);
  });
  for (int r = 0; r < kRows; ++r) {
    const auto value = hn::MaxOfLanes(d, found.top[r]);
    const auto ties = hn::RebindMask(di, hn::Eq(found.top[r], value));
    const auto lowest =
        hn::IfThenElse(ties, found.where[r], hn::Set(di, std::numeric_limits<int32_t>::max()));
    best[r] = static_cast<uint32_t>(hn::GetLane(hn::MinOfLanes(di, lowest)));
    if (score != nullptr) score[r] = hn::GetLane(value);
  }
}

void NearestImpl(const BytePanels& panels, const BytePoints& points, size_t count, uint32_t* best,
                 float* score) {
  VisitTiles(
      points, count,
      [&](auto tile, size_t first, const uint8_t* const* rows, const float* scales) HWY_ATTR {
        NearestTile<tile()>(panels, rows, scales, best + first, score ? score + first : nullptr);
      });
}

// How many of x[16] each x[i] comes after: those larger and, of equals, those before it.
HWY_INLINE void Ranks(const float* x, uint32_t* rank) {
  const Floats d;
  const Ints di;
  for (size_t at = 0; at < kPanel; at += kLanes) {
    const auto mine = hn::LoadU(d, x + at);
    const auto place = hn::Iota(di, static_cast<int32_t>(at));
    auto before = hn::Zero(di);
    for (uint32_t j = 0; j < kPanel; ++j) {
      const auto other = hn::Set(d, x[j]);
      const auto earlier = hn::And(hn::RebindMask(di, hn::Eq(other, mine)),
                                   hn::Gt(place, hn::Set(di, static_cast<int32_t>(j))));
      const auto ahead = hn::Or(hn::RebindMask(di, hn::Gt(other, mine)), earlier);
      before = hn::IfThenElse(ahead, hn::Add(before, hn::Set(di, 1)), before);
    }
    hn::StoreU(before, di, reinterpret_cast<int32_t*>(rank) + at);
  }
}

// Indices of the `few` largest of scores[padded], largest first. The few-th largest of the lanes'
// maxima bounds them from below, and hardly more than they reach it.
HWY_INLINE void TakeFew(const float* scores, size_t padded, uint32_t few, uint32_t* some,
                        uint32_t* best) {
  const Floats d;
  const Ints di;
  alignas(64) float top[kPanel];
  alignas(64) uint32_t rank[kPanel];
  for (size_t at = 0; at < kPanel; at += kLanes) {
    auto most = hn::LoadU(d, scores + at);
    for (size_t i = kPanel + at; i < padded; i += kPanel)
      most = hn::Max(most, hn::LoadU(d, scores + i));
    hn::StoreU(most, d, top + at);
  }
  Ranks(top, rank);
  float bound = top[0];
  for (uint32_t i = 0; i < kPanel; ++i) {
    if (rank[i] == few - 1) bound = top[i];
  }
  size_t count = 0;
  const auto lanes = hn::Iota(di, 0);  // of a variable it would be put together in memory
  for (size_t i = 0; i < padded; i += kLanes) {
    const auto reach = hn::Ge(hn::LoadU(d, scores + i), hn::Set(d, bound));
    // Not CompressStore: vpcompressd to memory takes over a hundred cycles on Zen.
    const auto kept = hn::Compress(hn::Add(lanes, hn::Set(di, static_cast<int32_t>(i))),
                                   hn::RebindMask(di, reach));
    hn::StoreU(kept, di, reinterpret_cast<int32_t*>(some) + count);
    count += hn::CountTrue(d, reach);
  }
  if (count > kPanel) {
    std::partial_sort(some, some + few, some + count, [scores](uint32_t a, uint32_t b) {
      return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
    });
    std::copy_n(some, few, best);
    return;
  }
  std::fill_n(top, kPanel, std::numeric_limits<float>::lowest());
  for (size_t i = 0; i < count; ++i) top[i] = scores[some[i]];
  Ranks(top, rank);
  uint32_t ordered[kPanel] = {};
  for (size_t i = 0; i < count; ++i) ordered[rank[i]] = some[i];
  std::copy_n(ordered, few, best);
}

void NearestFewImpl(const BytePanels& panels, const BytePoints& points, size_t count, uint32_t few,
                    uint32_t* best) {
  const size_t padded = size_t{panels.panel_count()} * kPanel;
  std::vector<float> scores(padded * kTile);
  std::vector<uint32_t> some(padded + kPanel);  // a whole vector is stored past the last
  VisitTiles(
      points, count,
      [&](auto tile, size_t first, const uint8_t* const* rows, const float* scales) HWY_ATTR {
        ScoreAll<tile()>(panels, rows, scales, [&](int r, uint32_t column, FloatVec x) HWY_ATTR {
          hn::StoreU(x, Floats(), scores.data() + padded * r + column);
        });
        for (int r = 0; r < tile(); ++r) {
          TakeFew(scores.data() + padded * r, padded, few, some.data(), best + (first + r) * few);
        }
      });
}

// kLanes elements of a point, without its scale.
HWY_INLINE FloatVec Elements(const uint8_t* x) {
  const Ints di;
  const hn::Rebind<uint8_t, Floats> d8;
  return hn::ConvertTo(Floats(), hn::Sub(hn::PromoteTo(di, hn::LoadU(d8, x)), hn::Set(di, 128)));
}

void ProjectPointsImpl(const float* line, const BytePoints& points, size_t count, float* out) {
  const Floats d;
  for (size_t r = 0; r < count; ++r) {
    const uint8_t* x = points.row(r);
    PrefetchPoints(points, r + 4, std::min(r + 5, count));
    auto sum = hn::Zero(d);
    auto other = hn::Zero(d);
    for (uint32_t j = 0; j < points.dim; j += kPanel) {
      for (size_t v = 0; v < kPanel; v += 2 * kLanes) {
        sum = hn::MulAdd(Elements(x + j + v), hn::LoadU(d, line + j + v), sum);
        if (v + kLanes < kPanel) {
          other =
              hn::MulAdd(Elements(x + j + v + kLanes), hn::LoadU(d, line + j + v + kLanes), other);
        }
      }
    }
    out[r] = points.scale[points.index(r)] * hn::GetLane(hn::SumOfLanes(d, hn::Add(sum, other)));
  }
}

void AddPointsByIndexImpl(const BytePoints& points, size_t count, const uint32_t* into,
                          float* sums) {
  const Floats d;
  for (size_t r = 0; r < count; ++r) {
    const uint8_t* x = points.row(r);
    PrefetchPoints(points, r + 4, std::min(r + 5, count));
    const auto scale = hn::Set(d, points.scale[points.index(r)]);
    float* to = sums + (into == nullptr ? 0 : size_t{into[r]} * points.dim);
    for (uint32_t j = 0; j < points.dim; j += static_cast<uint32_t>(kLanes)) {
      hn::StoreU(hn::MulAdd(scale, Elements(x + j), hn::LoadU(d, to + j)), d, to + j);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace icecache
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace icecache {

HWY_EXPORT(NearestImpl);
HWY_EXPORT(NearestFewImpl);
HWY_EXPORT(ProjectPointsImpl);
HWY_EXPORT(AddPointsByIndexImpl);

float EncodePoint(const float* x, uint32_t dim, uint8_t* bytes) {
  const float scale = QuantizeRow(x, dim, reinterpret_cast<int8_t*>(bytes));
  for (uint32_t j = 0; j < dim; ++j) bytes[j] ^= 0x80;  // two's complement + 128
  return scale;
}

void DecodePoint(const BytePoints& points, size_t r, float* x) {
  const uint8_t* bytes = points.row(r);
  const float scale = points.scale[points.index(r)];
  for (uint32_t j = 0; j < points.dim; ++j)
    x[j] = scale * static_cast<float>(static_cast<int32_t>(bytes[j]) - 128);
}

void BytePanels::Assign(const float* centroids, uint32_t count, uint32_t dim) {
  // Seven bits: 2 * 255 * 63 fits the 16 bits of maddubs.
  constexpr float kRange = 63.0f;
  count_ = count;
  dim_ = dim;
  const uint32_t panel_count = (count + kColumns - 1) / kColumns;
  bytes_.assign(size_t{panel_count} * kColumns * dim, 0);
  columns_.assign(panel_count, Columns{});
  for (uint32_t c = 0; c < panel_count * kColumns; ++c) {
    const uint32_t column = c % kColumns;
    Columns& columns = columns_[c / kColumns];
    if (c >= count) {
      columns.bias[column] = std::numeric_limits<float>::lowest();  // never the best
      continue;
    }
    const float* x = centroids + size_t{c} * dim;
    float top = 0;
    for (uint32_t j = 0; j < dim; ++j) top = std::max(top, std::abs(x[j]));
    const float inverse = top > 1e-30f ? kRange / top : 0.0f;
    int8_t* to = bytes_.data() + size_t{c / kColumns} * kColumns * dim + column * 4;
    int32_t sum = 0, square = 0;
    for (uint32_t j = 0; j < dim; j += 4) {
      for (uint32_t i = 0; i < 4; ++i) {
        const int32_t q = RoundToInt(x[j + i] * inverse);
        to[size_t{j} * kColumns + i] = static_cast<int8_t>(q);
        sum += q;
        square += q * q;
      }
    }
    const float scale = inverse > 0 ? top / kRange : 0.0f;
    columns.start[column] = -128 * sum;
    columns.scale[column] = scale;
    columns.bias[column] = -0.5f * scale * scale * static_cast<float>(square);
  }
}

void Nearest(const BytePanels& panels, const BytePoints& points, size_t count, uint32_t* best,
             float* score) {
  HWY_DYNAMIC_DISPATCH(NearestImpl)(panels, points, count, best, score);
}

void NearestFew(const BytePanels& panels, const BytePoints& points, size_t count, uint32_t few,
                uint32_t* best) {
  HWY_DYNAMIC_DISPATCH(NearestFewImpl)(panels, points, count, few, best);
}

void ProjectPoints(const float* line, const BytePoints& points, size_t count, float* out) {
  HWY_DYNAMIC_DISPATCH(ProjectPointsImpl)(line, points, count, out);
}

void AddPointsByIndex(const BytePoints& points, size_t count, const uint32_t* into, float* sums) {
  HWY_DYNAMIC_DISPATCH(AddPointsByIndexImpl)(points, count, into, sums);
}

}  // namespace icecache
#endif  // HWY_ONCE
