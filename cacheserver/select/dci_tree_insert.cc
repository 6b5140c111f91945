#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "cacheserver/select/dci_tree_internal.h"
#include "cacheserver/select/exact_pages.h"
#include "cacheserver/select/page_fills.h"
#include "kernels/distance.h"

namespace icecache {

// The nearest pivot of the level above, by all its keys or, on large levels, by a beam.
uint32_t DciTree::ParentFor(const TokenInfo& info, const float* key, float* dot) const {
  const Level& above = level(info.level + 1);
  const auto pivots = static_cast<uint32_t>(above.tokens.size());
  const uint32_t dim = options_.head_dim;
  uint32_t parent = 0;
  if (pivots > tree_options_.exhaustive_parents) {
    parent = BeamParent(key, info, info.level + 1, tree_options_.insert_field_of_view,
                        tree_options_.insert_retrieve_share);
    DotRows(key, 1, reinterpret_cast<const std::byte*>(above.keys.data() + size_t{parent} * dim),
            DType::kF32, 1, dim, dot, 1);
    *dot = SaturatedLogit(*dot);
    return parent;
  }
  thread_local std::vector<float> dots;
  dots.resize(pivots);
  DotRows(key, 1, reinterpret_cast<const std::byte*>(above.keys.data()), DType::kF32, pivots, dim,
          dots.data(), pivots);
  float nearest = std::numeric_limits<float>::infinity();
  for (uint32_t i = 0; i < pivots; ++i) {
    const float d = Distance(SaturatedLogit(dots[i]), info, tokens_[above.tokens[i]]);
    if (d < nearest) nearest = d, parent = i;
  }
  *dot = SaturatedLogit(dots[parent]);
  return parent;
}

void DciTree::Refresh(Cell* cell) const {
  if (cell->lift == lift_) return;
  for (Child& child : cell->children) child.projection = ProjectionOf(tokens_[child.token]);
  std::sort(cell->children.begin(), cell->children.end());
  cell->lift = lift_;
}

// The upper half by projection moves to a new page; the token joins the half it belongs to.
InsertPlan DciTree::SplitPage(uint32_t page, const Child& child) {
  constexpr uint32_t kTokens = limits::kPageTokens;
  std::array<Child, kTokens> rows;
  std::array<uint32_t, kTokens> kept;
  for (uint32_t r = 0; r < kTokens; ++r) {
    const uint32_t t = page_tokens_[size_t{page} * kTokens + r];
    rows[r] = {ProjectionOf(tokens_[t]), t};
  }
  std::sort(rows.begin(), rows.end());
  const uint32_t fresh = page_count();
  RowMove upper{.from = PageId(page), .mask = 0, .to = PageId(fresh)};
  for (uint32_t i = kTokens / 2; i < kTokens; ++i)
    upper.mask = static_cast<uint16_t>(upper.mask | 1u << tokens_[rows[i].token].row);
  page_fills_.push_back(0);
  page_tokens_.resize(page_tokens_.size() + kTokens, 0);
  std::copy_n(page_tokens_.begin() + static_cast<ptrdiff_t>(size_t{page} * kTokens), kTokens,
              kept.begin());
  page_fills_[page] = 0;
  for (uint32_t r = 0; r < kTokens; ++r)
    AppendToPage(kept[r], (upper.mask >> r & 1) != 0 ? fresh : page);
  return {child < rows[kTokens / 2] ? PageId(page) : PageId(fresh), upper};
}

InsertPlan DciTree::PlaceInPage(const Cell& cell, const Child& child) {
  if (cell.children.empty()) {
    page_fills_.push_back(0);
    page_tokens_.resize(page_tokens_.size() + limits::kPageTokens, 0);
    return {PageId(page_count() - 1)};
  }
  // The page of the neighbour by projection.
  const auto next = std::lower_bound(cell.children.begin(), cell.children.end(), child);
  const Child& neighbour = next == cell.children.begin() ? *next : *(next - 1);
  const uint32_t page = tokens_[neighbour.token].page;
  if (page_fills_[page] == limits::kPageTokens) return SplitPage(page, child);
  return {PageId(page)};
}

// A token of the level below that is nearer to the new pivot than to its parent changes its cell.
void DciTree::StealOne(uint32_t token, float dot, uint32_t pivot) {
  TokenInfo& info = tokens_[token];
  const TokenInfo& to = tokens_[pivot];
  if (info.parent == to.node) return;
  const TokenInfo& from = tokens_[level(info.level + 1).tokens[info.parent]];
  dot = SaturatedLogit(dot);
  if (Distance(dot, info, to) >= Distance(info.parent_dot, info, from)) return;
  Cell& old_cell = CellOf(info);
  const auto at = std::find_if(old_cell.children.begin(), old_cell.children.end(),
                               [token](const Child& c) { return c.token == token; });
  KV_CHECK(at != old_cell.children.end());
  old_cell.children.erase(at);
  info.parent = to.node;
  info.parent_dot = dot;
  Cell& cell = CellOf(info);
  Refresh(&cell);
  const Child child{ProjectionOf(info), token};
  cell.children.insert(std::lower_bound(cell.children.begin(), cell.children.end(), child), child);
}

std::vector<std::pair<uint32_t, float>> DciTree::DotsBelow(uint32_t below, const float* key,
                                                           const PagedKv& pages) const {
  const uint32_t dim = options_.head_dim;
  std::vector<std::pair<uint32_t, float>> found;
  if (below > 0) {
    const Level& at = level(below);
    std::vector<float> dots(at.tokens.size());
    DotRows(key, 1, reinterpret_cast<const std::byte*>(at.keys.data()), DType::kF32,
            static_cast<uint32_t>(dots.size()), dim, dots.data(), dots.size());
    for (size_t i = 0; i < dots.size(); ++i) found.emplace_back(at.tokens[i], dots[i]);
    return found;
  }
  std::array<float, limits::kPageTokens> dots;
  for (uint32_t p = 0; p < pages.page_count; ++p) {
    const PageView& page = pages.pages[p];
    if (page.k == nullptr) continue;
    DotRows(key, 1, page.k, pages.dtype, page.fill, dim, dots.data(), dots.size());
    for (uint32_t r = 0; r < page.fill; ++r) {
      const uint32_t t = page_tokens_[size_t{p} * limits::kPageTokens + r];
      if (tokens_[t].level == 0) found.emplace_back(t, dots[r]);
    }
  }
  return found;
}

// `token` becomes a pivot and takes over what is nearest to it. On a new top level that is
// everything. `pages` and page_tokens_ must still agree: call it before the token is placed in a
// page.
void DciTree::AddPivot(uint32_t token, const float* key, const PagedKv& pages) {
  const uint32_t l = tokens_[token].level;
  const bool opens = l > top_level();
  if (opens) levels_.emplace_back();
  Level& at = level(l);
  tokens_[token].node = static_cast<uint32_t>(at.tokens.size());
  at.tokens.push_back(token);
  at.keys.insert(at.keys.end(), key, key + options_.head_dim);
  at.cells.emplace_back();
  if (opens) {
    std::swap(at.cells.front(), root_);
    for (const Child& child : at.cells.front().children) tokens_[child.token].parent = 0;
  }
  for (const auto& [below, dot] : DotsBelow(l - 1, key, pages)) {
    if (opens) {
      tokens_[below].parent_dot = SaturatedLogit(dot);
    } else {
      StealOne(below, dot, token);
    }
  }
}

Result<InsertPlan> DciTree::Insert(const TokenRows& row, const PagedKv& pages) {
  KV_CHECK(row.count == 1 && pages.page_count == page_count());
  KV_RETURN_IF_ERROR(CheckRows(row, options_));
  const uint32_t dim = options_.head_dim;
  thread_local std::vector<float> key;
  key.resize(dim);
  ToF32(row.k, row.dtype, dim, key.data());
  TokenInfo info;
  double square = 0;
  for (const float x : key) square += double{x} * x;
  constexpr double kLargest = std::numeric_limits<float>::max() / 4;
  info.norm = static_cast<float>(std::min(std::sqrt(square), kLargest));
  DotRows(direction_.data(), 1, reinterpret_cast<const std::byte*>(key.data()), DType::kF32, 1, dim,
          &info.head, 1);
  info.head = SaturatedLogit(info.head);
  lift_ = std::max(lift_, info.norm);
  info.level = static_cast<uint8_t>(NextLevel());
  if (info.level < top_level()) info.parent = ParentFor(info, key.data(), &info.parent_dot);

  const uint32_t token = token_count();
  tokens_.push_back(info);
  if (info.level == 0) {
    ++level0_count_;
  } else {
    AddPivot(token, key.data(), pages);
  }
  Cell& cell = CellOf(tokens_[token]);
  Refresh(&cell);
  const Child child{ProjectionOf(tokens_[token]), token};
  const InsertPlan plan = PlaceInPage(cell, child);
  AppendToPage(token, plan.page.value);
  cell.children.insert(std::lower_bound(cell.children.begin(), cell.children.end(), child), child);
  return plan;
}

}  // namespace icecache
