// How the tokens of a slice lie in pages: plain data that a build answers with, that a worker may
// propose, and that is checked before it is believed.
#pragma once

#include <cstdint>
#include <vector>

#include "common/status.h"

namespace icecache {

// Page p holds tokens[page_begin[p] .. page_begin[p + 1]) in that row order. tokens is a
// permutation of [0, count); page_begin has page_count + 1 entries.
struct PageLayout {
  std::vector<uint32_t> tokens;
  std::vector<uint32_t> page_begin;
  uint32_t page_count() const {
    return page_begin.empty() ? 0 : static_cast<uint32_t>(page_begin.size() - 1);
  }
};

// A layout whose neighbouring pages are grouped in supers, nodes of a tree.
struct Packing {
  PageLayout layout;
  std::vector<uint32_t> super_begin;  // first page of each super, then page_count
  uint32_t super_count() const {
    return super_begin.empty() ? 0 : static_cast<uint32_t>(super_begin.size() - 1);
  }
};

inline constexpr uint32_t kSuperPagesMax = 64;  // of a super

// The seed of a slice of a context; flat_index: layer * kv_heads + head. Server and worker compute
// the same, so that both lay the same rows out alike. Slices must not share a random sequence, or
// all heads would pick the same tokens as samples.
uint64_t SliceSeed(uint64_t context_seed, uint64_t flat_index);

// INVALID_ARGUMENT naming the page or token: a layout that is no permutation loses or doubles
// tokens for good. Cost: one pass.
Status CheckLayout(const PageLayout& layout, uint32_t token_count);
// The same, and of supers: 1 to kSuperPagesMax pages each. Neither pages nor supers so small that a
// slice takes several times its memory: at least half a page and four pages on average.
Status CheckPacking(const Packing& packing, uint32_t token_count);

}  // namespace icecache
