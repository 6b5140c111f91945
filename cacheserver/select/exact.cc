#include "cacheserver/select/exact.h"

#include "cacheserver/select/exact_pages.h"
#include "cacheserver/select/image.h"
#include "cacheserver/select/page_fills.h"

namespace icecache {
namespace {

struct Scratch {
  std::vector<PageId> pages;
  ExactPages exact;
  HeadTotals totals;
  std::vector<float> rank;
  std::vector<uint32_t> order;
  std::vector<uint8_t> take;
};

class Exact final : public SelectionPolicy {
 public:
  explicit Exact(const PolicyOptions& options) : options_(options) {}

  Result<PageLayout> Build(const TokenRows& rows, const BuildHints&) override {
    KV_CHECK(fills_.page_count() == 0);
    KV_RETURN_IF_ERROR(CheckRows(rows, options_));
    return fills_.Build(rows.count);
  }

  Result<InsertPlan> Insert(const TokenRows& row, const PagedKv&) override {
    KV_CHECK(row.count == 1);
    KV_RETURN_IF_ERROR(CheckRows(row, options_));
    return fills_.Append();
  }

  void Select(const SelectRequest& request, const PagedKv& kv, Selection* out) const override {
    thread_local Scratch s;
    out->pages.clear();
    out->residual.Reset(request.group, options_.head_dim);
    out->covered_mass = 0;
    out->tokens_read = 0;
    s.pages.clear();
    out->read.clear();
    for (uint32_t p = 0; p < kv.page_count; ++p) {
      out->read.emplace_back(p);
      if (kv.pages[p].k != nullptr) s.pages.emplace_back(p);
    }
    if (s.pages.empty()) return;
    s.exact.Score(request, kv, s.pages);
    const PageScores scores = s.exact.scores();
    s.totals.Assign(scores, request.local_lse);
    RankPages(scores, s.totals, request.rank, &s.rank);
    TopPages(s.rank, request.max_pages, &s.order);
    out->covered_mass = CutAtMass(scores, s.totals, request.min_mass, &s.order);
    out->tokens_read = s.exact.tokens_read();
    s.take.assign(s.pages.size(), 1);
    for (const uint32_t i : s.order) {
      s.take[i] = 0;
      out->pages.push_back({s.pages[i], LargestLogMass(scores, i)});
    }
    if (request.residual) s.exact.AttendTo(kv, s.take, out->residual.ref());
  }

  Status Retain(std::span<const uint16_t> keep_masks, const PagedKv&) override {
    return fills_.Retain(keep_masks);
  }

  void Save(std::string* image) const override {
    ImageWriter writer(PolicyKind::kExact, options_, image);
    writer.PutAll(fills_.fills());
    writer.Finish();
  }

  Status Restore(std::string_view image) override {
    ImageReader reader(PolicyKind::kExact, options_, image);
    PageFills fills;
    if (!fills.Restore(reader.GetAll<uint8_t>())) reader.Fail("a page's fill is out of range");
    KV_RETURN_IF_ERROR(reader.Finish());
    fills_ = std::move(fills);
    return OkStatus();
  }

  Status Validate(const PagedKv& pages) const override { return fills_.Validate(pages); }

  void VisitCounters(const CounterVisitor& visit) const override {
    visit("pages", fills_.page_count());
    visit("tokens", fills_.tokens());
    visit("index_bytes", static_cast<double>(fills_.fills().capacity()));
  }

 private:
  const PolicyOptions options_;
  PageFills fills_;
};

}  // namespace

std::unique_ptr<SelectionPolicy> MakeExact(const PolicyOptions& options) {
  return std::make_unique<Exact>(options);
}

}  // namespace icecache
