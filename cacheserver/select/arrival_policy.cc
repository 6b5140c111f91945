#include "cacheserver/select/arrival_policy.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "cacheserver/select/image.h"
#include "kernels/distance.h"

namespace icecache {

void RowGather::AddPage(const PageView& page, uint32_t mask) {
  const size_t bytes = size_t{options_.head_dim} * DTypeBytes(options_.dtype);
  for (uint32_t r = 0; r < page.fill; ++r) {
    if ((mask >> r & 1) == 0) continue;
    k_.insert(k_.end(), page.k + r * bytes, page.k + (r + 1) * bytes);
    v_.insert(v_.end(), page.v + r * bytes, page.v + (r + 1) * bytes);
  }
}

void RowGather::AddRow(const TokenRows& row) {
  k_.insert(k_.end(), row.k, row.k + row.row_bytes());
  v_.insert(v_.end(), row.v, row.v + row.row_bytes());
}

TokenRows RowGather::rows() const {
  const size_t bytes = size_t{options_.head_dim} * DTypeBytes(options_.dtype);
  return {options_.dtype, options_.head_dim, static_cast<uint32_t>(k_.size() / bytes), k_.data(),
          v_.data()};
}

ArrivalPolicy::ArrivalPolicy(PolicyKind kind, const PolicyOptions& options, RecordBytes bytes)
    : kind_(kind), options_(options), bytes_(bytes) {
  KV_CHECK(bytes.page == 0 || bytes.token == 0);
}

Result<PageLayout> ArrivalPolicy::Build(const TokenRows& rows, const BuildHints& hints) {
  KV_CHECK(fills_.page_count() == 0);
  KV_RETURN_IF_ERROR(CheckRows(rows, options_));
  KV_RETURN_IF_ERROR(CheckQueries(hints, options_));
  PageLayout layout = fills_.Build(rows.count);
  records_.assign(page_count() * page_stride(), uint8_t{0});
  if (rows.count == 0) return layout;
  Learn(rows, hints);
  if (bytes_.token > 0) Encode(rows, hints, records_.data());
  for (uint32_t p = 0; bytes_.page > 0 && p < page_count(); ++p) {
    TokenRows page = rows;
    page.k += layout.page_begin[p] * rows.row_bytes();
    page.v += layout.page_begin[p] * rows.row_bytes();
    page.count = fill(p);
    Summarise(page, record(p));
  }
  return layout;
}

Result<InsertPlan> ArrivalPolicy::Insert(const TokenRows& row, const PagedKv& pages) {
  KV_CHECK(row.count == 1);
  KV_RETURN_IF_ERROR(CheckRows(row, options_));
  const bool grows = page_count() > 0 && fill(page_count() - 1) < limits::kPageTokens;
  RowGather gather(options_);
  if (bytes_.page > 0) {
    if (grows) {
      const PageView& last = pages.pages[page_count() - 1];
      if (last.k == nullptr)
        return FailedPrecondition("insert: page " + std::to_string(page_count() - 1) +
                                  " is not in memory; load it first");
      gather.AddPage(last, 0xffff);
    }
    gather.AddRow(row);
  }
  const InsertPlan plan = fills_.Append();
  const uint32_t page = plan.page.value;
  records_.resize(page_count() * page_stride(), uint8_t{0});
  if (bytes_.page > 0) Summarise(gather.rows(), record(page));
  if (bytes_.token > 0) Encode(row, {}, record(page) + (fill(page) - 1) * bytes_.token);
  return plan;
}

Status ArrivalPolicy::RowsInMemory(const PagedKv& pages,
                                   std::span<const uint16_t> keep_masks) const {
  KV_RETURN_IF_ERROR(fills_.Validate(pages));
  for (uint32_t p = 0; p < page_count() && p < keep_masks.size(); ++p) {
    if (pages.pages[p].k == nullptr && keep_masks[p] != 0)
      return FailedPrecondition("retain: page " + std::to_string(p) +
                                " is not in memory; load it first");
  }
  return OkStatus();
}

void ArrivalPolicy::KeepPages(std::span<const uint16_t> keep_masks, const PagedKv& pages) {
  RowGather gather(options_);
  uint32_t kept = 0;
  for (uint32_t p = 0; p < pages.page_count; ++p) {
    if (keep_masks[p] == 0) continue;
    gather.Clear();
    gather.AddPage(pages.pages[p], keep_masks[p]);
    Summarise(gather.rows(), record(kept++));
  }
}

void ArrivalPolicy::KeepCells(std::span<const uint16_t> keep_masks) {
  uint32_t kept = 0;
  for (uint32_t p = 0; p < keep_masks.size(); ++p) {
    if (keep_masks[p] == 0) continue;
    uint8_t* to = record(kept++);
    for (uint32_t r = 0; r < limits::kPageTokens; ++r) {
      if ((keep_masks[p] >> r & 1) == 0) continue;
      std::memmove(to, record(p) + r * bytes_.token, bytes_.token);
      to += bytes_.token;
    }
    std::fill(to, record(kept), uint8_t{0});  // equal structures, equal bytes
  }
}

Status ArrivalPolicy::Retain(std::span<const uint16_t> keep_masks, const PagedKv& pages) {
  KV_RETURN_IF_ERROR(RowsInMemory(pages, keep_masks));
  PageFills fills = fills_;
  KV_RETURN_IF_ERROR(fills.Retain(keep_masks));
  if (bytes_.page > 0) KeepPages(keep_masks, pages);
  if (bytes_.token > 0) KeepCells(keep_masks);
  fills_ = std::move(fills);
  records_.resize(page_count() * page_stride());
  if (bytes_.token == 0) return OkStatus();
  // The rows that stay, as pages: what Kept may read.
  RowGather gather(options_);
  for (uint32_t p = 0; p < pages.page_count; ++p)
    if (keep_masks[p] != 0) gather.AddPage(pages.pages[p], keep_masks[p]);
  std::vector<PageView> views;
  const TokenRows rows = gather.rows();
  size_t at = 0;
  for (uint32_t p = 0; p < page_count(); at += fill(p++) * rows.row_bytes())
    views.push_back({rows.k + at, rows.v + at, fill(p)});
  Kept({options_.dtype, options_.head_dim, page_count(), views.data()});
  return OkStatus();
}

void ArrivalPolicy::Save(std::string* image) const {
  ImageWriter writer(kind_, options_, image);
  writer.PutAll(fills_.fills());
  writer.PutAll(records_);
  writer.PutAll(shared_);
  writer.Finish();
}

Status ArrivalPolicy::Restore(std::string_view image) {
  ImageReader reader(kind_, options_, image);
  PageFills fills;
  if (!fills.Restore(reader.GetAll<uint8_t>())) reader.Fail("a page's fill is out of range");
  std::vector<uint8_t> records = reader.GetAll<uint8_t>();
  std::vector<float> shared = reader.GetAllFinite();
  if (records.size() != fills.page_count() * page_stride())
    reader.Fail("there are not as many records as pages");
  KV_RETURN_IF_ERROR(reader.Finish());
  std::swap(fills_, fills);
  std::swap(shared_, shared);
  std::swap(records_, records);
  if (const std::string wrong = Wrong(); !wrong.empty()) {
    fills_ = std::move(fills);
    shared_ = std::move(shared);
    records_ = std::move(records);
    return DataLoss("index image: " + wrong);
  }
  return OkStatus();
}

Status ArrivalPolicy::Validate(const PagedKv& pages) const {
  KV_RETURN_IF_ERROR(fills_.Validate(pages));
  if (records_.size() != page_count() * page_stride())
    return Internal("there are not as many records as pages");
  if (const std::string wrong = Wrong(); !wrong.empty()) return Internal(wrong);
  std::vector<uint8_t> fresh(bytes_.page);
  for (uint32_t p = 0; bytes_.page > 0 && p < page_count(); ++p) {
    const PageView& page = pages.pages[p];
    if (page.k == nullptr) continue;
    Summarise({options_.dtype, options_.head_dim, page.fill, page.k, page.v}, fresh.data());
    if (!std::equal(fresh.begin(), fresh.end(), records_.begin() + p * page_stride()))
      return Internal("the summary of page " + std::to_string(p) + " is not that of its rows");
  }
  return OkStatus();
}

void ArrivalPolicy::VisitCounters(const CounterVisitor& visit) const {
  visit("pages", page_count());
  visit("tokens", tokens());
  visit("index_bytes", static_cast<double>(fills_.fills().size() + records_.size() +
                                           shared_.size() * sizeof(float)));
}

bool ArrivalPolicy::Start(const SelectRequest& request, const PagedKv& kv, Selection* out) const {
  KV_CHECK(kv.page_count == page_count());
  out->pages.clear();
  out->residual.Reset(request.group, options_.head_dim);
  out->covered_mass = 0;
  out->tokens_read = 0;
  return page_count() > 0;
}

}  // namespace icecache
