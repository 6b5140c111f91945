#include "cacheserver/select/page_fills.h"

#include <algorithm>
#include <bit>
#include <numeric>
#include <string>

#include "common/limits.h"
#include "kernels/distance.h"

namespace icecache {

PageLayout PageFills::Build(uint32_t count) {
  constexpr uint32_t kTokens = limits::kPageTokens;
  PageLayout layout;
  layout.tokens.resize(count);
  std::iota(layout.tokens.begin(), layout.tokens.end(), 0u);
  layout.page_begin.push_back(0);
  fills_.clear();
  for (uint32_t at = 0; at < count; at += kTokens) {
    fills_.push_back(static_cast<uint8_t>(std::min(kTokens, count - at)));
    layout.page_begin.push_back(at + fills_.back());
  }
  tokens_ = count;
  return layout;
}

InsertPlan PageFills::Append() {
  if (fills_.empty() || fills_.back() == limits::kPageTokens) fills_.push_back(0);
  ++fills_.back();
  ++tokens_;
  return {PageId(page_count() - 1)};
}

Status PageFills::Retain(std::span<const uint16_t> keep_masks) {
  if (keep_masks.size() != fills_.size()) {
    return InvalidArgument("retain: " + std::to_string(keep_masks.size()) + " masks for " +
                           std::to_string(fills_.size()) + " pages");
  }
  for (size_t p = 0; p < fills_.size(); ++p) {
    if ((keep_masks[p] >> fills_[p]) != 0) {
      return InvalidArgument("retain: the mask of page " + std::to_string(p) +
                             " names rows beyond its fill of " + std::to_string(fills_[p]));
    }
  }
  size_t kept = 0;
  tokens_ = 0;
  for (const uint16_t mask : keep_masks) {
    if (mask == 0) continue;
    fills_[kept] = static_cast<uint8_t>(std::popcount(mask));
    tokens_ += fills_[kept++];
  }
  fills_.resize(kept);
  return OkStatus();
}

Status PageFills::Validate(const PagedKv& pages) const {
  if (pages.page_count != fills_.size()) {
    return Internal("the index has " + std::to_string(fills_.size()) + " pages, the store " +
                    std::to_string(pages.page_count));
  }
  for (size_t p = 0; p < fills_.size(); ++p) {
    if (fills_[p] == 0 || fills_[p] > limits::kPageTokens || fills_[p] != pages.pages[p].fill) {
      return Internal("page " + std::to_string(p) + " has fill " + std::to_string(fills_[p]) +
                      " in the index and " + std::to_string(pages.pages[p].fill) + " in the store");
    }
  }
  return OkStatus();
}

bool PageFills::Restore(std::vector<uint8_t> fills) {
  uint32_t tokens = 0;
  for (const uint8_t fill : fills) {
    if (fill == 0 || fill > limits::kPageTokens) return false;
    tokens += fill;
  }
  fills_ = std::move(fills);
  tokens_ = tokens;
  return true;
}

Status CheckRows(const TokenRows& rows, const PolicyOptions& options) {
  if (rows.dtype != options.dtype || rows.head_dim != options.head_dim)
    return InvalidArgument("rows have another dtype or head_dim than the slice's " +
                           std::string(DTypeName(options.dtype)) + ", " +
                           std::to_string(options.head_dim));
  if (rows.count > limits::kContextTokensMax)
    return InvalidArgument(std::to_string(rows.count) + " tokens are more than " +
                           std::to_string(limits::kContextTokensMax));
  const size_t elements = size_t{rows.count} * rows.head_dim;
  if (!AllFinite(rows.k, rows.dtype, elements) || !AllFinite(rows.v, rows.dtype, elements)) {
    return InvalidArgument(
        "a key or value is NaN or infinite; the model's output overflowed or is corrupt, append "
        "finite values only");
  }
  return OkStatus();
}

Status CheckQueries(const BuildHints& hints, const PolicyOptions& options) {
  if (hints.queries.empty()) return OkStatus();
  const size_t group_size = size_t{hints.query_group} * options.head_dim;
  if (hints.query_group == 0 || hints.query_group > limits::kGroupMax ||
      hints.queries.size() % group_size != 0)
    return InvalidArgument("build hints: " + std::to_string(hints.queries.size()) +
                           " query elements are no whole groups of " +
                           std::to_string(hints.query_group) + " x " +
                           std::to_string(options.head_dim));
  if (!AllFinite(reinterpret_cast<const std::byte*>(hints.queries.data()), DType::kF32,
                 hints.queries.size()))
    return InvalidArgument("build hints: a query is NaN or infinite");
  return OkStatus();
}

}  // namespace icecache
