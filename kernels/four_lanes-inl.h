// Horizontal reductions of four vectors at once. Compiled once per instruction set by each file
// that includes it.
#if defined(ICECACHE_KERNELS_FOUR_LANES_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef ICECACHE_KERNELS_FOUR_LANES_INL_H
#undef ICECACHE_KERNELS_FOUR_LANES_INL_H
#else
#define ICECACHE_KERNELS_FOUR_LANES_INL_H
#endif

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace icecache {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

struct LaneSum {
  template <class V>
  HWY_INLINE V operator()(V a, V b) const {
    return hn::Add(a, b);
  }
};
struct LaneMax {
  template <class V>
  HWY_INLINE V operator()(V a, V b) const {
    return hn::Max(a, b);
  }
};

template <class Op, class D>
HWY_INLINE hn::Vec<hn::Full128<float>> FoldTo128(D d, Op op, hn::Vec<D> v) {
  if constexpr (hn::MaxLanes(d) <= 4) {
    return v;
  } else {
    const hn::Half<D> half;
    return FoldTo128(half, op, op(hn::LowerHalf(half, v), hn::UpperHalf(half, v)));
  }
}

// The four reductions of a, b, c, d in one vector: 6 shuffles instead of 4 reductions.
template <class Op, class D>
HWY_INLINE hn::Vec<hn::Full128<float>> FoldFour(D tag, Op op, hn::Vec<D> a, hn::Vec<D> b,
                                                hn::Vec<D> c, hn::Vec<D> d) {
  const hn::Repartition<double, D> wide;
  const auto ab = op(hn::InterleaveLower(tag, a, b), hn::InterleaveUpper(tag, a, b));
  const auto cd = op(hn::InterleaveLower(tag, c, d), hn::InterleaveUpper(tag, c, d));
  const auto ab2 = hn::BitCast(wide, ab);
  const auto cd2 = hn::BitCast(wide, cd);
  const auto lower = hn::BitCast(tag, hn::InterleaveLower(wide, ab2, cd2));
  const auto upper = hn::BitCast(tag, hn::InterleaveUpper(wide, ab2, cd2));
  return FoldTo128(tag, op, op(lower, upper));
}

}  // namespace HWY_NAMESPACE
}  // namespace icecache
HWY_AFTER_NAMESPACE();

#endif
