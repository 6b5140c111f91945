#include "cacheserver/select/sequential.h"

#include <algorithm>
#include <cmath>

#include "cacheserver/select/exact_pages.h"
#include "cacheserver/select/image.h"
#include "cacheserver/select/page_fills.h"
#include "common/limits.h"
#include "kernels/distance.h"

namespace icecache {
namespace {

struct Scratch {
  std::vector<float> estimate;    // [group][pages] log mass, replaced by exact values where read
  std::vector<float> top;         // same, largest logit
  std::vector<uint8_t> exact_of;  // per page: 1 = read exactly
  std::vector<uint8_t> returned;  // per page
  std::vector<uint8_t> take;
  std::vector<float> rank, weights;
  std::vector<uint32_t> order, candidates;
  std::vector<PageId> read;
  HeadTotals totals;
  ExactPages exact;
  AttentionStates rest;  // mean-based part of the residual
};

class Sequential final : public SelectionPolicy {
 public:
  explicit Sequential(const PolicyOptions& options) : options_(options) {}

  Result<PageLayout> Build(const TokenRows& rows, const BuildHints&) override {
    KV_CHECK(fills_.page_count() == 0);
    KV_RETURN_IF_ERROR(CheckRows(rows, options_));
    PageLayout layout = fills_.Build(rows.count);
    key_means_.reserve(size_t{fills_.page_count()} * options_.head_dim);
    value_means_.reserve(key_means_.capacity());
    for (uint32_t p = 0; p < fills_.page_count(); ++p) {
      const size_t at = layout.page_begin[p] * rows.row_bytes();
      AddMeans(rows.k + at, rows.v + at, fills_.fill(p));
    }
    return layout;
  }

  Result<InsertPlan> Insert(const TokenRows& row, const PagedKv&) override {
    KV_CHECK(row.count == 1);
    KV_RETURN_IF_ERROR(CheckRows(row, options_));
    const InsertPlan plan = fills_.Append();
    const uint32_t fill = fills_.fill(plan.page.value);
    if (fill == 1) {
      AddMeans(row.k, row.v, 1);
    } else {
      Move(row.k, fill, key_means_.data() + plan.page.value * size_t{options_.head_dim});
      Move(row.v, fill, value_means_.data() + plan.page.value * size_t{options_.head_dim});
    }
    return plan;
  }

  void Select(const SelectRequest& request, const PagedKv& kv, Selection* out) const override;

  Status Retain(std::span<const uint16_t> keep_masks, const PagedKv& pages) override {
    KV_RETURN_IF_ERROR(fills_.Validate(pages));
    for (uint32_t p = 0; p < pages.page_count && p < keep_masks.size(); ++p) {
      if (pages.pages[p].k == nullptr)
        return FailedPrecondition("retain: page " + std::to_string(p) +
                                  " is not in memory; load it first");
    }
    KV_RETURN_IF_ERROR(fills_.Retain(keep_masks));
    key_means_.clear();
    value_means_.clear();
    std::vector<std::byte> k, v;
    for (uint32_t p = 0; p < pages.page_count; ++p) {
      k.clear();
      v.clear();
      uint32_t count = 0;
      for (uint32_t r = 0; r < pages.pages[p].fill; ++r) {
        if ((keep_masks[p] >> r & 1) == 0) continue;
        const size_t at = r * pages.row_bytes();
        k.insert(k.end(), pages.pages[p].k + at, pages.pages[p].k + at + pages.row_bytes());
        v.insert(v.end(), pages.pages[p].v + at, pages.pages[p].v + at + pages.row_bytes());
        ++count;
      }
      if (count > 0) AddMeans(k.data(), v.data(), count);
    }
    return OkStatus();
  }

  void Save(std::string* image) const override {
    ImageWriter writer(PolicyKind::kSequential, options_, image);
    writer.PutAll(fills_.fills());
    writer.PutAll(key_means_);
    writer.PutAll(value_means_);
    writer.Finish();
  }

  Status Restore(std::string_view image) override {
    ImageReader reader(PolicyKind::kSequential, options_, image);
    PageFills fills;
    if (!fills.Restore(reader.GetAll<uint8_t>())) reader.Fail("a page's fill is out of range");
    auto key_means = reader.GetAllFinite();
    auto value_means = reader.GetAllFinite();
    const size_t expected = size_t{fills.page_count()} * options_.head_dim;
    if (key_means.size() != expected || value_means.size() != expected)
      reader.Fail("there are not as many means as pages");
    KV_RETURN_IF_ERROR(reader.Finish());
    fills_ = std::move(fills);
    key_means_ = std::move(key_means);
    value_means_ = std::move(value_means);
    return OkStatus();
  }

