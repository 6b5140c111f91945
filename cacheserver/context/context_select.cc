// Selection over a chain of segments: one ranking under one budget.
//
// Segments select one after the other, the largest first. Each knows which pages it must beat
// (SelectRequest::floor) and reads exactly within what the ones before have left of the budget. The
// best pages of all survive, the others are attended exactly and join the residual. A chain of one
// segment pays nothing for this.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <string>

#include "cacheserver/context/context.h"
#include "kernels/distance.h"

namespace icecache {

namespace {

// A segment of fewer pages is looked at as a whole: that costs less than finding out where to look.
constexpr uint32_t kNearPagesMin = 512;

struct Candidate {
  float log_mass;
  uint32_t link;  // of the chain
  PageId page;
};

struct Link {
  const Segment* segment;
  const HeadSlice* slice;
  const std::shared_ptr<const Segment>* owner;  // nullptr: private, all in memory
};

// Reused from call to call, so that a selection allocates nothing once sizes have settled. A thread
// runs one selection at a time.
struct Scratch {
  std::vector<Link> links;
  std::vector<Selection> selections;
  std::vector<Candidate> candidates;
  std::vector<uint32_t> order;  // of links, as they are asked
  std::vector<float> best;  // log masses of the best candidates so far; a heap, the least on top
  std::vector<PageId> dropped;
  AttentionStates residual;
  std::vector<float> page_lse;  // [candidates, group]
  std::vector<const wire::ResidentPage*> resident;
  std::vector<PageId> near;
};

Scratch& ThreadScratch() {
  thread_local Scratch scratch;
  return scratch;
}

// Best first; ties fall to the older segment and the lower page, so that equal input gives equal
// answers.
bool BetterCandidate(const Candidate& a, const Candidate& b) {
  if (a.log_mass != b.log_mass) return a.log_mass > b.log_mass;
  return a.link != b.link ? a.link < b.link : a.page < b.page;
}

// log of the sum of exp(q . k) over a page, for each query head.
void PageLogMass(const SelectRequest& request, const PagedKv& kv, PageId page, float* lse) {
  const PageView& view = kv.pages[page.value];
  float scores[limits::kGroupMax * limits::kPageTokens];
  DotRows(request.queries, request.group, view.k, kv.dtype, view.fill, kv.head_dim, scores,
          limits::kPageTokens);
  for (uint32_t h = 0; h < request.group; ++h) {
    float* s = scores + size_t{h} * limits::kPageTokens;
    const float max = MaxOf(s, view.fill);
    lse[h] = max + std::log(ExpShifted(s, view.fill, max, s));
  }
}

// Whether the link's residual is all of its index that is in no page it returned.
bool RestIsResidual(const SelectRequest& request, const Link& link, const Selection& selection) {
  return request.residual && (link.slice->pending_count() == 0 || selection.pages.empty());
}

// Share of the chain's mass in the surviving pages; the rest is in the residuals. Where pending
// rows are in them too, or nothing was asked for, the segment says what share of its own mass its
// pages cover: with the exact mass of those pages that gives its total.
float CoveredMass(const SelectRequest& request, Scratch& scratch, size_t kept) {
  const size_t count = scratch.candidates.size();
  const uint32_t group = request.group;
  scratch.page_lse.assign(count * group, kEmptyMax);
  const auto by_residual = [&](uint32_t link) {
    return RestIsResidual(request, scratch.links[link], scratch.selections[link]);
  };
  for (size_t i = 0; i < count; ++i) {
    const Candidate& c = scratch.candidates[i];
    if (i >= kept && by_residual(c.link)) continue;
    PageLogMass(request, scratch.links[c.link].slice->pages(), c.page,
                scratch.page_lse.data() + i * group);
  }
  double covered = 0;
  for (uint32_t h = 0; h < group; ++h) {
    float max = kEmptyMax;
    for (size_t i = 0; i < count; ++i) max = std::max(max, scratch.page_lse[i * group + h]);
    for (uint32_t link = 0; link < scratch.links.size(); ++link) {
      if (!by_residual(link)) continue;
      max = std::max(max, LogSumExp(scratch.selections[link].residual.ref(), h));
    }
    double kept_mass = 0, total = 0;
    for (uint32_t link = 0; link < scratch.links.size(); ++link) {
      Selection& s = scratch.selections[link];
      double mass = 0;
      for (size_t i = 0; i < count; ++i) {
        if (scratch.candidates[i].link != link) continue;
        const double m = std::exp(double{scratch.page_lse[i * group + h]} - max);
        mass += m;
        if (i < kept) kept_mass += m;
      }
      total += by_residual(link) ? mass + std::exp(double{LogSumExp(s.residual.ref(), h)} - max)
                                 : mass / std::clamp(double{s.covered_mass}, 1e-6, 1.0);
    }
    covered += total > 0 ? kept_mass / total : 1;
  }
  return static_cast<float>(std::min(1.0, covered / group));
}

bool NameLess(const wire::ResidentPage* a, const wire::ResidentPage* b) {
  return a->segment != b->segment ? a->segment < b->segment : a->page < b->page;
}

// Rows of the page that the worker holds already: all it named, when the name is still that of the
// page.
uint8_t HeldRows(const Scratch& scratch, SegmentId segment, PageId page,
                 const PageContent& content) {
  wire::ResidentPage name;
  name.segment = segment;
  name.page = page;
  auto it = std::lower_bound(scratch.resident.begin(), scratch.resident.end(), &name, NameLess);
  uint8_t held = 0;
  for (; it != scratch.resident.end() && !NameLess(&name, *it); ++it) {
    if ((*it)->version == content.version && (*it)->fill <= content.fill)
      held = std::max(held, (*it)->fill);
  }
  return held;
}

// lent: extents of the page's tenant are handed to this worker; else it cannot map them.
void FillPayload(SegmentId segment, PageId page, const PageContent& content, uint8_t from,
                 float log_mass, const PagePool& pool, bool lent, wire::PagePayload* out) {
  out->segment = segment;
  out->page = page;
  out->version = content.version;
  out->fill = static_cast<uint8_t>(content.fill);
  out->from = from;
  out->log_mass = log_mass;
  out->checksum = content.checksum;
  out->place = wire::PagePlace::kBody;
  out->offset = content.frame.offset;
  out->extent = lent ? pool.ExtentSerial(content.frame.extent) : 0;
  out->coded_bytes = 0;
  out->coded_checksum = 0;
  out->coded = {};
  const size_t row_bytes = content.k_rows.size() / content.fill;
  out->k_rows = content.k_rows.subspan(from * row_bytes);
  out->v_rows = content.v_rows.subspan(from * row_bytes);
  out->positions = content.positions.subspan(from * sizeof(uint32_t));
}

// Exact reads are one budget too, of the pages returned and what may be read beyond them. What is
// left of it is shared out by what each segment that is still to be asked has indexed. The answer:
// what this one may read beyond the pages it returns.
uint32_t ReadShare(const SelectRequest& request, uint64_t left, uint64_t indexed,
                   uint64_t indexed_left, uint64_t indexed_all) {
  const uint64_t pages = uint64_t{request.max_pages} * limits::kPageTokens;
  const uint64_t share = indexed_left == 0 ? left : left * indexed / indexed_left;
  const uint64_t most = request.read_cap * indexed / std::max<uint64_t>(1, indexed_all);
  return static_cast<uint32_t>(std::min<uint64_t>(most, share - std::min(share, pages)));
}

// Keeps the `count` largest of what it has been given.
void KeepBest(float value, size_t count, std::vector<float>* best) {
  if (best->size() == count) {
    if (value <= best->front()) return;
    std::pop_heap(best->begin(), best->end(), std::greater<>());
    best->pop_back();
  }
  best->push_back(value);
  std::push_heap(best->begin(), best->end(), std::greater<>());
}

// Policies that fill Selection::read and take pages that are not in memory. All others are asked when
// their whole slice is there.
bool ReadsWhatItSays(PolicyKind kind) {
  return kind == PolicyKind::kClusterTree || kind == PolicyKind::kDciTree ||
         kind == PolicyKind::kExact || kind == PolicyKind::kSequential;
}

// The pages that links select are candidates.
void SelectLinks(const SelectRequest& request, std::span<const uint32_t> near,
                 AttentionBackend& attention, Scratch& scratch, uint32_t* tokens_read) {
  const auto indexed = [&](uint32_t i) { return scratch.links[i].slice->indexed_count(); };
  uint64_t indexed_left = 0;
  scratch.order.clear();
  for (uint32_t i = 0; i < scratch.links.size(); ++i) {
    indexed_left += indexed(i);
    scratch.order.push_back(i);
  }
  std::sort(scratch.order.begin(), scratch.order.end(), [&](uint32_t a, uint32_t b) {
    return indexed(a) != indexed(b) ? indexed(a) > indexed(b) : a < b;
  });
  if (scratch.selections.size() < scratch.links.size())
    scratch.selections.resize(scratch.links.size());
  scratch.candidates.clear();
  scratch.best.clear();
  const uint64_t indexed_all = indexed_left;
  uint64_t left = request.read_cap + uint64_t{request.max_pages} * limits::kPageTokens;
  for (const uint32_t i : scratch.order) {
    SelectRequest part = request;
    part.read_cap = ReadShare(request, left, indexed(i), indexed_left, indexed_all);
    if (request.max_pages > 0 && scratch.best.size() == request.max_pages)
      part.floor = scratch.best.front();
    if (!near.empty() && scratch.links[i].slice->page_count() >= kNearPagesMin) {
      scratch.links[i].slice->PagesAt(near, &scratch.near);
      part.near = scratch.near;
    }
    Selection& selection = scratch.selections[i];
    scratch.links[i].slice->Select(part, attention, &selection);
    *tokens_read += selection.tokens_read;
    left -= std::min<uint64_t>(left, selection.tokens_read);
    indexed_left -= indexed(i);
    for (const SelectedPage& p : selection.pages) {
      scratch.candidates.push_back({p.log_mass, i, p.page});
      KeepBest(p.log_mass, request.max_pages, &scratch.best);
    }
  }
}

// Notes what the link's ranking wanted and did not find in memory, and that the rest was used.
void CollectMisses(const Link& link, const Selection& selection, LayerId layer, KvHeadId head,
                   Misses* misses) {
  if (link.owner == nullptr) return;
  PageTable& table = link.slice->table();
  if (table.cold_count() == 0 && table.loading_count() == 0) {
    for (const PageId page : selection.read) table.Touch(page);
    for (const SelectedPage& page : selection.pages) table.Touch(page.page);
    return;
  }
  Misses::Slice missing{*link.owner, layer, head, false, {}};
  const auto look = [&](PageId page) {
    if (table.residency(page) == Residency::kWarm) return table.Touch(page);
    missing.pages.push_back(page);
  };
  for (const PageId page : selection.read) look(page);
  for (const SelectedPage& page : selection.pages) look(page.page);
  if (missing.pages.empty()) return;
  std::sort(missing.pages.begin(), missing.pages.end());
  const auto end = std::unique(missing.pages.begin(), missing.pages.end());
  missing.pages.erase(end, missing.pages.end());
  misses->slices.push_back(std::move(missing));
}

// Ranks the pages of all links and folds those that did not make it into the residual of their
// segment. Returns how many of scratch.candidates are kept.
size_t RankChain(const SelectRequest& request, AttentionBackend& attention, Scratch& scratch) {
  if (scratch.links.size() > 1)
    std::sort(scratch.candidates.begin(), scratch.candidates.end(), BetterCandidate);
  const size_t kept = std::min<size_t>(request.max_pages, scratch.candidates.size());
  if (!request.residual || kept == scratch.candidates.size()) return kept;
  for (uint32_t i = 0; i < scratch.links.size(); ++i) {
    scratch.dropped.clear();
    for (size_t c = kept; c < scratch.candidates.size(); ++c) {
      if (scratch.candidates[c].link == i) scratch.dropped.push_back(scratch.candidates[c].page);
    }
    if (scratch.dropped.empty()) continue;
    attention.AttendPages(request.queries, scratch.links[i].slice->pages(), scratch.dropped,
                          scratch.selections[i].residual.ref());
  }
  return kept;
}

// Attends to those of the chosen pages that the worker does not hold as they are, into
// scratch.residual, and marks them. pages[i] is candidate i.
void AttendMissing(const SelectRequest& request, AttentionBackend& attention, Scratch& scratch,
                   std::span<wire::PagePayload> pages) {
  for (uint32_t link = 0; link < scratch.links.size(); ++link) {
    scratch.dropped.clear();
    for (size_t i = 0; i < pages.size(); ++i) {
      if (scratch.candidates[i].link != link || pages[i].from == pages[i].fill) continue;
      scratch.dropped.push_back(scratch.candidates[i].page);
      pages[i].from = pages[i].fill;
      pages[i].place = wire::PagePlace::kAttended;
      pages[i].k_rows = pages[i].v_rows = pages[i].positions = {};
    }
    if (scratch.dropped.empty()) continue;
    attention.AttendPages(request.queries, scratch.links[link].slice->pages(), scratch.dropped,
                          scratch.residual.ref());
  }
}

}  // namespace

void Context::ListLinks(LayerId layer, KvHeadId head, Misses* misses) const {
  Scratch& scratch = ThreadScratch();
  scratch.links.clear();
  for (const std::shared_ptr<const Segment>& segment : chain_) {
    const HeadSlice* slice = segment->slice(layer, head);
    if (!slice->index_loaded()) {
      misses->slices.push_back({segment, layer, head, true, {}});
    } else if (slice->page_count() > 0) {
      scratch.links.push_back({segment.get(), slice, &segment});
      if (ReadsWhatItSays(segment->spec().policy)) continue;
      std::vector<PageId> cold = slice->table().ColdPages();
      if (!cold.empty()) misses->slices.push_back({segment, layer, head, false, std::move(cold)});
    }
  }
  const HeadSlice* slice = tail_ ? tail_->slice(layer, head) : nullptr;
  if (slice != nullptr && (slice->page_count() > 0 || slice->pending_count() > 0)) {
    scratch.links.push_back({tail_.get(), slice, nullptr});
  }
}

Status Context::Select(LayerId layer, KvHeadId head, const SelectRequest& request,
                       std::span<const wire::ResidentPage> resident, wire::HeadSelection* out,
                       Misses* misses, const AnswerOptions& options) const {
  KV_RETURN_IF_ERROR(CheckSlice(layer, head));
  if (request.group != spec_.shape.group()) {
    return InvalidArgument("select: " + std::to_string(request.group) +
                           " query heads, the context has " + std::to_string(spec_.shape.group()) +
                           " per kv head");
  }
  Scratch& scratch = ThreadScratch();
  const size_t missed = misses->slices.size();
  ListLinks(layer, head, misses);
  if (misses->slices.size() > missed) return OkStatus();

  out->head = head;
  out->tokens_read = 0;
  SelectLinks(request, options.near, attention_, scratch, &out->tokens_read);
  for (size_t i = 0; i < scratch.links.size(); ++i) {
    CollectMisses(scratch.links[i], scratch.selections[i], layer, head, misses);
  }
  if (misses->slices.size() > missed) return OkStatus();
  const size_t kept = RankChain(request, attention_, scratch);
  out->covered_mass = 1;  // of an empty index
  if (scratch.links.size() == 1) {
    out->covered_mass = scratch.selections[0].covered_mass;
  } else if (!scratch.candidates.empty()) {
    out->covered_mass = CoveredMass(request, scratch, kept);
  }

  scratch.resident.clear();
  for (const wire::ResidentPage& page : resident) scratch.resident.push_back(&page);
  std::sort(scratch.resident.begin(), scratch.resident.end(), NameLess);
  out->pages.resize(kept);
  for (size_t i = 0; i < kept; ++i) {
    const Candidate& c = scratch.candidates[i];
    const Link& link = scratch.links[c.link];
    const PageContent content = link.slice->page(c.page);
    uint8_t held = HeldRows(scratch, link.segment->id(), c.page, content);
    if (options.whole_pages && held < content.fill) held = 0;
    FillPayload(link.segment->id(), c.page, content, held, c.log_mass, pool_,
                link.segment->spec().tenant == spec_.tenant, &out->pages[i]);
  }

  out->residual.clear();
  if (!request.residual && !options.attend_missing) return OkStatus();
  scratch.residual.Reset(request.group, spec_.shape.head_dim);
  for (size_t i = 0; request.residual && i < scratch.links.size(); ++i) {
    MergeStates(scratch.selections[i].residual.ref(), scratch.residual.ref());
  }
  if (options.attend_missing) AttendMissing(request, attention_, scratch, out->pages);
  const std::span<const float> flat = scratch.residual.flat();
  out->residual.assign(flat.begin(), flat.end());
  return OkStatus();
}

Status Context::FetchPages(LayerId layer, KvHeadId head, std::span<const wire::ResidentPage> names,
                           wire::HeadSelection* out, Misses* misses) const {
  KV_RETURN_IF_ERROR(CheckSlice(layer, head));
  out->head = head;
  out->pages.clear();
  out->residual.clear();
  out->covered_mass = 0;
  out->tokens_read = 0;
  for (const wire::ResidentPage& name : names) {
    const std::shared_ptr<const Segment>* shared = nullptr;
    for (const auto& segment : chain_) {
      if (segment->id() == name.segment) shared = &segment;
    }
    const bool own = tail_ && tail_->id() == name.segment;
    if (shared == nullptr && !own) continue;
    const HeadSlice* slice = (own ? *tail_ : **shared).slice(layer, head);
    if (!slice->index_loaded()) {
      misses->slices.push_back({*shared, layer, head, true, {}});
    } else if (!slice->HasPage(name.page, name.version)) {
      continue;
    } else if (slice->table().residency(name.page) != Residency::kWarm) {
      misses->slices.push_back({*shared, layer, head, false, {name.page}});
    } else if (misses->empty()) {
      FillPayload(name.segment, name.page, slice->page(name.page), 0, 0, pool_,
                  slice->options().tenant == spec_.tenant, &out->pages.emplace_back());
    }
  }
  return OkStatus();
}

}  // namespace icecache
