#include <algorithm>
#include <cmath>
#include <limits>

#include "cacheserver/select/dci_tree_internal.h"
#include "cacheserver/select/exact_pages.h"
#include "kernels/distance.h"

namespace icecache {
namespace {

constexpr uint32_t kScanBlock = 128;  // children taken from one side of a cell at a time

struct Scored {
  float score;  // larger is better
  uint32_t node;
  friend bool operator<(const Scored& a, const Scored& b) {
    return a.score != b.score ? a.score > b.score : a.node < b.node;
  }
};

void KeepBest(std::vector<Scored>* scored, size_t count) {
  if (scored->size() > count) {
    std::nth_element(scored->begin(), scored->begin() + static_cast<ptrdiff_t>(count),
                     scored->end());
    scored->resize(count);
  }
}

}  // namespace

// Scratch of one thread. Per page: what of it was scored and seen by the head being searched;
// stamps replace clearing.
struct DciTree::SearchScratch {
  uint64_t now = 0;                                   // stamp of the current head
  std::vector<uint64_t> scored_at, seen_at, read_at;  // per page
  std::vector<float> scores;                          // per page and row
  std::vector<float> best;                            // per page: best visited token
  std::vector<uint32_t> touched;                      // pages visited by this head
  std::vector<std::pair<uint32_t, float>> visited;    // tokens visited by this head: page and score
  std::vector<Scored> frontier, next;
  uint64_t query_now = 0;  // stamp of the current query
  uint32_t tokens_read = 0;
  std::vector<PageId> read;  // by the current query, cold ones too
  bool keep_next = false;  // children are candidates for the next level

  std::vector<std::vector<uint32_t>> lists;  // per head: pages, best first
  std::vector<std::vector<std::pair<uint32_t, float>>> visited_by_head;
  std::vector<uint32_t> rank_of;
  std::vector<PageId> pages;
  std::vector<uint8_t> chosen;
  ExactPages exact;