  Status Validate(const PagedKv& pages) const override {
    KV_RETURN_IF_ERROR(fills_.Validate(pages));
    std::vector<float> row(options_.head_dim);
    for (uint32_t p = 0; p < pages.page_count; ++p) {
      if (pages.pages[p].k == nullptr) continue;
      for (const bool key : {true, false}) {
        const std::byte* rows = key ? pages.pages[p].k : pages.pages[p].v;
        const float* mean = (key ? key_means_ : value_means_).data() + size_t{p} * row.size();
        std::vector<double> sum(row.size());
        double scale = 0;
        for (uint32_t r = 0; r < pages.pages[p].fill; ++r) {
          ToF32(rows + r * pages.row_bytes(), pages.dtype, row.size(), row.data());
          for (size_t j = 0; j < row.size(); ++j) {
            sum[j] += row[j];
            scale = std::max(scale, std::abs(double{row[j]}));
          }
        }
        for (size_t j = 0; j < row.size(); ++j) {
          if (std::abs(sum[j] / pages.pages[p].fill - mean[j]) > 1e-5 * scale)
            return Internal("the mean of page " + std::to_string(p) + " is off in dimension " +
                            std::to_string(j));
        }
      }
    }
    return OkStatus();
  }

  void VisitCounters(const CounterVisitor& visit) const override {
    visit("pages", fills_.page_count());
    visit("tokens", fills_.tokens());
    visit("index_bytes", static_cast<double>(fills_.fills().size() +
                                             4 * (key_means_.size() + value_means_.size())));
  }

 private:
  void AddMeans(const std::byte* k, const std::byte* v, uint32_t count) {
    const uint32_t dim = options_.head_dim;
    std::vector<float> weights(count, 1.0f / static_cast<float>(count));
    key_means_.resize(key_means_.size() + dim, 0.0f);
    value_means_.resize(value_means_.size() + dim, 0.0f);
    AddWeightedRows(weights.data(), count, 1, k, options_.dtype, count, dim,
                    key_means_.data() + key_means_.size() - dim);
    AddWeightedRows(weights.data(), count, 1, v, options_.dtype, count, dim,
                    value_means_.data() + value_means_.size() - dim);
  }

  // mean of fill - 1 rows becomes the mean of fill rows.
  void Move(const std::byte* row, uint32_t fill, float* mean) const {
    const float keep = static_cast<float>(fill - 1) / static_cast<float>(fill);
    const float add = 1.0f / static_cast<float>(fill);
    for (uint32_t j = 0; j < options_.head_dim; ++j) mean[j] *= keep;
    AddWeightedRows(&add, 1, 1, row, options_.dtype, 1, options_.head_dim, mean);
  }

  void Estimate(const SelectRequest& request, Scratch* s) const;
  void ReadBest(const SelectRequest& request, const PagedKv& kv, Scratch* s,
                std::vector<PageId>* read) const;
  void AddResidual(const SelectRequest& request, const PagedKv& kv, Scratch* s,
                   AttentionStateRef residual) const;
  PageScores ScoresOf(const SelectRequest& request, const Scratch& s) const {
    return {request.group, fills_.page_count(), fills_.page_count(), s.estimate.data(),
            s.top.data()};
  }

