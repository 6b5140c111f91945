// For tests and fuzz programs: what becomes of a saved index whose checksum is right and whose
// content is anything. It is refused, or it fits pages and can then be asked, grown, cut back and
// saved like one that was built.
//
// Rows are a function of their number, f32 of 32 dimensions. One thread.
#pragma once

#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "cacheserver/select/selection_policy.h"
#include "tests/support/page_store.h"

namespace icecache::forged {

inline constexpr uint32_t kDim = 32, kGroup = 2, kPagesWanted = 4, kTokensMax = 200, kGrowth = 24;
inline constexpr PolicyOptions kOptions{.dtype = DType::kF32, .head_dim = kDim};
inline constexpr size_t kLengthAt = 16;  // of the body, in an image's header

inline TokenRows Rows(uint32_t first, uint32_t count) {
  static const std::vector<float> rows = [] {
    std::vector<float> all(size_t{kTokensMax + kGrowth} * kDim);
    for (size_t i = 0; i < all.size(); ++i) all[i] = std::sin(static_cast<float>(i * i % 1013));
    return all;
  }();
  const auto* bytes = reinterpret_cast<const std::byte*>(rows.data() + size_t{first} * kDim);
  return {DType::kF32, kDim, count, bytes, bytes};
}

struct Built {
  uint32_t tokens = 0;
  PageLayout layout;
  std::string image;
};

inline Built Build(PolicyKind kind, uint32_t tokens) {
  auto policy = MakePolicy(kind, kOptions);
  Built built{tokens, policy->Build(Rows(0, tokens), {}).value(), {}};
  policy->Save(&built.image);
  return built;
}

// Throughout: the promise that was broken, or "".
using Broken = std::string;

// In every way that a request can ask.
inline Broken Ask(const SelectionPolicy& policy, const PagedKv& pages) {
  std::vector<float> queries(size_t{kGroup} * kDim, 0.25f);
  for (uint32_t j = 0; j < kDim; ++j) queries[kDim + j] = 100.0f * std::cos(static_cast<float>(j));
  const std::array<float, kGroup> local_lse = {0.0f, 50.0f};
  const std::array<PageId, 2> near = {PageId(1), PageId(1u << 30)};
  Selection selection;
  for (uint32_t way = 0; way < 12; ++way) {
    SelectRequest request{.queries = queries.data(), .group = kGroup, .max_pages = kPagesWanted};
    request.rank = static_cast<GroupRank>(way % 3);
    request.read_cap = std::array<uint32_t, 4>{0, 64, 1u << 20, 64}[way % 4];
    request.min_mass = way % 4 == 3 ? 0.9f : 0.0f;
    request.residual = way % 5 != 4;
    if (way >= 6) request.local_lse = local_lse.data();
    if (way >= 6) request.near = near;
    policy.Select(request, pages, &selection);
    if (selection.pages.size() > kPagesWanted) return "never more pages than asked for";
    std::vector<bool> seen(pages.page_count);
    for (const SelectedPage& page : selection.pages) {
      if (page.page.value >= pages.page_count || seen[page.page.value])
        return "pages that there are, each once";
      seen[page.page.value] = true;
    }
  }
  return {};
}

inline std::vector<PageView> Cold(const PageStore& store) {
  std::vector<PageView> views(store.kv().pages, store.kv().pages + store.page_count());
  for (PageView& view : views) view.k = view.v = nullptr;
  return views;
}

inline bool Fits(const SelectionPolicy& policy, const PageStore& store) {
  const std::vector<PageView> cold = Cold(store);
  return policy.Validate({DType::kF32, kDim, store.page_count(), cold.data()}).ok();
}

inline Broken AskColdAndWarm(const SelectionPolicy& policy, const PageStore& store) {
  const std::vector<PageView> cold = Cold(store);
  const Broken broken = Ask(policy, {DType::kF32, kDim, store.page_count(), cold.data()});
  return broken.empty() ? Ask(policy, store.kv()) : broken;
}

inline Broken Grow(SelectionPolicy& policy, PageStore& store) {
  for (uint32_t i = 0; i < kGrowth; ++i) {
    const TokenRows row = Rows(kTokensMax + i, 1);
    const auto plan = policy.Insert(row, store.kv());
    if (!plan.ok()) return "a finite row is inserted";
    if (!store.ApplyInsert(*plan, row).ok()) return "what an insert plans can be done";
  }
  return Fits(policy, store) ? "" : "an index that grew fits its pages";
}

inline Broken CutBack(SelectionPolicy& policy, PageStore& store) {
  std::vector<uint16_t> masks;
  for (uint32_t p = 0; p < store.page_count(); ++p) {
    const uint32_t all = (1u << store.kv().pages[p].fill) - 1;
    masks.push_back(static_cast<uint16_t>(p % 3 == 0 ? 0 : p % 3 == 1 ? all & 0x5555 : all));
  }
  if (!policy.Retain(masks, store.kv()).ok() || !store.ApplyRetain(masks).ok())
    return "rows can be dropped";
  return Fits(policy, store) ? "" : "an index that was cut back fits its pages";
}

inline Broken SaveAgain(PolicyKind kind, const SelectionPolicy& policy) {
  std::string image;
  policy.Save(&image);
  return MakePolicy(kind, kOptions)->Restore(image).ok() ? "" : "a saved image restores";
}

// `built`: whose pages the image may fit.
inline Broken Use(PolicyKind kind, const std::string& image, const Built& built) {
  auto policy = MakePolicy(kind, kOptions);
  if (!policy->Restore(image).ok()) return {};
  PageStore store(DType::kF32, kDim);
  if (!store.ApplyLayout(Rows(0, built.tokens), built.layout).ok()) return "a layout is applied";
  if (!Fits(*policy, store)) return {};
  (void)policy->Validate(store.kv()).ok();  // may find it stale
  Broken broken = AskColdAndWarm(*policy, store);
  if (broken.empty()) broken = Grow(*policy, store);
  if (broken.empty()) broken = AskColdAndWarm(*policy, store);
  if (broken.empty()) broken = CutBack(*policy, store);
  if (broken.empty()) broken = AskColdAndWarm(*policy, store);
  return broken.empty() ? SaveAgain(kind, *policy) : broken;
}

}  // namespace icecache::forged