  void Fit(uint32_t page_count) {
    if (scored_at.size() < page_count) {
      scored_at.resize(page_count, 0);
      seen_at.resize(page_count, 0);
      read_at.resize(page_count, 0);
      best.resize(page_count);
      scores.resize(size_t{page_count} * limits::kPageTokens);
    }
  }
};

// The children [first, second) that a query at `projection` scores: blocks from the nearer side
// until `share` of the cell, and at least `at_least`, are in.
std::pair<uint32_t, uint32_t> DciTree::ScanRange(const Cell& cell, float projection,
                                                 uint32_t at_least, double share) {
  const auto count = static_cast<uint32_t>(cell.children.size());
  const auto share_count = static_cast<uint32_t>(std::ceil(share * count));
  const uint32_t wanted = std::min(count, std::max(share_count, at_least));
  const auto at =
      std::lower_bound(cell.children.begin(), cell.children.end(), Child{projection, 0});
  auto low = static_cast<uint32_t>(at - cell.children.begin());
  uint32_t high = low;
  while (high - low < wanted) {
    const float left = low > 0 ? projection - cell.children[low - 1].projection
                               : std::numeric_limits<float>::infinity();
    const float right = high < count ? cell.children[high].projection - projection
                                     : std::numeric_limits<float>::infinity();
    if (high == count || (low > 0 && left < right)) {
      low -= std::min(low, kScanBlock);
    } else {
      high = std::min(count, high + kScanBlock);
    }
  }
  return {low, high};
}

void DciTree::Visit(const Child& child, const float* query, const PagedKv& pages,
                    SearchScratch* s) const {
  const TokenInfo& info = tokens_[child.token];
  const PageView& page = pages.pages[info.page];
  if (s->read_at[info.page] != s->query_now) {
    s->read_at[info.page] = s->query_now;
    s->read.emplace_back(info.page);
    if (page.k != nullptr) s->tokens_read += page.fill;
  }
  if (page.k == nullptr) return;
  float* scores = s->scores.data() + size_t{info.page} * limits::kPageTokens;
  if (s->scored_at[info.page] != s->now) {
    // Most of a page is visited with its first token: its rows are contiguous, so all are scored.
    s->scored_at[info.page] = s->now;
    DotRows(query, 1, page.k, pages.dtype, page.fill, options_.head_dim, scores,
            limits::kPageTokens);
  }
  const float score = SaturatedLogit(scores[info.row]);
  s->visited.emplace_back(info.page, score);
  if (s->seen_at[info.page] != s->now) {
    s->seen_at[info.page] = s->now;
    s->best[info.page] = score;
    s->touched.push_back(info.page);
  } else {
    s->best[info.page] = std::max(s->best[info.page], score);
  }
  if (s->keep_next) s->next.push_back({score, info.node});
}

void DciTree::SearchHeadAt(const float* query, float projection, const PagedKv& pages,
                           uint32_t view, SearchScratch* s) const {
  ++s->now;
  s->touched.clear();
  s->visited.clear();
  s->next.clear();
  s->keep_next = top_level() > 0;
  const auto scan = [&](const Cell& cell) {
    const auto [low, high] = ScanRange(cell, projection, view, tree_options_.retrieve_share);
    for (uint32_t i = low; i < high; ++i) Visit(cell.children[i], query, pages, s);
  };
  scan(root_);
  for (uint32_t l = top_level(); l > 0; --l) {
    KeepBest(&s->next, view);
    std::swap(s->frontier, s->next);
    s->next.clear();
    s->keep_next = l > 1;
    for (const Scored& node : s->frontier) scan(level(l).cells[node.node]);
  }
}

// Widens the beam until `wanted` pages were seen, or everything was.
void DciTree::SearchHead(const float* query, const PagedKv& pages, uint32_t wanted,
                         SearchScratch* s) const {
  const uint32_t dim = options_.head_dim;
  double square = 0;
  for (uint32_t j = 0; j < dim; ++j) square += double{query[j]} * query[j];
  float dot;
  DotRows(direction_.data(), 1, reinterpret_cast<const std::byte*>(query), DType::kF32, 1, dim,
          &dot, 1);
  const double unit = tree_options_.scaled_query || lift_ <= 0 ? 1.0 : 1.0 / lift_;
  const float projection =
      square > 0 ? SaturatedLogit(static_cast<float>(unit * dot / std::sqrt(square))) : 0.0f;
  auto view = std::max<uint32_t>(tree_options_.field_of_view_min,
                                 static_cast<uint32_t>(token_count() * tree_options_.search_ratio));
  for (;; view *= 2) {
    SearchHeadAt(query, projection, pages, view, s);
    if (s->touched.size() >= wanted || view >= token_count()) break;
  }
  std::sort(s->touched.begin(), s->touched.end(), [s](uint32_t a, uint32_t b) {
    return s->best[a] != s->best[b] ? s->best[a] > s->best[b] : a < b;
  });
}

// Exact masses of the chosen pages; what was visited besides stands for the rest of the mass.
void DciTree::Report(const SelectRequest& request, const PagedKv& pages, SearchScratch* s,
                     Selection* out) const {
  s->exact.Score(request, pages, s->pages);
  const PageScores scores = s->exact.scores();
  s->chosen.assign(page_count(), 0);
  for (const PageId page : s->pages) {
    s->chosen[page.value] = 1;
    if (s->read_at[page.value] != s->query_now) s->tokens_read += pages.pages[page.value].fill;
  }
  std::vector<double> share(s->pages.size(), 0.0);
  for (uint32_t h = 0; h < request.group; ++h) {
    float max = kEmptyMax;
    for (const auto& [page, score] : s->visited_by_head[h]) max = std::max(max, score);
    for (size_t i = 0; i < s->pages.size(); ++i)
      max = std::max(max, scores.log_mass[h * scores.stride + i]);
    double total = 0;
    for (const auto& [page, score] : s->visited_by_head[h])
      if (s->chosen[page] == 0) total += std::exp(score - max);
    for (size_t i = 0; i < s->pages.size(); ++i)
      total += std::exp(scores.log_mass[h * scores.stride + i] - max);
    for (size_t i = 0; i < s->pages.size(); ++i)
      share[i] += std::exp(scores.log_mass[h * scores.stride + i] - max) / total / request.group;
  }
  double covered = 0;
  for (size_t i = 0; i < s->pages.size(); ++i) {
    out->pages.push_back({s->pages[i], LargestLogMass(scores, static_cast<uint32_t>(i))});
    covered += share[i];
    if (request.min_mass > 0 && covered >= request.min_mass) break;
  }
  out->covered_mass = static_cast<float>(std::min(covered, 1.0));
  out->tokens_read = s->tokens_read;
}

void DciTree::Select(const SelectRequest& request, const PagedKv& pages, Selection* out) const {
  thread_local SearchScratch s;
  out->pages.clear();
  out->read.clear();
  out->residual.Reset(request.group, options_.head_dim);
  out->covered_mass = 0;
  out->tokens_read = 0;
  KV_CHECK(pages.page_count == page_count());
  if (page_count() == 0 || request.max_pages == 0) return;
  s.Fit(page_count());
  s.query_now = ++s.now;
  s.tokens_read = 0;
  s.read.clear();
  s.lists.resize(request.group);
  s.visited_by_head.resize(request.group);
  const uint32_t wanted = std::min(request.max_pages, page_count());
  for (uint32_t h = 0; h < request.group; ++h) {
    SearchHead(request.queries + size_t{h} * options_.head_dim, pages, wanted, &s);
    s.lists[h].assign(
        s.touched.begin(),
        s.touched.begin() + static_cast<ptrdiff_t>(std::min<size_t>(wanted, s.touched.size())));
    std::swap(s.visited_by_head[h], s.visited);
  }
  // The heads take turns, rank by rank.
  s.pages.clear();
  s.chosen.assign(page_count(), 0);
  for (uint32_t rank = 0; rank < wanted && s.pages.size() < wanted; ++rank) {
    for (uint32_t h = 0; h < request.group && s.pages.size() < wanted; ++h) {
      if (rank >= s.lists[h].size() || s.chosen[s.lists[h][rank]] != 0) continue;
      s.chosen[s.lists[h][rank]] = 1;
      s.pages.emplace_back(s.lists[h][rank]);
    }
  }
  if (!s.pages.empty()) Report(request, pages, &s, out);
  out->read.assign(s.read.begin(), s.read.end());
}

uint32_t DciTree::BeamParent(const float* key, const TokenInfo& info, uint32_t to,
                             uint32_t field_of_view, double share) const {
  const uint32_t dim = options_.head_dim;
  const float projection = ProjectionOf(info);
  std::vector<Scored> frontier, next;
  const auto scan = [&](const Cell& cell, uint32_t l) {
    const auto [low, high] = ScanRange(cell, projection, field_of_view, share);
    for (uint32_t i = low; i < high; ++i) {
      const TokenInfo& pivot = tokens_[cell.children[i].token];
      float dot;
      DotRows(key, 1,
              reinterpret_cast<const std::byte*>(level(l).keys.data() + size_t{pivot.node} * dim),
              DType::kF32, 1, dim, &dot, 1);
      next.push_back({-Distance(SaturatedLogit(dot), info, pivot), pivot.node});
    }
  };
  scan(root_, top_level());
  for (uint32_t l = top_level(); l > to; --l) {
    KeepBest(&next, field_of_view);
    std::swap(frontier, next);
    next.clear();
    for (const Scored& node : frontier) scan(level(l).cells[node.node], l - 1);
  }
  if (next.empty()) return 0;
  return std::min_element(next.begin(), next.end())->node;
}

}  // namespace icecache
