// Build: choice of layout, summaries.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <string>

#include "cacheserver/select/cluster_tree_internal.h"
#include "kernels/distance.h"

namespace icecache::cluster_tree {

namespace {

constexpr float kSequentialTolerance =
    1.05f;  // sequential pages win when at most this much less pure
// What keys count in the choice of a layout where all of their dimensions are sketched: each is
// known then, wherever it lies, and what pages hide are values (docs/index.md, "Real heads").
constexpr double kKnownKeysShare = 0.125;

void LoadPage(const TokenRows& rows, const PageLayout& layout, uint32_t page, const Basis& basis,
              PageRows* out) {
  out->count = 0;
  // A page's rows come from anywhere in the slice: fetch the next page's while these are worked on.
  const uint32_t end = layout.page_begin[page + 1];
  const auto ahead = std::min<size_t>(layout.tokens.size(), end + kPageRows);
  for (size_t i = end; i < ahead; ++i) {
    const size_t at = layout.tokens[i] * rows.row_bytes();
    for (size_t line = 0; line < rows.row_bytes(); line += 64) {
      __builtin_prefetch(rows.k + at + line);
      __builtin_prefetch(rows.v + at + line);
    }
  }
  for (uint32_t i = layout.page_begin[page]; i < end; ++i) {
    const size_t at = layout.tokens[i] * rows.row_bytes();
    out->Add(basis, rows.dtype, rows.k + at, rows.v + at);
  }
}

Status CheckRows(const TokenRows& rows, const BuildHints& hints, uint32_t head_dim) {
  if (rows.head_dim != head_dim) {
    return InvalidArgument("cluster_tree: rows of head_dim " + std::to_string(rows.head_dim) +
                           ", expected " + std::to_string(head_dim));
  }
  if (!hints.query_energy.empty() && hints.query_energy.size() != head_dim) {
    return InvalidArgument("cluster_tree: query_energy has " +
                           std::to_string(hints.query_energy.size()) +
                           " values, expected none or head_dim = " + std::to_string(head_dim));
  }
  const size_t count = size_t{rows.count} * head_dim;
  if (!AllFinite(rows.k, rows.dtype, count))
    return InvalidArgument("cluster_tree: a key is NaN or infinite");
  if (!AllFinite(rows.v, rows.dtype, count))
    return InvalidArgument("cluster_tree: a value is NaN or infinite");
  for (float e : hints.query_energy) {
    if (!std::isfinite(e) || e < 0)
      return InvalidArgument("cluster_tree: query_energy must be finite and >= 0");
  }
  return OkStatus();
}

void FillTree(const TokenRows& rows, const Packing& packing, Tree* tree) {
  AddPages(*tree, packing.layout.page_count());
  PageRows page_rows(tree->head_dim);
  for (size_t s = 0; s + 1 < packing.super_begin.size(); ++s) {
    const uint32_t super = AddSuper(*tree);
    for (uint32_t page = packing.super_begin[s]; page < packing.super_begin[s + 1]; ++page) {
      LoadPage(rows, packing.layout, page, tree->basis, &page_rows);
      TakeSlot(*tree, super, page);
      WritePage(*tree, page, page_rows);
    }
    WriteSuper(*tree, super);
  }
  tree->tokens = rows.count;
}

}  // namespace

Result<PageLayout> Build(const TokenRows& rows, const BuildHints& hints,
                         const ClusterTreeOptions& options, uint64_t seed, Tree* tree) {
  using Layout = ClusterTreeOptions::Layout;
  KV_CHECK(tree->tokens == 0);
  KV_RETURN_IF_ERROR(CheckRows(rows, hints, tree->head_dim));
  Basis basis = BasisOf(rows, hints.query_energy);

  const uint64_t build_seed = packing::BuildSeed(seed, hints.seed);
  Packing packing = PackSequential(rows.count);
  if (options.layout == Layout::kRandom) {
    std::mt19937_64 rng(build_seed);
    std::shuffle(packing.layout.tokens.begin(), packing.layout.tokens.end(), rng);
  }
  LearnPages(rows, packing, options.sketch, &basis);
  const bool in_place = options.layout == Layout::kSequential || options.layout == Layout::kRandom;
  if (!in_place && rows.count > kPageRows) {
    Basis other = basis;
    // Where tokens are sketched, keys may differ inside a page: each one's is known well enough.
    // What is then known least of a page that nobody reads are its values.
    const bool by_value = options.layout == Layout::kContentValue ||
                          (options.layout == Layout::kAuto && basis.sketched());
    const float value_share = by_value ? kValueShare : 0.0f;
    Packing content;
    if (hints.proposed != nullptr) {
      content = *hints.proposed;
    } else {
      KV_ASSIGN_OR_RETURN(content,
                          PackContent(rows, basis, value_share, build_seed, *MakeCpuAssigner()));
    }
    LearnPages(rows, content, options.sketch, &other);
    // The metric's variance is 1 per dimension. Where values are not looked at, neighbours get a
    // bonus for having values alike.
    const float tolerance = by_value ? 1.0f : kSequentialTolerance;
    const bool known = by_value && basis.sketch_dims.size() == tree->head_dim;
    const auto impurity = [&](const Basis& of, const Packing& pages) {
      return of.page_spread * (known ? kKnownKeysShare : 1.0) +
             (by_value ? kValueShare * tree->head_dim * ValueSpread(rows, pages) : 0.0);
    };
    if (options.layout != Layout::kAuto ||
        impurity(other, content) * tolerance < impurity(basis, packing)) {
      packing = std::move(content);
      basis = std::move(other);
    }
  }
  tree->basis = std::move(basis);
  FillTree(rows, packing, tree);
  return std::move(packing.layout);
}

}  // namespace icecache::cluster_tree
