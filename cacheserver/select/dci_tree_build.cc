#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

#include "cacheserver/select/dci_tree_internal.h"
#include "cacheserver/select/exact_pages.h"
#include "cacheserver/select/page_fills.h"
#include "kernels/distance.h"
#include "kernels/nearest.h"

namespace icecache {
namespace {

constexpr uint32_t kBatchRows = 1024;  // rows converted to f32 at a time: half a megabyte at 128

// [k / lift, sqrt(1 - |k|^2 / lift^2)] for `count` keys.
void LiftRows(const float* keys, uint32_t count, uint32_t dim, float lift, float* out) {
  for (uint32_t r = 0; r < count; ++r, keys += dim, out += dim + 1) {
    double square = 0;
    for (uint32_t j = 0; j < dim; ++j) {
      out[j] = lift > 0 ? keys[j] / lift : 0.0f;
      square += double{out[j]} * out[j];
    }
    out[dim] = static_cast<float>(std::sqrt(std::max(0.0, 1.0 - square)));
  }
}

}  // namespace

std::unique_ptr<SelectionPolicy> MakeDciTree(const PolicyOptions& options,
                                             const DciTreeOptions& tree_options) {
  return std::make_unique<DciTree>(options, tree_options);
}

DciTree::DciTree(const PolicyOptions& options, const DciTreeOptions& tree_options)
    : options_(options), tree_options_(tree_options) {
  KV_CHECK(options.head_dim % 16 == 0 && options.head_dim <= limits::kHeadDimMax);
  KV_CHECK(tree_options.level1_ratio > 0 && tree_options.level1_ratio < 1);
  KV_CHECK(tree_options.upper_ratio > 0 && tree_options.upper_ratio < 1);
  DrawDirection();
}

void DciTree::DrawDirection() {
  std::mt19937_64 rng(options_.seed);
  std::normal_distribution<float> normal;
  direction_.resize(options_.head_dim + 1);
  double square = 0;
  for (float& x : direction_) {
    x = normal(rng);
    square += double{x} * x;
  }
  for (float& x : direction_) x = static_cast<float>(x / std::sqrt(square));
}

uint32_t DciTree::level_size(uint32_t l) const {
  if (l == 0) return level0_count_;
  return l <= top_level() ? static_cast<uint32_t>(level(l).tokens.size()) : 0;
}

DciTree::Cell& DciTree::CellOf(const TokenInfo& child) {
  return child.parent == kRoot ? root_ : level(child.level + 1).cells[child.parent];
}

float DciTree::LiftOf(float norm) const {
  if (lift_ <= 0) return 1.0f;
  const float u = norm / lift_;
  return std::sqrt(std::max(0.0f, 1.0f - u * u));
}

float DciTree::ProjectionOf(const TokenInfo& token) const {
  const float head = lift_ > 0 ? token.head / lift_ : 0.0f;
  return SaturatedLogit(head + direction_.back() * LiftOf(token.norm));
}

// A token goes up while its level already has 1/p tokens for each one of the level above; a new top
// level opens when the top one has ceil(1/p).
uint32_t DciTree::NextLevel() {
  uint32_t l = 0;
  for (;; ++l) {
    const double ratio = l == 0 ? tree_options_.level1_ratio : tree_options_.upper_ratio;
    const uint32_t above = level_size(l + 1);
    const double full = above == 0 ? std::ceil(1 / ratio) : above / ratio;
    if (level_size(l) < full) return l;
  }
}

void DciTree::MeasureTokens(const TokenRows& rows) {
  const uint32_t dim = options_.head_dim;
  std::vector<float> keys(size_t{kBatchRows} * dim), heads(kBatchRows);
  tokens_.assign(rows.count, {});
  for (uint32_t begin = 0; begin < rows.count; begin += kBatchRows) {
    const uint32_t n = std::min(kBatchRows, rows.count - begin);
    ToF32(rows.k + begin * rows.row_bytes(), rows.dtype, size_t{n} * dim, keys.data());
    DotRows(direction_.data(), 1, reinterpret_cast<const std::byte*>(keys.data()), DType::kF32, n,
            dim, heads.data(), kBatchRows);
    for (uint32_t i = 0; i < n; ++i) {
      double square = 0;
      for (uint32_t j = 0; j < dim; ++j) square += double{keys[i * dim + j]} * keys[i * dim + j];
      TokenInfo& token = tokens_[begin + i];
      constexpr double kLargest = std::numeric_limits<float>::max() / 4;
      token.norm = static_cast<float>(std::min(std::sqrt(square), kLargest));
      token.head = SaturatedLogit(heads[i]);
      lift_ = std::max(lift_, token.norm);
    }
  }
}

void DciTree::AssignLevels(const TokenRows& rows) {
  levels_.clear();
  level0_count_ = 0;
  const uint32_t dim = options_.head_dim;
  for (uint32_t t = 0; t < rows.count; ++t) {
    const uint32_t l = NextLevel();
    tokens_[t].level = static_cast<uint8_t>(l);
    if (l == 0) {
      ++level0_count_;
      continue;
    }
    if (l > top_level()) levels_.emplace_back();
    Level& at = level(l);
    tokens_[t].node = static_cast<uint32_t>(at.tokens.size());
    at.tokens.push_back(t);
    at.keys.resize(at.keys.size() + dim);
    ToF32(rows.k + t * rows.row_bytes(), rows.dtype, dim, at.keys.data() + at.keys.size() - dim);
    at.cells.emplace_back();
  }
}

void DciTree::BuildTree(const TokenRows& rows) {
  lift_ = 0;
  root_ = {};
  MeasureTokens(rows);
  AssignLevels(rows);
  FillCells(top_level());
  for (uint32_t l = top_level(); l-- > 0;) {
    FindParents(rows, l);
    FillCells(l);
  }
}

void DciTree::FindParents(const TokenRows& rows, uint32_t l) {
  std::vector<uint32_t> level0;
  if (l == 0) {
    level0.reserve(level0_count_);
    for (uint32_t t = 0; t < rows.count; ++t)
      if (tokens_[t].level == 0) level0.push_back(t);
  }
  const std::vector<uint32_t>& tokens = l == 0 ? level0 : level(l).tokens;
  const bool anchors = l == 0 && tree_options_.anchor_interval > 0 && tokens.size() > 3000;
  if (anchors) {
    FindParentsByAnchors(rows, tokens);
  } else if (level_size(l + 1) <= tree_options_.exhaustive_parents) {
    FindParentsExhaustively(rows, l, tokens);
  } else {
    std::vector<float> key(options_.head_dim);
    for (const uint32_t t : tokens) {
      ToF32(rows.k + t * rows.row_bytes(), rows.dtype, key.size(), key.data());
      tokens_[t].parent =
          BeamParent(key.data(), tokens_[t], l + 1, tree_options_.build_field_of_view,
                     tree_options_.retrieve_share);
    }
  }
  const uint32_t dim = options_.head_dim;
  for (const uint32_t t : tokens) {
    const float* parent = level(l + 1).keys.data() + size_t{tokens_[t].parent} * dim;
    DotRows(parent, 1, rows.k + t * rows.row_bytes(), rows.dtype, 1, dim, &tokens_[t].parent_dot,
            1);
    tokens_[t].parent_dot = SaturatedLogit(tokens_[t].parent_dot);
  }
}

// A matrix product: with lifted keys the largest inner product is the nearest pivot.
void DciTree::FindParentsExhaustively(const TokenRows& rows, uint32_t l,
                                      std::span<const uint32_t> tokens) {
  const uint32_t dim = options_.head_dim;
  const Level& above = level(l + 1);
  const auto pivots = static_cast<uint32_t>(above.tokens.size());
  std::vector<float> lifted(size_t{pivots} * (dim + 1));
  LiftRows(above.keys.data(), pivots, dim, lift_, lifted.data());
  CentroidPanels panels;
  panels.Assign(lifted.data(), pivots, dim + 1);
  std::vector<float> keys(size_t{kBatchRows} * dim), batch(size_t{kBatchRows} * (dim + 1));
  std::vector<uint32_t> best(kBatchRows);
  for (size_t begin = 0; begin < tokens.size(); begin += kBatchRows) {
    const auto n = static_cast<uint32_t>(std::min<size_t>(kBatchRows, tokens.size() - begin));
    for (uint32_t i = 0; i < n; ++i)
      ToF32(rows.k + tokens[begin + i] * rows.row_bytes(), rows.dtype, dim,
            keys.data() + size_t{i} * dim);
    LiftRows(keys.data(), n, dim, lift_, batch.data());
    Nearest(panels, {batch.data(), dim + 1}, n, best.data(), nullptr);
    for (uint32_t i = 0; i < n; ++i) tokens_[tokens[begin + i]].parent = best[i];
  }
}

// The reference's shortcut: neighbours in the sequence tend to share parents. A token that is
// refused gets its exact parent at once, so that a parent's widest child counts all of its children
// so far.
void DciTree::FindParentsByAnchors(const TokenRows& rows, std::span<const uint32_t> tokens) {
  const uint32_t interval = tree_options_.anchor_interval;
  std::vector<uint32_t> anchors, candidates;
  for (size_t i = 0; i < tokens.size(); i += interval) anchors.push_back(tokens[i]);
  FindParentsExhaustively(rows, 0, anchors);
  const Level& above = level(1);
  const auto pivots = static_cast<uint32_t>(above.tokens.size());
  const uint32_t dim = options_.head_dim;
  std::vector<float> key(dim), dots(pivots), widest(pivots, 0.0f);
  const auto distance = [&](const TokenInfo& token, uint32_t pivot) {
    return 1 + Distance(SaturatedLogit(dots[pivot]), token, tokens_[above.tokens[pivot]]);
  };
  const auto nearest = [&](const TokenInfo& token, auto begin, auto end) {
    uint32_t best = *begin;
    for (auto at = begin; at != end; ++at)
      if (distance(token, *at) < distance(token, best)) best = *at;
    return best;
  };
  std::vector<uint32_t> all(pivots);
  std::iota(all.begin(), all.end(), 0u);
  for (size_t i = 0; i < tokens.size(); ++i) {
    TokenInfo& token = tokens_[tokens[i]];
    ToF32(rows.k + tokens[i] * rows.row_bytes(), rows.dtype, dim, key.data());
    const size_t here = i / interval, reach = tree_options_.anchor_neighbours;
    const size_t end = std::min(anchors.size(), here + 1 + reach);
    candidates.clear();
    for (size_t a = here >= reach ? here - reach + 1 : 0; a < end; ++a)
      candidates.push_back(tokens_[anchors[a]].parent);
    std::sort(candidates.begin(), candidates.end());
    candidates.erase(std::unique(candidates.begin(), candidates.end()), candidates.end());
    const bool anchor = i % interval == 0;
    for (const uint32_t pivot : candidates)
      DotRows(key.data(), 1,
              reinterpret_cast<const std::byte*>(above.keys.data() + size_t{pivot} * dim),
              DType::kF32, 1, dim, &dots[pivot], 1);
    if (!anchor) token.parent = nearest(token, candidates.begin(), candidates.end());
    if (!anchor &&
        distance(token, token.parent) > tree_options_.anchor_threshold * widest[token.parent]) {
      DotRows(key.data(), 1, reinterpret_cast<const std::byte*>(above.keys.data()), DType::kF32,
              pivots, dim, dots.data(), pivots);
      token.parent = nearest(token, all.begin(), all.end());
    }
    widest[token.parent] = std::max(widest[token.parent], distance(token, token.parent));
  }
}

void DciTree::FillCells(uint32_t l) {
  const auto add = [&](uint32_t t) {
    Cell& cell = CellOf(tokens_[t]);
    cell.lift = lift_;
    cell.children.push_back({ProjectionOf(tokens_[t]), t});
  };
  if (l == 0) {
    for (uint32_t t = 0; t < token_count(); ++t)
      if (tokens_[t].level == 0) add(t);
  } else {
    for (const uint32_t t : level(l).tokens) add(t);
  }
  const auto sort = [](Cell& cell) {
    std::sort(cell.children.begin(), cell.children.end());
    cell.children.shrink_to_fit();
  };
  if (l == top_level()) sort(root_);
  if (l < top_level())
    for (Cell& cell : level(l + 1).cells) sort(cell);
}

void DciTree::CutPages(PageLayout* layout) {
  constexpr uint32_t kTokens = limits::kPageTokens;
  page_tokens_.clear();
  page_fills_.clear();
  layout->tokens.clear();
  layout->page_begin.assign(1, 0);
  const auto cut = [&](const Cell& cell) {
    const auto count = static_cast<uint32_t>(cell.children.size());
    const uint32_t leaves = (count + kTokens - 1) / kTokens;
    for (uint32_t leaf = 0, at = 0; leaf < leaves; ++leaf) {
      const uint32_t end = static_cast<uint32_t>(uint64_t{count} * (leaf + 1) / leaves);
      page_fills_.push_back(0);
      page_tokens_.resize(page_tokens_.size() + kTokens, 0);
      for (; at < end; ++at) {
        layout->tokens.push_back(cell.children[at].token);
        AppendToPage(cell.children[at].token, page_count() - 1);
      }
      layout->page_begin.push_back(static_cast<uint32_t>(layout->tokens.size()));
    }
  };
  cut(root_);
  for (uint32_t l = top_level(); l > 0; --l)
    for (const Cell& cell : level(l).cells) cut(cell);
}

void DciTree::AppendToPage(uint32_t token, uint32_t page) {
  KV_CHECK(page_fills_[page] < limits::kPageTokens);
  tokens_[token].page = page;
  tokens_[token].row = page_fills_[page]++;
  page_tokens_[size_t{page} * limits::kPageTokens + tokens_[token].row] = token;
}

Result<PageLayout> DciTree::Build(const TokenRows& rows, const BuildHints&) {
  KV_CHECK(tokens_.empty());
  KV_RETURN_IF_ERROR(CheckRows(rows, options_));
  PageLayout layout;
  BuildTree(rows);
  CutPages(&layout);
  return layout;
}

// Pages keep their rows; levels, parents and cells are built anew over the survivors, because a
// lost pivot would orphan its whole cell. Cost: that of a build.
Status DciTree::Retain(std::span<const uint16_t> keep_masks, const PagedKv& pages) {
  if (keep_masks.size() != page_count() || pages.page_count != page_count())
    return InvalidArgument("retain: " + std::to_string(keep_masks.size()) + " masks for " +
                           std::to_string(page_count()) + " pages");
  for (uint32_t p = 0; p < page_count(); ++p) {
    if ((keep_masks[p] >> page_fills_[p]) != 0)
      return InvalidArgument("retain: the mask of page " + std::to_string(p) + " exceeds its fill");
    if (keep_masks[p] != 0 && pages.pages[p].k == nullptr)
      return FailedPrecondition("retain: page " + std::to_string(p) + " is not in memory; load it");
  }
  const size_t row_bytes = pages.row_bytes();
  std::vector<std::byte> keys;
  std::vector<uint32_t> new_token(token_count(), kRoot);
  uint32_t survivors = 0;
  for (uint32_t t = 0; t < token_count(); ++t) {
    if ((keep_masks[tokens_[t].page] >> tokens_[t].row & 1) == 0) continue;
    new_token[t] = survivors++;
    const std::byte* k = pages.pages[tokens_[t].page].k + tokens_[t].row * row_bytes;
    keys.insert(keys.end(), k, k + row_bytes);
  }
  const std::vector<uint32_t> old_tokens = std::move(page_tokens_);
  const std::vector<uint8_t> old_fills = std::move(page_fills_);
  page_tokens_.clear();
  page_fills_.clear();
  BuildTree({options_.dtype, options_.head_dim, survivors, keys.data(), nullptr});
  for (uint32_t p = 0; p < old_fills.size(); ++p) {
    if (keep_masks[p] == 0) continue;
    page_fills_.push_back(0);
    page_tokens_.resize(page_tokens_.size() + limits::kPageTokens, 0);
    for (uint32_t r = 0; r < old_fills[p]; ++r)
      if ((keep_masks[p] >> r & 1) != 0)
        AppendToPage(new_token[old_tokens[size_t{p} * limits::kPageTokens + r]], page_count() - 1);
  }
  return OkStatus();
}

}  // namespace icecache
