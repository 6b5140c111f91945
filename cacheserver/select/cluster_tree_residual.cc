// The part of Select that accounts for everything that is not returned.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cacheserver/select/cluster_tree_search.h"
#include "kernels/distance.h"
#include "kernels/page_mass.h"

namespace icecache::cluster_tree {

namespace {
// Pages below this share of every head's mass are valued at their super's mean instead of their
// own.
constexpr float kTinyShare = 1e-4f;
// Supers below this share are valued at the mean of the slice: of a million tokens there are two
// thousand, most of them far away.
constexpr float kTinySuper = 4e-6f;
// Re-ranked pages below this share are valued at their mean: their V is not read.
constexpr float kLightShare = 2e-5f;
constexpr uint32_t kReadRows = 64;  // rows gathered before they are scored
}  // namespace

// Heavy tokens of sketched pages that nobody has read: the best by estimated weight within the cap.
void Search::FixTokens() {
  tokens_.clear();
  const uint32_t cap = request_->read_cap - std::min(request_->read_cap, unreturned_);
  if (!tree_->basis.sketched() || read_all_ || cap == 0) return;
  FindHeavyPages();
  FindTokens(cap);
  ReadTokens();
}

// Pages whose mass is that of a heavy token at least; those read or returned anyway stay out of it.
void Search::FindHeavyPages() {
  spare_.assign(share_.begin(), share_.end());
  for (uint32_t c = 0; c < candidates_.size(); ++c) {
    if (candidate_read_[c] != 0 || candidate_chosen_[c] != 0) spare_[candidates_[c]] = 0;
  }
  heavy_slot_.clear();
  heavy_pages_.clear();
  found_.clear();
  for (uint32_t m = 0; m < sketch_count_; ++m) {
    const uint32_t slot = SketchSlot(m);
    if (spare_[slot] < options_->token_threshold || !InMemory(PageOf(slot))) continue;
    found_.push_back(m);
    heavy_slot_.push_back(slot);
    heavy_pages_.push_back(sketch_pages_[m]);
  }
  const size_t count = found_.size();
  heavy_centre_.resize(group_ * count);
  for (uint32_t g = 0; g < group_; ++g) {
    const float shift = sketch_ref_[g] - ref_[g];
    for (size_t h = 0; h < count; ++h)
      heavy_centre_[g * count + h] = sketch_centre_[g * sketch_stride_ + found_[h]] + shift;
  }
}

// Fills tokens_ with the heavy ones, in order, whose rows are on their way from memory then.
void Search::FindTokens(uint32_t cap) {
  const size_t pages = heavy_slot_.size();
  const size_t lanes = pages * kBlockRows;
  heavy_weight_.resize(group_ * lanes);
  ScoreSketches(fine_, heavy_pages_.data(), static_cast<uint32_t>(pages), heavy_centre_.data(),
                pages, heavy_weight_.data());
  spare_.resize(lanes);  // a token's share of a head's indexed mass, largest over the group
  for (uint32_t g = 0; g < group_; ++g) {
    MaxScaled(heavy_weight_.data() + g * lanes, lanes, 1.0f / indexed_[g], g == 0, spare_.data());
  }
  found_.resize(lanes + kBlockRows);
  found_.resize(IndicesAtLeast(spare_.data(), lanes, options_->token_threshold, found_.data()));
  if (found_.size() > cap) {
    maxima_.clear();
    for (const uint32_t at : found_) maxima_.push_back(spare_[at]);
    std::nth_element(maxima_.begin(), maxima_.begin() + cap, maxima_.end(), std::greater<>());
    const float least = maxima_[cap];
    std::erase_if(found_, [&](uint32_t at) { return spare_[at] <= least; });
  }
  for (const uint32_t at : found_) {
    tokens_.push_back({at / kBlockRows, at % kBlockRows});
    Prefetch(RowOf(tokens_.back(), false), kv_->row_bytes());
    Prefetch(RowOf(tokens_.back(), true), kv_->row_bytes());
  }
}

const std::byte* Search::RowOf(const Token& token, bool value) const {
  const PageView& page = kv_->pages[PageOf(heavy_slot_[token.page])];
  return (value ? page.v : page.k) + token.lane * kv_->row_bytes();
}

// token_logits_ = exact logits of tokens_.
void Search::ReadTokens() {
  const size_t count = tokens_.size();
  token_logits_.resize(group_ * count);
  for (size_t first = 0; first < count; first += kReadRows) {
    const size_t n = GatherRows(first, false);
    DotRows(request_->queries, group_, rows_.data(), kv_->dtype, static_cast<uint32_t>(n), dim_,
            token_logits_.data() + first, count);
  }
  for (float& x : token_logits_) x = Sane(x);
  out_->tokens_read += static_cast<uint32_t>(count);
}

// Copies the rows of up to kReadRows tokens from `first` on into rows_, and returns how many.
size_t Search::GatherRows(size_t first, bool value) {
  const size_t row_bytes = kv_->row_bytes();
  const size_t count = tokens_.size();
  const size_t n = std::min<size_t>(kReadRows, count - first);
  rows_.resize(kReadRows * row_bytes);
  for (size_t t = first; t < first + n; ++t) {
    std::memcpy(rows_.data() + (t - first) * row_bytes, RowOf(tokens_[t], value), row_bytes);
  }
  return n;
}

void Search::Residual() {
  FixTokens();
  const AttentionStateRef states = out_->residual.ref();
  const size_t count = tokens_.size();
  weight_.assign(group_, 0.0f);  // becomes the factor from the old reference to the new one
  for (uint32_t g = 0; g < group_; ++g) {
    const float ref = std::max(ref_[g], MaxOf(token_logits_.data() + g * count, count));
    weight_[g] = std::exp(ref_[g] - ref);
    ref_[g] = ref;
    states.max[g] = ref;
    states.denom[g] = 0;
    if (count > 0)
      ExpShifted(token_logits_.data() + g * count, count, ref, token_logits_.data() + g * count);
  }
  candidate_valued_.assign(candidates_.size(), 0);
  item_rows_.clear();
  items_max_ = size_t{slots_} + tree_->super_count();
  item_weights_.resize(group_ * items_max_);
  item_sum_.assign(group_, 0.0f);
  AddReadPages(states);
  AddFixedTokens(states);
  AddEstimates(states);
  for (uint32_t g = 0; g < group_; ++g) {
    if (states.denom[g] > 0) continue;
    states.max[g] = kEmptyMax;
    states.denom[g] = 0;
    std::fill_n(states.row(g), dim_, 0.0f);
  }
}

// Pages that were re-ranked but not returned: exact, unless so light that their mean value will do.
void Search::AddReadPages(const AttentionStateRef& states) {
  const auto count = static_cast<uint32_t>(candidates_.size());
  const size_t stride = size_t{count} * kPageRows;
  found_.clear();
  for (uint32_t c = 0; c < count; ++c) {
    if (candidate_read_[c] == 0 || candidate_chosen_[c] != 0) continue;
    if (!read_all_ && share_[candidates_[c]] < kLightShare) continue;
    candidate_valued_[c] = 1;
    found_.push_back(c);
  }
  for (const uint32_t c : found_) {
    const PageView& page = kv_->pages[PageOf(candidates_[c])];
    for (uint32_t g = 0; g < group_; ++g) {
      states.denom[g] += candidate_mass_[size_t{g} * count + c] * weight_[g];
      if (weight_[g] == 1.0f) continue;
      float* weights = logits_.data() + g * stride + size_t{c} * kPageRows;
      for (uint32_t t = 0; t < kPageRows; ++t) weights[t] *= weight_[g];
    }
    AddWeightedRows(logits_.data() + size_t{c} * kPageRows, stride, group_, page.v, kv_->dtype,
                    page.fill, dim_, states.out);
  }
}

// Tokens read one by one are exact.
void Search::AddFixedTokens(const AttentionStateRef& states) {
  const size_t count = tokens_.size();
  for (size_t first = 0; first < count;) first = AddRestOfPage(first, states);
  for (size_t first = 0; first < count; first += kReadRows) {
    const size_t n = GatherRows(first, true);
    AddWeightedRows(token_logits_.data() + first, count, group_, rows_.data(), kv_->dtype,
                    static_cast<uint32_t>(n), dim_, states.out);
  }
}

// What is left of the page of token `first` keeps its estimated mass, valued at the mean of its
// other tokens: (n mean - sum of the read ones) / (n - read), by weights alone. Returns the first
// token of the next page.
size_t Search::AddRestOfPage(size_t first, const AttentionStateRef& states) {
  const size_t count = tokens_.size();
  const size_t lanes = heavy_slot_.size() * kBlockRows;
  const uint32_t slot = heavy_slot_[tokens_[first].page];
  size_t end = first;
  while (end < count && tokens_[end].page == tokens_[first].page) ++end;
  const uint32_t page_index = PageOf(slot);
  const Page& page = tree_->pages[page_index];
  const auto others = static_cast<float>(page.count - (end - first));
  for (uint32_t g = 0; g < group_; ++g) {
    float& mass = mass_[size_t{g} * slots_ + slot];
    float left = mass;
    for (size_t t = first; t < end; ++t) {
      left -= heavy_weight_[g * lanes + tokens_[t].page * kBlockRows + tokens_[t].lane];
    }
    const float rest = others > 0 ? std::max(0.0f, left) * weight_[g] / others : 0.0f;
    mass = 0;
    float* exact = token_logits_.data() + g * count;
    states.denom[g] += rest * others;
    for (size_t t = first; t < end; ++t) {
      states.denom[g] += exact[t];
      exact[t] -= rest;
    }
    weight_scratch_[g] = rest * static_cast<float>(page.count);
  }
  share_[slot] = 0;  // its estimate is accounted for
  AddItem(tree_->values.signed_row(page_index), page.value_scale);
  return end;
}

// Notes a mean value row, to be added with weight_scratch_[g].
void Search::AddItem(const int8_t* row, float scale) {
  const size_t item = item_rows_.size();
  item_rows_.push_back(row);
  for (uint32_t g = 0; g < group_; ++g) {
    item_weights_[g * items_max_ + item] = weight_scratch_[g] * scale;
    item_sum_[g] += weight_scratch_[g];
  }
}

// Pages of some weight are valued at their own means; their masses become 0.
void Search::AddHeavyPages(const AttentionStateRef& states) {
  found_.resize(slots_ + kBlockRows);
  const size_t found = IndicesAtLeast(share_.data(), slots_, kTinyShare, found_.data());
  const size_t item = item_rows_.size();
  item_rows_.resize(item + found);
  found_scale_.resize(found);
  for (size_t f = 0; f < found; ++f) {
    const uint32_t page = PageOf(found_[f]);
    item_rows_[item + f] = tree_->values.signed_row(page);
    Prefetch(reinterpret_cast<const std::byte*>(item_rows_[item + f]), dim_);
    found_scale_[f] = tree_->pages[page].value_scale;
  }
  for (uint32_t g = 0; g < group_; ++g) {
    float* mass = mass_.data() + size_t{g} * slots_;
    float* weights = item_weights_.data() + g * items_max_ + item;
    const float weight = weight_[g];
    float sum = 0;
    for (size_t f = 0; f < found; ++f) {
      const float w = mass[found_[f]] * weight;
      mass[found_[f]] = 0;
      weights[f] = w * found_scale_[f];
      sum += w;
    }
    states.denom[g] += sum;
    item_sum_[g] += sum;
  }
}

// Everything else: mass times mean value, of pages, and of supers for tiny pages and for what was
// not scanned.
void Search::AddEstimates(const AttentionStateRef& states) {
  const uint32_t supers = tree_->super_count();
  for (uint32_t c = 0; c < candidates_.size(); ++c) {
    if (candidate_valued_[c] == 0 && candidate_chosen_[c] == 0) continue;
    for (uint32_t g = 0; g < group_; ++g) mass_[size_t{g} * slots_ + candidates_[c]] = 0;
    share_[candidates_[c]] = 0;
  }
  AddHeavyPages(states);
  block_sums_.resize(blocks_.size());
  for (uint32_t g = 0; g < group_; ++g) {
    const float* mass = mass_.data() + size_t{g} * slots_;
    float* rest = super_mass_.data() + size_t{g} * supers;
    SumBlocks(mass, blocks_.size(), block_sums_.data());
    for (size_t b = 0; b < blocks_.size(); ++b)
      rest[tree_->super_of_block[blocks_[b]]] += block_sums_[b];
  }
  for (uint32_t s = 0; s < supers; ++s) {
    bool heavy = false;
    for (uint32_t g = 0; g < group_; ++g) {
      const float mass = super_mass_[size_t{g} * supers + s];
      heavy = heavy || mass >= kTinySuper * indexed_[g];
      weight_scratch_[g] = mass * weight_[g];
      states.denom[g] += weight_scratch_[g];
    }
    if (heavy) {
      AddItem(tree_->super_values.signed_row(s), tree_->supers[s].value_scale);
    } else {
      for (uint32_t g = 0; g < group_; ++g) item_sum_[g] += weight_scratch_[g];
    }
  }
  AddInt8Rows(item_weights_.data(), items_max_, group_, item_rows_.data(),
              static_cast<uint32_t>(item_rows_.size()), dim_, states.out);
  const float* mean = tree_->basis.value_mean.data();
  for (uint32_t g = 0; g < group_; ++g) {
    const float sum = item_sum_[g];
    float* to = states.row(g);
    for (uint32_t j = 0; j < dim_; ++j) to[j] += sum * mean[j];
  }
}

}  // namespace icecache::cluster_tree