  const PolicyOptions options_;
  PageFills fills_;
  std::vector<float> key_means_, value_means_;  // [pages, head_dim]
};

void Sequential::Estimate(const SelectRequest& request, Scratch* s) const {
  const uint32_t pages = fills_.page_count();
  s->estimate.resize(size_t{request.group} * pages);
  s->top.resize(s->estimate.size());
  DotRows(request.queries, request.group, reinterpret_cast<const std::byte*>(key_means_.data()),
          DType::kF32, pages, options_.head_dim, s->top.data(), pages);
  for (uint32_t h = 0; h < request.group; ++h) {
    for (uint32_t p = 0; p < pages; ++p) {
      const size_t i = size_t{h} * pages + p;
      s->top[i] = SaturatedLogit(s->top[i]);
      s->estimate[i] = s->top[i] + std::log(static_cast<float>(fills_.fill(p)));
    }
  }
}

// Reads the best pages by estimate exactly and puts their exact scores into the estimate's place.
// Beyond max_pages, a page counts as a full one against the cap, so the cap holds whichever are
// returned.
void Sequential::ReadBest(const SelectRequest& request, const PagedKv& kv, Scratch* s,
                          std::vector<PageId>* read) const {
  const uint32_t pages = fills_.page_count();
  const PageScores scores = ScoresOf(request, *s);
  s->totals.Assign(scores, request.local_lse);
  RankPages(scores, s->totals, request.rank, &s->rank);
  const uint32_t extra =
      request.read_cap >= fills_.tokens() ? pages : request.read_cap / limits::kPageTokens;
  TopPages(s->rank, std::min(pages, request.max_pages + extra), &s->candidates);
  s->exact_of.assign(pages, 0);
  s->read.clear();
  read->clear();
  for (const uint32_t p : s->candidates) {
    read->emplace_back(p);
    if (kv.pages[p].k == nullptr) continue;
    s->exact_of[p] = 1;
    s->read.emplace_back(p);
  }
  s->exact.Score(request, kv, s->read);
  const PageScores exact = s->exact.scores();
  for (uint32_t h = 0; h < request.group; ++h) {
    for (size_t i = 0; i < s->read.size(); ++i) {
      s->estimate[size_t{h} * pages + s->read[i].value] = exact.log_mass[h * exact.stride + i];
      s->top[size_t{h} * pages + s->read[i].value] = exact.top[h * exact.stride + i];
    }
  }
  s->totals.Assign(scores, request.local_lse);
  RankPages(scores, s->totals, request.rank, &s->rank);
}

void Sequential::AddResidual(const SelectRequest& request, const PagedKv& kv, Scratch* s,
                             AttentionStateRef residual) const {
  const uint32_t pages = fills_.page_count();
  s->take.resize(s->read.size());
  for (size_t i = 0; i < s->read.size(); ++i) s->take[i] = !s->returned[s->read[i].value];
  s->exact.AttendTo(kv, s->take, residual);
  s->weights.resize(pages);
  s->rest.Reset(request.group, options_.head_dim);
  const AttentionStateRef sum = s->rest.ref();
  for (uint32_t h = 0; h < request.group; ++h) {
    float* mass = s->estimate.data() + size_t{h} * pages;
    for (uint32_t p = 0; p < pages; ++p)
      if (s->exact_of[p] != 0 || s->returned[p] != 0) mass[p] = kEmptyMax;
    const float max = MaxOf(mass, pages);
    if (max == kEmptyMax) continue;
    sum.max[h] = max;
    sum.denom[h] = ExpShifted(mass, pages, max, s->weights.data());
    AddWeightedRows(s->weights.data(), pages, 1,
                    reinterpret_cast<const std::byte*>(value_means_.data()), DType::kF32, pages,
                    options_.head_dim, sum.row(h));
  }
  MergeStates(sum, residual);
}

void Sequential::Select(const SelectRequest& request, const PagedKv& kv, Selection* out) const {
  thread_local Scratch s;
  out->pages.clear();
  out->read.clear();
  out->residual.Reset(request.group, options_.head_dim);
  out->covered_mass = 0;
  out->tokens_read = 0;
  const uint32_t pages = fills_.page_count();
  KV_CHECK(kv.page_count == pages);
  if (pages == 0) return;
  Estimate(request, &s);
  ReadBest(request, kv, &s, &out->read);
  const PageScores scores = ScoresOf(request, s);
  // Only pages whose rank is exact, or cannot be had exactly, compete with each other.
  std::vector<uint32_t>& order = s.order;
  order.clear();
  std::sort(s.candidates.begin(), s.candidates.end(), [&](uint32_t a, uint32_t b) {
    return s.rank[a] != s.rank[b] ? s.rank[a] > s.rank[b] : a < b;
  });
  for (const uint32_t p : s.candidates) {
    if (order.size() == request.max_pages) break;
    order.push_back(p);
  }
  out->covered_mass = CutAtMass(scores, s.totals, request.min_mass, &order);
  out->tokens_read = s.exact.tokens_read();
  s.returned.assign(pages, 0);
  for (const uint32_t p : order) {
    s.returned[p] = 1;
    out->pages.push_back({PageId(p), LargestLogMass(scores, p)});
  }
  if (request.residual) AddResidual(request, kv, &s, out->residual.ref());
}

}  // namespace

std::unique_ptr<SelectionPolicy> MakeSequential(const PolicyOptions& options) {
  return std::make_unique<Sequential>(options);
}

}  // namespace icecache
