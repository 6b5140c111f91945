// dci_tree: the paper's own structure (IceCache, arXiv 2604.10539, over Multi-level DCI), for
// comparison.
//
// Every token lives on one level, chosen by a counter that is blind to content: about every 100th
// token is a pivot of level 1, every 5th of those a pivot of level 2, and so on. A token below the
// top has one parent: its nearest pivot one level up in the lifted space, where nearest = largest
// inner product. The children of one parent are a cell, sorted by one random projection; cells are
// cut evenly into pages of at most 16. Select walks top-down with a beam per query head and returns
// pages by their best visited token; the heads of a group take turns by rank. Parameters are the
// reference's (notes/icecache.md section 1).
//
// Differences from the reference, all forced by the seam or harmless: rows leave a page only when
// it splits, so a token that a new pivot takes over changes its cell but not its page. Two things
// that the reference could do better are kept as they are, and Improved() shows what they cost: its
// anchors make both build and layout worse, its queries are projected on another scale than the
// keys.
//
// `residual` stays empty (denominator 0), min_mass and covered_mass know only visited tokens, and
// rank and read_cap are ignored: the paper has no such thing. Tokens of pages not in memory are not
// visited.
//
// Costs: Select ~ field_of_view * 100 dot products per query head; Insert scans all pivots, and
// every 100th insert a whole level (milliseconds at 131k). Bad at: recall when clusters are smaller
// than a cell.
#pragma once

#include <memory>

#include "cacheserver/select/selection_policy.h"

namespace icecache {

struct DciTreeOptions {
  double level1_ratio = 0.01;          // p1: level-1 tokens per level-0 token
  double upper_ratio = 0.2;            // p2: the same between higher levels
  uint32_t exhaustive_parents = 3000;  // larger levels are searched with a beam when building
  uint32_t build_field_of_view = 30;
  uint32_t insert_field_of_view = 20;
  uint32_t field_of_view_min = 30;
  double search_ratio = 1.5e-3;  // field of view = max(min, tokens * search_ratio)
  double retrieve_share = 0.8;   // share of a cell that a query scores
  double insert_retrieve_share = 0.6;
  // Anchor shortcut of the build (0: off): every interval-th token gets its exact parent; others
  // look at the parents of `anchor_neighbours` anchors on either side and accept the best within
  // anchor_threshold * that parent's largest child distance.
  uint32_t anchor_interval = 120;
  uint32_t anchor_neighbours = 30;
  double anchor_threshold = 0.9;
  // False: a query's projection stays in units of 1 against keys in units of the largest norm, as
  // in the reference, so that cells are entered near their middle.
  bool scaled_query = false;

  static DciTreeOptions Improved() {
    DciTreeOptions options;
    options.anchor_interval = 0;
    options.scaled_query = true;
    return options;
  }
};

std::unique_ptr<SelectionPolicy> MakeDciTree(const PolicyOptions& options,
                                             const DciTreeOptions& tree_options = {});

}  // namespace icecache
