#include "kernels/nearest.h"

#include <algorithm>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/nearest.cc"
#include "hwy/cache_control.h"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

#ifndef ICECACHE_KERNELS_NEAREST_ONCE
#define ICECACHE_KERNELS_NEAREST_ONCE
namespace icecache {
inline constexpr uint32_t kPanel = 16;  // columns of a panel
}  // namespace icecache
#endif

HWY_BEFORE_NAMESPACE();
namespace icecache {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using Floats = hn::CappedTag<float, kPanel>;
using Ints = hn::Rebind<int32_t, Floats>;

HWY_INLINE const float* RowAt(const RowTable& rows, size_t r) {
  return rows.base + rows.stride * (rows.ids == nullptr ? r : size_t{rows.ids[r]});
}

// The next tile's rows, which lie anywhere when ids choose them.
HWY_INLINE void PrefetchRows(const RowTable& rows, size_t begin, size_t end, uint32_t dim) {
  for (size_t r = begin; r < end; ++r) {
    const float* x = RowAt(rows, r);
    for (uint32_t j = 0; j < dim; j += 16) hwy::Prefetch(x + j);
  }
}

constexpr size_t kLanes = HWY_MIN(static_cast<size_t>(kPanel), HWY_MAX_BYTES / sizeof(float));
constexpr int kVecs = static_cast<int>(kPanel / kLanes);
// What meets in registers: 6 rows x 16 columns are 12 of AVX2's 16 registers. 8 rows x 32 columns
// are half of AVX-512's, and need ten loads for sixteen multiply-adds.
constexpr uint32_t kRowTile = HWY_MAX_BYTES >= 64 ? 8 : 6;
constexpr int kPanelTile = HWY_MAX_BYTES >= 64 ? 2 : 1;

size_t PanelFloats(const CentroidPanels& panels) { return size_t{panels.dim() + 1} * kPanel; }

// Scores of kRows rows with kPanels panels of centroids, panel_floats apart.
template <int kRows, int kPanels>
HWY_INLINE void ScorePanels(const float* panel, size_t panel_floats, uint32_t dim,
                            const float* const* rows, hn::Vec<Floats> (*acc)[kPanels * kVecs]) {
  const Floats d;
  constexpr int kAll = kPanels * kVecs;
  const auto at = [&](int v) { return panel + v / kVecs * panel_floats + v % kVecs * kLanes; };
  for (int v = 0; v < kAll; ++v) {
    const auto bias = hn::LoadU(d, at(v));
    for (int r = 0; r < kRows; ++r) acc[r][v] = bias;
  }
  panel += kPanel;
  for (uint32_t j = 0; j < dim; ++j, panel += kPanel) {
    // Rows outermost: one broadcast lives at a time, so that accumulators keep their registers.
    hn::Vec<Floats> c[kAll];
    for (int v = 0; v < kAll; ++v) c[v] = hn::LoadU(d, at(v));
    for (int r = 0; r < kRows; ++r) {
      const auto x = hn::Set(d, rows[r][j]);
      for (int v = 0; v < kAll; ++v) acc[r][v] = hn::MulAdd(x, c[v], acc[r][v]);
    }
  }
}

// The largest score so far of each of some rows, lane by lane, and its column.
template <int kRows>
struct Best {
  hn::Vec<Floats> top[kRows];
  hn::Vec<Ints> where[kRows];
};

template <int kRows, int kPanels>
HWY_INLINE void NearestOfPanels(const CentroidPanels& panels, uint32_t column,
                                const float* const* rows, Best<kRows>* best) {
  [[maybe_unused]] const Floats d;  // GCC 12 does not see the uses in the loops
  const Ints di;
  hn::Vec<Floats> acc[kRows][kPanels * kVecs];
  const size_t panel_floats = PanelFloats(panels);
  ScorePanels<kRows, kPanels>(panels.data() + column / kPanel * panel_floats, panel_floats,
                              panels.dim(), rows, acc);
  for (int v = 0; v < kPanels * kVecs; ++v) {
    const auto index =
        hn::Add(hn::Iota(di, 0), hn::Set(di, static_cast<int32_t>(column + v * kLanes)));
    for (int r = 0; r < kRows; ++r) {
      const auto better = hn::Gt(acc[r][v], best->top[r]);
      best->top[r] = hn::IfThenElse(better, acc[r][v], best->top[r]);
      best->where[r] = hn::IfThenElse(hn::RebindMask(di, better), index, best->where[r]);
    }
  }
}

// kRows rows against all panels.
template <int kRows>
HWY_INLINE void NearestTile(const CentroidPanels& panels, const float* const* rows, uint32_t* best,
                            float* score) {
  const Floats d;
  const Ints di;
  Best<kRows> found;
  for (int r = 0; r < kRows; ++r) {
    found.top[r] = hn::Set(d, std::numeric_limits<float>::lowest());
    found.where[r] = hn::Zero(di);
  }
  uint32_t column = 0;
  for (; column + (kPanelTile - 1) * kPanel < panels.count(); column += kPanelTile * kPanel)
    NearestOfPanels<kRows, kPanelTile>(panels, column, rows, &found);
  for (; column < panels.count(); column += kPanel)
    NearestOfPanels<kRows, 1>(panels, column, rows, &found);
  for (int r = 0; r < kRows; ++r) {
    const float value = hn::GetLane(hn::MaxOfLanes(d, found.top[r]));
    const auto ties = hn::RebindMask(di, hn::Eq(found.top[r], hn::Set(d, value)));
    const auto lowest =
        hn::IfThenElse(ties, found.where[r], hn::Set(di, std::numeric_limits<int32_t>::max()));
    const int32_t index = hn::GetLane(hn::MinOfLanes(di, lowest));
    best[r] = static_cast<uint32_t>(index) < panels.count() ? static_cast<uint32_t>(index) : 0;
    if (score != nullptr) score[r] = value;
  }
}

void NearestImpl(const CentroidPanels& panels, const RowTable& rows, size_t row_count,
                 uint32_t* best, float* score) {
  const float* at[kRowTile];
  size_t r = 0;
  for (; r + kRowTile <= row_count; r += kRowTile) {
    for (uint32_t i = 0; i < kRowTile; ++i) at[i] = RowAt(rows, r + i);
    PrefetchRows(rows, r + kRowTile, std::min(r + 2 * kRowTile, row_count), panels.dim());
    NearestTile<kRowTile>(panels, at, best + r, score ? score + r : nullptr);
  }
  for (; r < row_count; ++r) {
    at[0] = RowAt(rows, r);
    NearestTile<1>(panels, at, best + r, score ? score + r : nullptr);
  }
}

void AddRowsByIndexImpl(const RowTable& rows, size_t row_count, uint32_t dim, const uint32_t* into,
                        float* sums) {
  const Floats d;
  for (size_t r = 0; r < row_count; ++r) {
    const float* x = RowAt(rows, r);
    PrefetchRows(rows, r + 4, std::min(r + 5, row_count), dim);
    float* to = sums + size_t{into[r]} * dim;
    for (uint32_t j = 0; j < dim; j += static_cast<uint32_t>(kLanes)) {
      hn::StoreU(hn::Add(hn::LoadU(d, to + j), hn::LoadU(d, x + j)), d, to + j);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace icecache
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace icecache {

HWY_EXPORT(NearestImpl);
HWY_EXPORT(AddRowsByIndexImpl);

void CentroidPanels::Assign(const float* centroids, uint32_t count, uint32_t dim) {
  count_ = count;
  dim_ = dim;
  const size_t panel_floats = size_t{dim + 1} * kPanel;
  const uint32_t panel_count = (count + kPanel - 1) / kPanel;
  data_.assign(panel_floats * panel_count, 0.0f);
  for (uint32_t c = 0; c < panel_count * kPanel; ++c) {
    float* panel = data_.data() + (c / kPanel) * panel_floats + c % kPanel;
    if (c >= count) {
      panel[0] = std::numeric_limits<float>::lowest();  // never the best
      continue;
    }
    const float* x = centroids + size_t{c} * dim;
    float square = 0;
    for (uint32_t j = 0; j < dim; ++j) {
      panel[size_t{j + 1} * kPanel] = x[j];
      square += x[j] * x[j];
    }
    panel[0] = -0.5f * square;
  }
}

void Nearest(const CentroidPanels& panels, const RowTable& rows, size_t row_count, uint32_t* best,
             float* score) {
  HWY_DYNAMIC_DISPATCH(NearestImpl)(panels, rows, row_count, best, score);
}

void AddRowsByIndex(const RowTable& rows, size_t row_count, uint32_t dim, const uint32_t* into,
                    float* sums) {
  HWY_DYNAMIC_DISPATCH(AddRowsByIndexImpl)(rows, row_count, dim, into, sums);
}

}  // namespace icecache
#endif  // HWY_ONCE
