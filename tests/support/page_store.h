// PageStore: a plain owner of pages for tests and benchmarks of selection policies.
//
// Applies layouts, insert plans and retain masks as cacheserver/context/head_slice does, and
// remembers which token every row is, so that a test can say where each token lies. Errors in a
// plan come back as INTERNAL, never as a broken store. Single-threaded; frames never move.
#pragma once

#include <bit>
#include <cstring>
#include <string>
#include <vector>

#include "cacheserver/select/selection_policy.h"
#include "common/limits.h"
#include "kernels/memory.h"

namespace icecache {

class PageStore {
 public:
  PageStore(DType dtype, uint32_t head_dim) : dtype_(dtype), head_dim_(head_dim) {}

  // Stores row t of `rows` as token first_token + t. REQUIRES: an empty store.
  Status ApplyLayout(const TokenRows& rows, const PageLayout& layout) {
    if (!views_.empty()) return Internal("layout for a store that has pages");
    if (layout.tokens.size() != rows.count) return Internal("layout is not a permutation");
    std::vector<bool> seen(rows.count);
    for (uint32_t p = 0; p < layout.page_count(); ++p) {
      const uint32_t begin = layout.page_begin[p], end = layout.page_begin[p + 1];
      if (begin >= end || end - begin > limits::kPageTokens || end > rows.count)
        return Internal("layout: page " + std::to_string(p) + " is empty, too large or outside");
      AddPage();
      for (uint32_t i = begin; i < end; ++i) {
        const uint32_t t = layout.tokens[i];
        if (t >= rows.count || seen[t]) return Internal("layout is not a permutation");
        seen[t] = true;
        AddRow(p, rows.k + t * rows.row_bytes(), rows.v + t * rows.row_bytes(), t);
      }
    }
    if (layout.page_count() > 0 && layout.page_begin.back() != rows.count)
      return Internal("layout leaves tokens out");
    next_token_ = rows.count;
    return OkStatus();
  }

  // Applies what Insert(row) planned; the row becomes the next token.
  Status ApplyInsert(const InsertPlan& plan, const TokenRows& row) {
    if (plan.move.has_value()) KV_RETURN_IF_ERROR(Move(*plan.move));
    if (plan.page.value == views_.size()) AddPage();
    if (plan.page.value >= views_.size()) return Internal("plan: the page does not exist");
    if (views_[plan.page.value].fill == limits::kPageTokens)
      return Internal("plan: the page is full");
    AddRow(plan.page.value, row.k, row.v, next_token_++);
    return OkStatus();
  }

  Status ApplyRetain(std::span<const uint16_t> masks) {
    if (masks.size() != views_.size()) return Internal("retain: not one mask per page");
    uint32_t kept = 0;
    for (uint32_t p = 0; p < masks.size(); ++p) {
      Compact(p, masks[p]);
      if (views_[p].fill == 0) continue;
      std::swap(views_[kept], views_[p]);
      std::swap(tokens_[kept], tokens_[p]);
      ++kept;
    }
    views_.resize(kept);
    tokens_.resize(kept);
    return OkStatus();
  }

  PagedKv kv() const {
    return {dtype_, head_dim_, static_cast<uint32_t>(views_.size()), views_.data()};
  }
  uint32_t page_count() const { return static_cast<uint32_t>(views_.size()); }
  // Tokens of a page in row order.
  const std::vector<uint32_t>& tokens(uint32_t page) const { return tokens_[page]; }
  uint32_t token_count() const {
    uint32_t count = 0;
    for (const PageView& view : views_) count += view.fill;
    return count;
  }
  // page_of[token], for tokens below `tokens`; ~0 for those retained no more.
  std::vector<uint32_t> PageOf() const {
    std::vector<uint32_t> page_of(next_token_, ~0u);
    for (uint32_t p = 0; p < tokens_.size(); ++p)
      for (const uint32_t t : tokens_[p]) page_of[t] = p;
    return page_of;
  }

 private:
  static constexpr uint32_t kFramesPerBuffer = 1024;

  size_t row_bytes() const { return size_t{head_dim_} * DTypeBytes(dtype_); }
  size_t frame_bytes() const { return 2 * limits::kPageTokens * row_bytes(); }
  std::byte* MutableK(uint32_t p) { return const_cast<std::byte*>(views_[p].k); }
  std::byte* MutableV(uint32_t p) { return const_cast<std::byte*>(views_[p].v); }

  void AddPage() {
    if (frames_used_ % kFramesPerBuffer == 0)
      buffers_.push_back(HostBuffer::Allocate(kFramesPerBuffer * frame_bytes()).value());
    std::byte* frame = buffers_.back().data() + (frames_used_++ % kFramesPerBuffer) * frame_bytes();
    views_.push_back({frame, frame + limits::kPageTokens * row_bytes(), 0});
    tokens_.emplace_back();
  }

  void AddRow(uint32_t p, const std::byte* k, const std::byte* v, uint32_t token) {
    const size_t at = views_[p].fill * row_bytes();
    std::memcpy(MutableK(p) + at, k, row_bytes());
    std::memcpy(MutableV(p) + at, v, row_bytes());
    tokens_[p].push_back(token);
    ++views_[p].fill;
  }

  // Keeps the rows of the mask, in order.
  void Compact(uint32_t p, uint16_t mask) {
    uint32_t kept = 0;
    for (uint32_t r = 0; r < views_[p].fill; ++r) {
      if ((mask >> r & 1) == 0) continue;
      std::memmove(MutableK(p) + kept * row_bytes(), views_[p].k + r * row_bytes(), row_bytes());
      std::memmove(MutableV(p) + kept * row_bytes(), views_[p].v + r * row_bytes(), row_bytes());
      tokens_[p][kept++] = tokens_[p][r];
    }
    views_[p].fill = kept;
    tokens_[p].resize(kept);
  }

  Status Move(const RowMove& move) {
    const uint32_t from = move.from.value, to = move.to.value;
    if (from >= views_.size() || to > views_.size() || from == to)
      return Internal("plan: rows move from or to a page that does not exist");
    const auto all = static_cast<uint16_t>((1u << views_[from].fill) - 1);
    if (move.mask == 0 || move.mask == all || (move.mask & ~all) != 0)
      return Internal("plan: some rows must move and some stay");
    if (to == views_.size()) AddPage();
    if (views_[to].fill + static_cast<uint32_t>(std::popcount(move.mask)) > limits::kPageTokens)
      return Internal("plan: the page that rows move to has no room for them");
    for (uint32_t r = 0; r < views_[from].fill; ++r)
      if ((move.mask >> r & 1) != 0)
        AddRow(to, views_[from].k + r * row_bytes(), views_[from].v + r * row_bytes(),
               tokens_[from][r]);
    Compact(from, static_cast<uint16_t>(all & ~move.mask));
    return OkStatus();
  }

  const DType dtype_;
  const uint32_t head_dim_;
  std::vector<PageView> views_;
  std::vector<std::vector<uint32_t>> tokens_;
  std::vector<HostBuffer> buffers_;
  uint32_t frames_used_ = 0;
  uint32_t next_token_ = 0;
};

}  // namespace icecache
