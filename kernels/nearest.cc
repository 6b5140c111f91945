#include "kernels/nearest.h"

#include <algorithm>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/nearest.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

#ifndef ICECACHE_KERNELS_NEAREST_ONCE
#define ICECACHE_KERNELS_NEAREST_ONCE
namespace icecache {
inline constexpr uint32_t kPanel = 16;  // columns of a panel
inline constexpr uint32_t kRowTile =
    6;  // 6 rows x 16 columns = 12 AVX2 accumulators of 16 registers
}  // namespace icecache
#endif

HWY_BEFORE_NAMESPACE();
namespace icecache {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using Floats = hn::CappedTag<float, kPanel>;
using Ints = hn::Rebind<int32_t, Floats>;

// kRows rows against all panels.
template <int kRows>
HWY_INLINE void NearestTile(const CentroidPanels& panels, const float* rows, size_t row_stride,
                            uint32_t* best, float* score) {
  const Floats d;
  const Ints di;
  constexpr size_t kLanes = HWY_MIN(static_cast<size_t>(kPanel), HWY_MAX_BYTES / sizeof(float));
  constexpr int kVecs = static_cast<int>(kPanel / kLanes);
  hn::Vec<Floats> top[kRows];
  hn::Vec<Ints> where[kRows];
  for (int r = 0; r < kRows; ++r) {
    top[r] = hn::Set(d, std::numeric_limits<float>::lowest());
    where[r] = hn::Zero(di);
  }
  const uint32_t dim = panels.dim();
  const float* at = panels.data();
  for (uint32_t column = 0; column < panels.count(); column += kPanel) {
    hn::Vec<Floats> acc[kRows][kVecs];
    for (int v = 0; v < kVecs; ++v) {
      const auto bias = hn::LoadU(d, at + v * kLanes);
      for (int r = 0; r < kRows; ++r) acc[r][v] = bias;
    }
    at += kPanel;
    for (uint32_t j = 0; j < dim; ++j, at += kPanel) {
      for (int v = 0; v < kVecs; ++v) {
        const auto c = hn::LoadU(d, at + v * kLanes);
        for (int r = 0; r < kRows; ++r) {
          acc[r][v] = hn::MulAdd(hn::Set(d, rows[r * row_stride + j]), c, acc[r][v]);
        }
      }
    }
    for (int v = 0; v < kVecs; ++v) {
      const auto index = hn::Iota(di, static_cast<int32_t>(column + v * kLanes));
      for (int r = 0; r < kRows; ++r) {
        const auto better = hn::Gt(acc[r][v], top[r]);
        top[r] = hn::IfThenElse(better, acc[r][v], top[r]);
        where[r] = hn::IfThenElse(hn::RebindMask(di, better), index, where[r]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    const float value = hn::GetLane(hn::MaxOfLanes(d, top[r]));
    const auto ties = hn::RebindMask(di, hn::Eq(top[r], hn::Set(d, value)));
    const auto lowest =
        hn::IfThenElse(ties, where[r], hn::Set(di, std::numeric_limits<int32_t>::max()));
    const int32_t index = hn::GetLane(hn::MinOfLanes(di, lowest));
    best[r] = static_cast<uint32_t>(index) < panels.count() ? static_cast<uint32_t>(index) : 0;
    if (score != nullptr) score[r] = value;
  }
}

void NearestImpl(const CentroidPanels& panels, const float* rows, size_t row_stride,
                 size_t row_count, uint32_t* best, float* score) {
  size_t r = 0;
  for (; r + kRowTile <= row_count; r += kRowTile) {
    NearestTile<kRowTile>(panels, rows + r * row_stride, row_stride, best + r,
                          score ? score + r : nullptr);
  }
  for (; r < row_count; ++r) {
    NearestTile<1>(panels, rows + r * row_stride, row_stride, best + r,
                   score ? score + r : nullptr);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace icecache
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace icecache {

HWY_EXPORT(NearestImpl);

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

void Nearest(const CentroidPanels& panels, const float* rows, size_t row_stride, size_t row_count,
             uint32_t* best, float* score) {
  HWY_DYNAMIC_DISPATCH(NearestImpl)(panels, rows, row_stride, row_count, best, score);
}

}  // namespace icecache
#endif  // HWY_ONCE
