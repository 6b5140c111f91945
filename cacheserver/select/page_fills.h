// PageFills: the bookkeeping of policies whose pages follow the order of arrival (exact,
// sequential): tokens fill page 0, then page 1, and so on.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cacheserver/select/selection_policy.h"

namespace icecache {

class PageFills {
 public:
  // The layout of `count` tokens in their own order, 16 to a page.
  PageLayout Build(uint32_t count);

  // Where the next token goes: the last page, or a new one when it is full. Counts the token.
  InsertPlan Append();

  // Applies masks (SelectionPolicy::Retain). INVALID_ARGUMENT, with nothing changed, when there are
  // not as many masks as pages or a mask names rows beyond a fill.
  Status Retain(std::span<const uint16_t> keep_masks);

  // Every page's fill equals the stored one, none is empty or too large.
  Status Validate(const PagedKv& pages) const;

  // Replaces the fills by saved ones; false when they cannot be.
  bool Restore(std::vector<uint8_t> fills);

  uint32_t page_count() const { return static_cast<uint32_t>(fills_.size()); }
  uint32_t tokens() const { return tokens_; }
  uint32_t fill(uint32_t page) const { return fills_[page]; }
  const std::vector<uint8_t>& fills() const { return fills_; }

 private:
  std::vector<uint8_t> fills_;
  uint32_t tokens_ = 0;
};

// INVALID_ARGUMENT naming the first of K and V that holds NaN or infinity, or a wrong shape.
Status CheckRows(const TokenRows& rows, const PolicyOptions& options);
// INVALID_ARGUMENT when hints.queries is no whole number of finite groups.
Status CheckQueries(const BuildHints& hints, const PolicyOptions& options);

}  // namespace icecache
