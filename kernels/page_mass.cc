#include "kernels/page_mass.h"

#include <algorithm>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/page_mass.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace icecache {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using Floats = hn::CappedTag<float, 16>;
constexpr size_t kRows = 16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// f(s) = s^2 / 2 / (1 + 0.2 s), limited to 1e30.
HWY_INLINE hn::Vec<Floats> SpreadGain(hn::Vec<Floats> s) {
  const Floats d;
  const auto below = hn::MulAdd(hn::Set(d, 0.2f), s, hn::Set(d, 1.0f));
  const auto gain = hn::Div(hn::Mul(hn::Set(d, 0.5f), hn::Mul(s, s)), below);
  return hn::Min(gain, hn::Set(d, 1e30f));
}

float EstimateLogMassesImpl(const uint32_t* blocks, size_t count, const float* spread,
                            const float* log_count, float rho, float* centre, float* mass) {
  const Floats d;
  const auto limit = hn::Set(d, 1e30f);
  const auto factor = hn::Set(d, rho);
  auto top = hn::Set(d, -kInfinity);
  for (size_t b = 0; b < count; ++b) {
    const size_t from = size_t{blocks[b]} * kRows;
    for (size_t lane = 0; lane < kRows; lane += hn::Lanes(d)) {
      const size_t at = b * kRows + lane;
      const auto raw = hn::LoadU(d, centre + at);
      const auto c = hn::Min(hn::Max(raw, hn::Neg(limit)), limit);
      const auto s = hn::Mul(hn::LoadU(d, spread + from + lane), factor);
      const auto m = hn::Add(hn::Add(c, SpreadGain(s)), hn::LoadU(d, log_count + from + lane));
      hn::StoreU(c, d, centre + at);
      hn::StoreU(m, d, mass + at);
      top = hn::Max(top, m);
    }
  }
  return hn::GetLane(hn::MaxOfLanes(d, top));
}

void AddSpreadGainsImpl(const float* spread, size_t count, float rho, float shift, float* centre) {
  const Floats d;
  const auto factor = hn::Set(d, rho);
  const auto offset = hn::Set(d, shift);
  const auto limit = hn::Set(d, 1e30f);
  for (size_t i = 0; i < count; i += hn::Lanes(d)) {
    const auto gain = SpreadGain(hn::Mul(hn::LoadU(d, spread + i), factor));
    const auto c = hn::Add(hn::Add(hn::LoadU(d, centre + i), gain), offset);
    hn::StoreU(hn::Min(c, limit), d, centre + i);
  }
}

void EstimateTopsImpl(const uint32_t* blocks, size_t count, const float* spread,
                      const float* log_count, float reach, float shift, const float* centre,
                      float* top) {
  const Floats d;
  const auto factor = hn::Set(d, reach);
  const auto offset = hn::Set(d, shift);
  const auto none = hn::Set(d, -kInfinity);
  for (size_t b = 0; b < count; ++b) {
    const size_t from = size_t{blocks[b]} * kRows;
    for (size_t lane = 0; lane < kRows; lane += hn::Lanes(d)) {
      const size_t at = b * kRows + lane;
      const auto x = hn::MulAdd(hn::LoadU(d, spread + from + lane), factor,
                                hn::Add(hn::LoadU(d, centre + at), offset));
      const auto empty = hn::Eq(hn::LoadU(d, log_count + from + lane), none);
      hn::StoreU(hn::IfThenElse(empty, none, x), d, top + at);
    }
  }
}

void MaxScaledImpl(const float* x, size_t count, float factor, bool first, float* y) {
  const Floats d;
  const auto f = hn::Set(d, factor);
  for (size_t i = 0; i < count; i += hn::Lanes(d)) {
    const auto term = hn::Mul(f, hn::LoadU(d, x + i));
    hn::StoreU(first ? term : hn::Max(hn::LoadU(d, y + i), term), d, y + i);
  }
}

void AddScaledImpl(const float* x, size_t count, float factor, bool first, float* y) {
  const Floats d;
  const auto f = hn::Set(d, factor);
  for (size_t i = 0; i < count; i += hn::Lanes(d)) {
    const auto before = first ? hn::Zero(d) : hn::LoadU(d, y + i);
    hn::StoreU(hn::MulAdd(f, hn::LoadU(d, x + i), before), d, y + i);
  }
}

void SumBlocksImpl(const float* x, size_t count, float* sums) {
  const Floats d;
  for (size_t b = 0; b < count; ++b) {
    auto sum = hn::LoadU(d, x + b * kRows);
    for (size_t lane = hn::Lanes(d); lane < kRows; lane += hn::Lanes(d))
      sum = hn::Add(sum, hn::LoadU(d, x + b * kRows + lane));
    sums[b] = hn::GetLane(hn::SumOfLanes(d, sum));
  }
}

void MaxOfBlockGroupsImpl(const float* x, size_t count, size_t depth, float* y) {
  const Floats d;
  for (size_t b = 0; b < count; b += depth, y += kRows) {
    const size_t end = std::min(count, b + depth);
    for (size_t lane = 0; lane < kRows; lane += hn::Lanes(d)) {
      auto top = hn::LoadU(d, x + b * kRows + lane);
      for (size_t i = b + 1; i < end; ++i) top = hn::Max(top, hn::LoadU(d, x + i * kRows + lane));
      hn::StoreU(top, d, y + lane);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace icecache
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace icecache {

HWY_EXPORT(EstimateLogMassesImpl);
HWY_EXPORT(AddSpreadGainsImpl);
HWY_EXPORT(EstimateTopsImpl);
HWY_EXPORT(MaxScaledImpl);
HWY_EXPORT(AddScaledImpl);
HWY_EXPORT(SumBlocksImpl);
HWY_EXPORT(MaxOfBlockGroupsImpl);

float EstimateLogMasses(const uint32_t* blocks, size_t count, const float* spread,
                        const float* log_count, float rho, float* centre, float* mass) {
  return HWY_DYNAMIC_DISPATCH(EstimateLogMassesImpl)(blocks, count, spread, log_count, rho, centre,
                                                     mass);
}

void AddSpreadGains(const float* spread, size_t count, float rho, float shift, float* centre) {
  HWY_DYNAMIC_DISPATCH(AddSpreadGainsImpl)(spread, count, rho, shift, centre);
}

void EstimateTops(const uint32_t* blocks, size_t count, const float* spread, const float* log_count,
                  float reach, float shift, const float* centre, float* top) {
  HWY_DYNAMIC_DISPATCH(EstimateTopsImpl)
  (blocks, count, spread, log_count, reach, shift, centre, top);
}

void MaxScaled(const float* x, size_t count, float factor, bool first, float* y) {
  HWY_DYNAMIC_DISPATCH(MaxScaledImpl)(x, count, factor, first, y);
}

void AddScaled(const float* x, size_t count, float factor, bool first, float* y) {
  HWY_DYNAMIC_DISPATCH(AddScaledImpl)(x, count, factor, first, y);
}

void SumBlocks(const float* x, size_t count, float* sums) {
  HWY_DYNAMIC_DISPATCH(SumBlocksImpl)(x, count, sums);
}

void MaxOfBlockGroups(const float* x, size_t count, size_t depth, float* y) {
  HWY_DYNAMIC_DISPATCH(MaxOfBlockGroupsImpl)(x, count, depth, y);
}

}  // namespace icecache
#endif  // HWY_ONCE
