#include "cacheserver/context/head_slice.h"

#include <algorithm>
#include <string>
#include <utility>

#include "kernels/distance.h"

namespace icecache {

namespace {

std::string Range(uint64_t first, uint64_t end) {
  return "[" + std::to_string(first) + ", " + std::to_string(end) + ")";
}

TokenRows RowsFrom(const TokenRows& rows, uint32_t first) {
  TokenRows rest = rows;
  rest.k += first * rows.row_bytes();
  rest.v += first * rows.row_bytes();
  rest.count -= first;
  return rest;
}

// Frames that one insert may take: for the rows that move to a page of their own, for those that
// stay, and for the new row.
constexpr uint32_t kInsertFrames = 3;

}  // namespace

HeadSlice::HeadSlice(PagePool& pool, const SliceOptions& options)
    : pool_(pool),
      options_(options),
      table_(NewTable()),
      pending_(pool, options.tenant, options.dtype, options.head_dim),
      tail_first_(options.first_position),
      next_append_(options.first_position) {}

std::unique_ptr<SelectionPolicy> HeadSlice::NewPolicy() const {
  return MakePolicy(options_.policy, {options_.dtype, options_.head_dim, options_.seed});
}

std::unique_ptr<PageTable> HeadSlice::NewTable() const {
  return std::make_unique<PageTable>(pool_, PageTable::Options{options_.tenant, options_.segment,
                                                               options_.dtype, options_.head_dim});
}

std::shared_ptr<RowBuffer> HeadSlice::NewRows() const {
  return std::make_shared<RowBuffer>(pool_, options_.tenant, options_.dtype, options_.head_dim);
}

Status HeadSlice::CheckRows(uint32_t first, const TokenRows& rows) const {
  if (rows.dtype != options_.dtype || rows.head_dim != options_.head_dim) {
    return InvalidArgument("rows of " + std::string(DTypeName(rows.dtype)) + " x " +
                           std::to_string(rows.head_dim) + ", the slice stores " +
                           std::string(DTypeName(options_.dtype)) + " x " +
                           std::to_string(options_.head_dim));
  }
  if (rows.count > limits::kContextTokensMax || first > limits::kContextTokensMax - rows.count) {
    return OutOfRange("positions " + Range(first, uint64_t{first} + rows.count) +
                      " pass the longest context of " + std::to_string(limits::kContextTokensMax) +
                      " tokens");
  }
  const size_t elements = size_t{rows.count} * rows.head_dim;
  for (const auto& [name, data] : {std::pair("K", rows.k), std::pair("V", rows.v)}) {
    if (!AllFinite(data, rows.dtype, elements)) {
      return InvalidArgument(
          std::string(name) + " rows at positions " + Range(first, uint64_t{first} + rows.count) +
          " hold a NaN or an infinity; the model's output or its dtype is broken");
    }
  }
  return OkStatus();
}

Status HeadSlice::CheckMutable(const char* what) const {
  if (sealed_) {
    return FailedPrecondition(std::string(what) +
                              ": the segment is sealed; fork the context to go on");
  }
  if (job_ == Job::kBuild) {
    return FailedPrecondition(std::string(what) +
                              ": a build of this slice is running; wait for its answer");
  }
  return OkStatus();
}

uint32_t HeadSlice::live_tail_first() const { return std::max(tail_first_, next_append_); }

uint32_t HeadSlice::end() const {
  return tail_ ? std::max(next_append_, tail_first_ + tail_->count()) : next_append_;
}

// A tail that may be changed in place: private to the slice, its row 0 the first live one.
Status HeadSlice::OwnTail() {
  const uint32_t first = live_tail_first();
  if (tail_ && tail_.use_count() == 1 && first == tail_first_) return OkStatus();
  std::shared_ptr<RowBuffer> own = NewRows();
  if (const uint32_t live = end() - next_append_; tail_ && live > 0) {
    KV_RETURN_IF_ERROR(own->Reserve(live, true));
    KV_RETURN_IF_ERROR(own->Write(0, tail_->rows(first - tail_first_, live)));
  }
  tail_ = std::move(own);
  tail_first_ = first;
  return OkStatus();
}

Status HeadSlice::PutRows(uint32_t first, const TokenRows& rows) {
  KV_RETURN_IF_ERROR(CheckMutable("put rows"));
  if (first < next_append_ || first > end()) {
    return OutOfRange("put rows " + Range(first, uint64_t{first} + rows.count) +
                      ": the unindexed rows are " + Range(next_append_, end()) +
                      "; the first position must lie in them or right behind");
  }
  KV_RETURN_IF_ERROR(CheckRows(first, rows));
  KV_RETURN_IF_ERROR(OwnTail());
  return tail_->Write(first - tail_first_, rows);
}

Result<std::unique_ptr<SliceJob>> HeadSlice::NewJob(SliceJob::Kind kind, uint32_t token_count,
                                                    std::span<const float> query_energy) {
  if (!query_energy.empty() && query_energy.size() != options_.head_dim) {
    return InvalidArgument("query energy of " + std::to_string(query_energy.size()) +
                           " elements, head_dim is " + std::to_string(options_.head_dim));
  }
  std::unique_ptr<SliceJob> job(new SliceJob);
  job->kind_ = kind;
  job->generation_ = generation_;
  job->policy_options_ = {options_.dtype, options_.head_dim, options_.seed};
  job->query_energy_.assign(query_energy.begin(), query_energy.end());
  job->token_count_ = token_count;
  job->policy_ = NewPolicy();
  job->table_ = NewTable();
  // Layouts fill their pages to .95 and more; what is missing beyond an eighth is reserved by
  // Install.
  const uint32_t full = (token_count + limits::kPageTokens - 1) / limits::kPageTokens;
  if (!job->table_->ReserveFrames(full + full / 8).ok()) {
    KV_RETURN_IF_ERROR(job->table_->ReserveFrames(full));
  }
  return job;
}

Result<std::unique_ptr<SliceJob>> HeadSlice::PrepareBuild(uint32_t token_count,
                                                          uint32_t sink_tokens,
                                                          uint32_t window_tokens,
                                                          std::span<const float> query_energy,
                                                          std::shared_ptr<const Packing> proposed) {
  if (built_count_ == token_count && job_ == Job::kNone) return std::unique_ptr<SliceJob>();
  KV_RETURN_IF_ERROR(CheckMutable("build"));
  if (built_count_ || next_append_ != options_.first_position) {
    return FailedPrecondition("build: the slice has an index up to position " +
                              std::to_string(next_append_) +
                              "; seal the context and fork it to add a prefill");
  }
  if (const uint32_t staged = end() - options_.first_position; staged != token_count) {
    return FailedPrecondition("build of " + std::to_string(token_count) +
                              " tokens: " + std::to_string(staged) +
                              " rows have arrived; put exactly the rows to build first");
  }
  const uint32_t sinks = std::min(sink_tokens, token_count);
  const uint32_t window = std::min(window_tokens, token_count - sinks);
  const uint32_t indexed = token_count - sinks - window;
  if (proposed != nullptr) {
    KV_RETURN_IF_ERROR(CheckPacking(*proposed, indexed)
                           .WithContext("build: proposed for all rows but sinks and window"));
  }
  KV_ASSIGN_OR_RETURN(std::unique_ptr<SliceJob> job,
                      NewJob(SliceJob::Kind::kBuild, indexed, query_energy));
  job->proposed_ = std::move(proposed);
  KV_RETURN_IF_ERROR(OwnTail());
  job->first_position_ = options_.first_position + sinks;
  job->first_row_ = sinks;
  job->staged_count_ = token_count;
  job->rows_ = tail_;
  job->version_ = next_version_++;
  energy_.Assign(query_energy);
  job_ = Job::kBuild;
  return job;
}

bool HeadSlice::wants_recluster() const {
  return !sealed_ && job_ == Job::kNone && inserts_since_build_ >= limits::kReclusterTokens;
}

Result<std::unique_ptr<SliceJob>> HeadSlice::PrepareRecluster() {
  KV_RETURN_IF_ERROR(CheckMutable("recluster"));
  if (job_ != Job::kNone) return FailedPrecondition("recluster: one is running already");
  const auto count = static_cast<uint32_t>(table_->token_count());
  KV_ASSIGN_OR_RETURN(std::unique_ptr<SliceJob> job,
                      NewJob(SliceJob::Kind::kRecluster, count, energy_.value()));
  job->rows_ = NewRows();
  KV_RETURN_IF_ERROR(job->rows_->Reserve(count, true));
  job->rows_->Extend(count);
  job->first_position_ = options_.first_position + sink_count();
  AddSnapshot(*job);
  job->pin_ = pool_.Pin();
  job->version_ = next_version_++;
  job_ = Job::kRecluster;
  return job;
}

Status HeadSlice::Install(std::unique_ptr<SliceJob> job) {
  KV_CHECK(job && job->done());
  if (job->generation_ != generation_)
    return Cancelled("the slice was sealed while it was being clustered");
  KV_CHECK((job->kind_ == SliceJob::Kind::kBuild) == (job_ == Job::kBuild) && job_ != Job::kNone);
  job_ = Job::kNone;
  KV_RETURN_IF_ERROR(job->status());
  KV_RETURN_IF_ERROR(PrepareInstall(*job));
  if (job->kind_ == SliceJob::Kind::kBuild) {
    InstallBuild(*job);
  } else {
    KV_RETURN_IF_ERROR(CatchUp(*job));
  }
  policy_ = std::move(job->policy_);
  table_ = std::move(job->table_);
  return OkStatus();
}

void HeadSlice::AbandonJob() {
  job_ = Job::kNone;
  ++generation_;
}

// Sinks and tail get buffers of their own; the staged rows go with the job.
Status HeadSlice::PrepareInstall(SliceJob& job) {
  KV_CHECK(job.done());
  if (!job.status().ok() || job.generation_ != generation_) return OkStatus();
  KV_RETURN_IF_ERROR(job.Complete());
  if (job.kind_ != SliceJob::Kind::kBuild || job.tail_ != nullptr) return OkStatus();
  const uint32_t sink_count = job.first_row_;
  const uint32_t tail_row = sink_count + job.token_count_;
  std::shared_ptr<RowBuffer> sinks = NewRows();
  KV_RETURN_IF_ERROR(sinks->Reserve(sink_count, true));
  KV_RETURN_IF_ERROR(sinks->Write(0, job.rows_->rows(0, sink_count)));
  std::shared_ptr<RowBuffer> tail = NewRows();
  const uint32_t tail_count = job.staged_count_ - tail_row;
  KV_RETURN_IF_ERROR(tail->Reserve(tail_count, true));
  KV_RETURN_IF_ERROR(tail->Write(0, job.rows_->rows(tail_row, tail_count)));
  job.sinks_ = std::move(sinks);
  job.tail_ = std::move(tail);
  return OkStatus();
}

void HeadSlice::InstallBuild(SliceJob& job) {
  sinks_ = std::move(job.sinks_);
  tail_ = std::move(job.tail_);
  tail_first_ = options_.first_position + job.first_row_ + job.token_count_;
  next_append_ = tail_first_;
  built_count_ = job.staged_count_;
  inserts_since_build_ = 0;
}

// Gives the re-clustered index what was indexed while it was in the making: in the old pages, the
// positions from the snapshot's end on.
Status HeadSlice::CatchUp(SliceJob& job) {
  struct Late {
    uint32_t position, page, row;
  };
  std::vector<Late> late;
  const uint32_t from = job.first_position_ + job.token_count_;
  const PagedKv view = table_->view();
  for (uint32_t p = 0; p < view.page_count; ++p) {
    const uint32_t* positions = table_->positions(PageId(p));
    for (uint32_t row = 0; row < view.pages[p].fill; ++row) {
      if (positions[row] >= from) late.push_back({positions[row], p, row});
    }
  }
  std::sort(late.begin(), late.end(),
            [](const Late& a, const Late& b) { return a.position < b.position; });
  for (const Late& l : late) {
    TokenRows row{view.dtype, view.head_dim, 1, nullptr, nullptr};
    row.k = view.pages[l.page].k + l.row * view.row_bytes();
    row.v = view.pages[l.page].v + l.row * view.row_bytes();
    KV_RETURN_IF_ERROR(InsertRow(*job.policy_, *job.table_, row, l.position));
  }
  inserts_since_build_ = late.size();
  return OkStatus();
}

Status HeadSlice::InsertRow(SelectionPolicy& policy, PageTable& table, const TokenRows& row,
                            uint32_t position) {
  // Frames first: once the policy has taken the row, the pages must follow.
  KV_RETURN_IF_ERROR(table.ReserveFrames(kInsertFrames));
  Result<InsertPlan> plan = policy.Insert(row, table.view());
  if (plan.ok()) {
    if (const std::optional<RowMove>& move = plan->move) {
      if (move->to.value == table.page_count()) table.AddPage(next_version_++);
      table.MoveRows(move->from, move->mask, move->to, next_version_++);
    }
    KV_CHECK(plan->page.value <= table.page_count());
    if (plan->page.value == table.page_count()) table.AddPage(next_version_++);
    table.AppendRow(plan->page, row.k, row.v, position);
    table.Commit(plan->page);
  }
  table.ReleaseSpares();
  return plan.ok() ? OkStatus() : plan.status();
}

Status HeadSlice::Append(uint32_t first, const TokenRows& rows) {
  KV_RETURN_IF_ERROR(CheckMutable("append"));
  if (rows.count > limits::kPendingTokensMax) {
    return InvalidArgument("append of " + std::to_string(rows.count) + " tokens, at most " +
                           std::to_string(limits::kPendingTokensMax) + " in one request");
  }
  if (first > next_append_) {
    return OutOfRange("append at position " + std::to_string(first) + ": the slice ends at " +
                      std::to_string(next_append_) + "; send the rows between first");
  }
  const uint32_t known = next_append_ - first;
  if (rows.count <= known) return OkStatus();
  const TokenRows fresh = RowsFrom(rows, known);
  KV_RETURN_IF_ERROR(CheckRows(next_append_, fresh));
  if (const uint32_t total = pending_.count() + fresh.count; total > limits::kPendingTokensMax) {
    KV_ASSIGN_OR_RETURN(const bool more, IndexPending(total - limits::kPendingTokensMax));
    (void)more;
  }
  KV_RETURN_IF_ERROR(pending_.Write(pending_.count(), fresh));
  next_append_ += fresh.count;
  return OkStatus();
}

Status HeadSlice::EnsurePolicy() {
  if (policy_) return OkStatus();
  std::unique_ptr<SelectionPolicy> policy = NewPolicy();
  const TokenRows none{options_.dtype, options_.head_dim, 0, nullptr, nullptr};
  BuildHints hints;
  hints.query_energy = energy_.value();
  hints.seed = options_.seed;
  Result<PageLayout> layout = policy->Build(none, hints);
  KV_RETURN_IF_ERROR(layout.status());
  policy_ = std::move(policy);
  return OkStatus();
}

Result<bool> HeadSlice::IndexPending(uint32_t max_tokens) {
  KV_RETURN_IF_ERROR(CheckMutable("index pending rows"));
  const uint32_t count = std::min(max_tokens, pending_.count());
  if (count == 0) return pending_.count() > 0;
  KV_RETURN_IF_ERROR(EnsurePolicy());
  const uint32_t first = next_append_ - pending_.count();
  uint32_t indexed = 0;
  Status status;
  for (; indexed < count; ++indexed) {
    status = InsertRow(*policy_, *table_, pending_.rows(indexed, 1), first + indexed);
    if (!status.ok()) break;
  }
  pending_.DropFront(indexed);
  inserts_since_build_ += indexed;
  KV_RETURN_IF_ERROR(status);
  return pending_.count() > 0;
}

Status HeadSlice::Seal() {
  if (sealed_) return OkStatus();
  KV_RETURN_IF_ERROR(CheckMutable("seal"));
  if (const uint32_t tail = end() - next_append_; tail > limits::kWindowTokensMax) {
    return FailedPrecondition("seal: " + std::to_string(tail) +
                              " rows are not indexed, a window holds at most " +
                              std::to_string(limits::kWindowTokensMax) + "; send Build first");
  }
  KV_RETURN_IF_ERROR(IndexPending(pending_.count()).status());
  if (end() > next_append_) {
    // Trimming the dead front is worth a copy, not a refusal.
    (void)OwnTail().ok();
  } else {
    tail_.reset();
    tail_first_ = next_append_;
  }
  pending_.Clear();
  sealed_ = true;
  job_ = Job::kNone;
  ++generation_;
  return OkStatus();
}

void HeadSlice::Select(const SelectRequest& request, AttentionBackend& attention,
                       Selection* out) const {
  KV_CHECK(index_loaded_);
  out->read.clear();  // not every policy says
  if (policy_ && table_->page_count() > 0) {
    policy_->Select(request, table_->view(), out);
  } else {
    out->pages.clear();
    if (request.residual) {
      out->residual.Reset(request.group, options_.head_dim);
    } else {
      out->residual.Reset(0, options_.head_dim);
    }
    out->covered_mass = 1;  // of nothing
    out->tokens_read = 0;
  }
  if (request.residual && pending_.count() > 0) {
    attention.AttendRows(request.queries, pending_.rows(), out->residual.ref());
    out->tokens_read += pending_.count();
  }
}

void HeadSlice::PagesAt(std::span<const uint32_t> positions, std::vector<PageId>* pages) const {
  pages->clear();
  for (const uint32_t position : positions) {
    if (const std::optional<PageId> page = table_->FindPosition(position)) pages->push_back(*page);
  }
  std::sort(pages->begin(), pages->end());
  pages->erase(std::unique(pages->begin(), pages->end()), pages->end());
}

bool HeadSlice::HasPage(PageId page, uint32_t version) const {
  return page.value < table_->page_count() && table_->name(page).version == version;
}

RowsView HeadSlice::sinks() const {
  RowsView view;
  view.first_position = options_.first_position;
  view.rows = {options_.dtype, options_.head_dim, 0, nullptr, nullptr};
  if (sinks_) view.rows = sinks_->rows();
  view.pin = sinks_;
  return view;
}

RowsView HeadSlice::tail() const {
  RowsView view;
  view.first_position = live_tail_first();
  view.rows = {options_.dtype, options_.head_dim, 0, nullptr, nullptr};
  if (const uint32_t live = end() - next_append_; tail_ && live > 0) {
    view.rows = tail_->rows(view.first_position - tail_first_, live);
  }
  view.pin = tail_;
  return view;
}

}  // namespace icecache
