// How good a selection was: the same queries over every row, and what the answer makes of them.
#include <algorithm>
#include <cmath>
#include <string>

#include "cacheserver/context/context.h"

namespace icecache {

namespace {

bool InMemory(const HeadSlice& slice) {
  if (!slice.index_loaded()) return false;
  const PagedKv view = slice.pages();
  return std::all_of(view.pages, view.pages + view.page_count,
                     [](const PageView& page) { return page.k != nullptr; });
}

// Pages of a slice: all of them, or those that the selection names, with or without those that its
// residual holds already.
std::vector<PageId> PagesOf(const Segment& segment, const HeadSlice& slice,
                            const wire::HeadSelection* selection, bool attended) {
  std::vector<PageId> pages;
  const PagedKv view = slice.pages();
  if (selection == nullptr) {
    for (uint32_t p = 0; p < view.page_count; ++p) pages.emplace_back(p);
    return pages;
  }
  for (const wire::PagePayload& page : selection->pages) {
    const bool in_residual = page.place == wire::PagePlace::kAttended;
    if (page.segment == segment.id() && (attended || !in_residual)) pages.push_back(page.page);
  }
  return pages;
}

double Norm(const float* x, const float* y, uint32_t count) {
  double sum = 0;
  for (uint32_t i = 0; i < count; ++i) {
    const double difference = y == nullptr ? x[i] : x[i] - y[i];
    sum += difference * difference;
  }
  return std::sqrt(sum);
}

}  // namespace

Result<std::optional<SelectionCheck>> Context::CheckSelection(
    LayerId layer, KvHeadId head, const float* queries,
    const wire::HeadSelection& selection) const {
  KV_RETURN_IF_ERROR(CheckSlice(layer, head));
  const uint32_t group = spec_.shape.group(), dim = spec_.shape.head_dim;
  AttentionStates exact(group, dim), chosen(group, dim), answer(group, dim);
  uint64_t tokens = 0;
  bool in_memory = true;
  VisitSegments([&](const Segment& segment) {
    const HeadSlice* slice = segment.slice(layer, head);
    in_memory = in_memory && InMemory(*slice);
    tokens += slice->indexed_count() + slice->pending_count();
  });
  if (tokens == 0 || tokens > limits::kCheckTokensMax || !in_memory)
    return std::optional<SelectionCheck>();
  VisitSegments([&](const Segment& segment) {
    const HeadSlice& slice = *segment.slice(layer, head);
    const PagedKv view = slice.pages();
    const auto attend = [&](const std::vector<PageId>& pages, AttentionStates* states) {
      if (!pages.empty()) attention_.AttendPages(queries, view, pages, states->ref());
    };
    attend(PagesOf(segment, slice, nullptr, false), &exact);
    attend(PagesOf(segment, slice, &selection, true), &chosen);
    attend(PagesOf(segment, slice, &selection, false), &answer);
    if (slice.pending_count() > 0) attention_.AttendRows(queries, slice.pending(), exact.ref());
  });
  if (!selection.residual.empty()) {
    std::vector<float> flat = selection.residual;
    MergeStates({group, dim, flat.data(), flat.data() + group, flat.data() + 2 * size_t{group}},
                answer.ref());
  }
  std::vector<float> full(size_t{group} * dim), got(full.size());
  FinishStates(exact.ref(), full.data());
  FinishStates(answer.ref(), got.data());
  SelectionCheck check;
  for (uint32_t h = 0; h < group; ++h) {
    const float* right = full.data() + size_t{h} * dim;
    const double norm = Norm(right, nullptr, dim);
    const double mass = std::exp(double{LogSumExp(chosen.ref(), h)} - LogSumExp(exact.ref(), h));
    check.mass += static_cast<float>(std::min(1.0, mass) / group);
    if (norm > 0)
      check.output_error +=
          static_cast<float>(Norm(got.data() + size_t{h} * dim, right, dim) / norm / group);
  }
  return std::optional(check);
}

}  // namespace icecache
