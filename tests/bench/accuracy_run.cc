#include "tests/bench/accuracy_run.h"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <optional>
#include <utility>

#include "tests/bench/accuracy_attention.h"
#include "tests/bench/accuracy_cells.h"
#include "tests/bench/accuracy_report.h"
#include "tests/bench/accuracy_sequence.h"
#include "tests/bench/measure.h"
#include "worker/attention_full.h"
#include "worker/progress.h"
#include "worker/serve/interrupt.h"
#include "worker/serve/options.h"

namespace icecache {
namespace {

// What one cell gathers over the samples of its task.
struct Gathered {
  std::vector<double> scores, errors, error_by_turn;
  SelectionStats selection;
  double micros = 0, build_ms = 0, index_bytes = 0;
  uint64_t steps = 0, tokens = 0, samples = 0;
};

void AddStats(const SelectionStats& from, SelectionStats* to) {
  for (const auto sum :
       {&SelectionStats::selections, &SelectionStats::pages, &SelectionStats::fetched,
        &SelectionStats::refetched, &SelectionStats::repeated, &SelectionStats::comparable,
        &SelectionStats::fetched_bytes, &SelectionStats::tokens_read, &SelectionStats::probed_pages,
        &SelectionStats::hot_tokens, &SelectionStats::paged_tokens})
    to->*sum += from.*sum;
}

double Ratio(uint64_t part, uint64_t whole) {
  return whole == 0 ? 0 : static_cast<double>(part) / static_cast<double>(whole);
}

class Table {
 public:
  explicit Table(const AccuracyOptions& options)
      : options_(options), backend_(MakeCpuAttention()) {}
  ~Table() {
    if (out_ != nullptr) std::fclose(out_);
  }
  Table(const Table&) = delete;
  Table& operator=(const Table&) = delete;

  Status Run();

 private:
  using Unit = std::pair<std::string, std::pair<uint32_t, uint64_t>>;  // task, length, seed
  Status Open();
  std::vector<uint32_t> Budgets(const AccuracyMethod& method) const {
    if (method.kind == AccuracyMethod::Kind::kFull) return {0};
    return options_.budgets;
  }
  bool Missing(const AccuracyMethod& method, uint32_t budget) const {
    return !cells_.contains(
        {unit_.first, method.name, budget, unit_.second.first, unit_.second.second});
  }
  bool AnyMissing(const AccuracyMethod& method) const {
    const std::vector<uint32_t> budgets = Budgets(method);
    return std::any_of(budgets.begin(), budgets.end(),
                       [&](uint32_t b) { return Missing(method, b); });
  }
  Status RunUnit();
  Status RunSample(const TaskSample& sample, bool last);
  Status ReadDocumentOf(const TaskSample& sample);
  Status RunMethod(const TaskSample& sample, const AccuracyMethod& method, bool last);
  Status RunBudget(const TaskSample& sample, const AccuracyMethod& method, uint32_t budget,
                   std::optional<IndexedDocument>* index);
  Result<SequenceResult> RunThrough(DecodeAttention& attention, PolicyAttention* policy,
                                    const TaskSample& sample, std::vector<double>* errors);
  Status Finish(const AccuracyMethod& method, uint32_t budget);
  void Progress();

  const AccuracyOptions& options_;
  const std::unique_ptr<AttentionBackend> backend_;
  const std::string commit_ = CommitName(), machine_ = MachineName(), build_ = BuildName();
  std::vector<AccuracyMethod> methods_;
  LoadedModel loaded_;
  std::map<CellName, Cell> cells_;
  std::FILE* out_ = nullptr;
  Unit unit_;
  std::map<std::pair<std::string, uint32_t>, Gathered> gathered_;  // by method and budget
  std::vector<int32_t> read_tokens_;
  std::optional<ReadDocument> document_;
  std::vector<std::vector<int32_t>> full_said_;
  std::optional<ProgressBar> bar_;
  uint64_t done_ = 0, total_ = 0;
};

Status Table::Open() {
  for (const std::string& name : options_.methods) {
    KV_ASSIGN_OR_RETURN(AccuracyMethod method, ParseAccuracyMethod(name));
    methods_.push_back(std::move(method));
  }
  WorkerOptions worker;
  worker.model = options_.model;
  worker.kv_dtype = options_.kv_dtype;
  worker.threads = options_.threads;
  KV_ASSIGN_OR_RETURN(loaded_, LoadModelAndTokenizer(worker));
  if (options_.out.empty()) return OkStatus();
  uint64_t others = 0;
  KV_ASSIGN_OR_RETURN(
      cells_, ReadCells(options_.out, options_.any_build ? std::string() : build_, &others));
  if (others > 0) {
    std::fprintf(stderr,
                 "%s: %llu cells are of another build of this program and will be made again; "
                 "--any-build takes them as they are\n",
                 options_.out.c_str(), static_cast<unsigned long long>(others));
  }
  out_ = std::fopen(options_.out.c_str(), "a+");
  if (out_ == nullptr) return Unavailable("--out " + options_.out + ": cannot be written");
  // A run that was killed may have left half a line: it stays a line of its own, which readers
  // skip.
  if (std::fseek(out_, -1, SEEK_END) == 0 && std::fgetc(out_) != '\n') {
    return FailedPrecondition("--out " + options_.out +
                              ": its last line is cut off; delete that line and go on");
  }
  return OkStatus();
}

Status Table::ReadDocumentOf(const TaskSample& sample) {
  if (document_ && read_tokens_ == sample.document) return OkStatus();
  document_.reset();
  read_tokens_ = sample.document;
  KV_ASSIGN_OR_RETURN(document_, ReadOnce(*loaded_.model, sample.document, options_.threads,
                                          options_.cache, [](uint64_t, uint64_t) {}));
  return OkStatus();
}

Result<SequenceResult> Table::RunThrough(DecodeAttention& attention, PolicyAttention* policy,
                                         const TaskSample& sample, std::vector<double>* errors) {
  MeasuredAttention measured(*document_, attention, *backend_);
  DecodeLoop loop(*loaded_.model, measured,
                  [] { return Interrupted() ? Cancelled("interrupted") : OkStatus(); });
  SequenceSpec spec;
  spec.sample = &sample;
  spec.document_tokens = document_->tokens;
  spec.full = full_said_.empty() ? nullptr : &full_said_;
  spec.begin = [&] {
    document_->kv->Truncate(document_->tokens);
    if (policy != nullptr) policy->Begin();
  };
  spec.measure = [&](bool on) {
    measured.Measure(on);
    if (policy != nullptr) policy->Probe(on);
  };
  Result<SequenceResult> result = RunSequence(loop, measured, *loaded_.tokenizer, spec);
  document_->kv->Truncate(document_->tokens);
  *errors = measured.errors();
  return result;
}

Status Table::RunBudget(const TaskSample& sample, const AccuracyMethod& method, uint32_t budget,
                        std::optional<IndexedDocument>* index) {
  const SparseBudget limits{budget, options_.sink_tokens, options_.window_tokens};
  const ModelShape& shape = document_->shape;
  Gathered& gathered = gathered_[{method.name, budget}];
  std::unique_ptr<DecodeAttention> attention;
  PolicyAttention* policy = nullptr;
  if (method.kind == AccuracyMethod::Kind::kFull) {
    attention = std::make_unique<AttentionFull>(shape, *document_->kv, *backend_);
  } else if (method.kind == AccuracyMethod::Kind::kTopK) {
    attention = std::make_unique<AttentionExact>(shape, *document_->kv, *backend_, limits);
  } else {
    // A sequence that grows changes its index, so each gets its own.
    if (!*index || sample.chained) {
      KV_ASSIGN_OR_RETURN(*index, IndexDocument(*document_, method, limits));
    }
    gathered.build_ms += (*index)->build_ms;
    gathered.index_bytes += (*index)->index_bytes;
    auto own = std::make_unique<PolicyAttention>(*document_, **index, *backend_, method, limits,
                                                 sample.chained);
    policy = own.get();
    attention = std::move(own);
  }
  std::vector<double> errors;
  KV_ASSIGN_OR_RETURN(SequenceResult result, RunThrough(*attention, policy, sample, &errors));
  if (method.kind == AccuracyMethod::Kind::kFull) full_said_ = result.said;
  gathered.scores.insert(gathered.scores.end(), result.scores.begin(), result.scores.end());
  gathered.errors.insert(gathered.errors.end(), errors.begin(), errors.end());
  gathered.error_by_turn.insert(gathered.error_by_turn.end(), result.error_by_turn.begin(),
                                result.error_by_turn.end());
  gathered.micros += result.micros;
  gathered.steps += result.steps;
  gathered.tokens += result.tokens;
  ++gathered.samples;
  if (policy != nullptr) AddStats(policy->selection_stats(), &gathered.selection);
  return OkStatus();
}

Status Table::Finish(const AccuracyMethod& method, uint32_t budget) {
  const Gathered& g = gathered_[{method.name, budget}];
  const SelectionStats& s = g.selection;
  Cell cell;
  cell.name = {unit_.first, method.name, budget, unit_.second.first, unit_.second.second};
  cell.model = loaded_.model->identity();
  cell.build = build_;
  cell.accuracy = Mean(g.scores);
  cell.questions = static_cast<uint32_t>(g.scores.size());
  cell.output_error = Mean(g.errors);
  cell.output_error_p90 = Quantile(g.errors, 0.9);
  cell.error_by_turn = g.error_by_turn;
  cell.bytes_per_token = Ratio(s.fetched_bytes, g.tokens);
  cell.ms_per_token = g.steps == 0 ? 0 : g.micros / 1e3 / static_cast<double>(g.steps);
  cell.tokens_read = Ratio(s.tokens_read, s.selections);
  cell.pages = Ratio(s.pages, s.selections);
  cell.pages_fetched = Ratio(s.fetched, s.selections);
  cell.pages_refetched = Ratio(s.refetched, s.selections);
  cell.page_overlap = Ratio(s.repeated, s.comparable);
  cell.tokens_per_page = Ratio(s.paged_tokens, s.probed_pages);
  cell.hot_tokens_per_page = Ratio(s.hot_tokens, s.probed_pages);
  cell.build_ms = g.build_ms / static_cast<double>(std::max<uint64_t>(1, g.samples));
  cell.index_bytes = g.index_bytes / static_cast<double>(std::max<uint64_t>(1, g.samples));
  const std::string line = FormatCell(cell, commit_, machine_) + "\n";
  cells_[cell.name] = std::move(cell);
  if (out_ == nullptr || options_.json) std::fputs(line.c_str(), stdout);
  if (out_ == nullptr) return OkStatus();
  const bool written = std::fputs(line.c_str(), out_) >= 0 && std::fflush(out_) == 0;
  return written ? OkStatus() : Unavailable("--out " + options_.out + ": cannot be written");
}

Status Table::RunMethod(const TaskSample& sample, const AccuracyMethod& method, bool last) {
  std::optional<IndexedDocument> index;
  for (const uint32_t budget : Budgets(method)) {
    if (!Missing(method, budget)) continue;
    KV_RETURN_IF_ERROR(RunBudget(sample, method, budget, &index).WithContext(method.name));
    if (last) KV_RETURN_IF_ERROR(Finish(method, budget));
    if (last && bar_) bar_->Update(++done_, total_);
  }
  return OkStatus();
}

Status Table::RunSample(const TaskSample& sample, bool last) {
  KV_RETURN_IF_ERROR(ReadDocumentOf(sample));
  full_said_.clear();
  if (sample.metric == Metric::kAgreement) {  // what all others are compared with
    const AccuracyMethod full = ParseAccuracyMethod("full").value();
    const Gathered before = gathered_[{full.name, 0}];
    KV_RETURN_IF_ERROR(RunBudget(sample, full, 0, nullptr));
    gathered_[{full.name, 0}] = before;
  }
  for (const AccuracyMethod& method : methods_) KV_RETURN_IF_ERROR(RunMethod(sample, method, last));
  return OkStatus();
}

Status Table::RunUnit() {
  if (std::none_of(methods_.begin(), methods_.end(),
                   [this](const AccuracyMethod& m) { return AnyMissing(m); }))
    return OkStatus();
  TaskSpec spec;
  spec.name = unit_.first;
  spec.length = unit_.second.first;
  spec.seed = unit_.second.second;
  spec.questions = options_.questions;
  spec.write_tokens = options_.write_tokens;
  spec.text_files = options_.text_files;
  spec.data = options_.data;
  KV_ASSIGN_OR_RETURN(const std::vector<TaskSample> samples, MakeTask(*loaded_.tokenizer, spec));
  gathered_.clear();
  for (size_t i = 0; i < samples.size(); ++i)
    KV_RETURN_IF_ERROR(RunSample(samples[i], i + 1 == samples.size()));
  return OkStatus();
}

Status Table::Run() {
  KV_RETURN_IF_ERROR(Open());
  std::vector<Unit> units;
  for (const uint32_t length : options_.lengths)
    for (uint64_t seed = options_.first_seed; seed < options_.first_seed + options_.seeds; ++seed)
      for (const std::string& task : options_.tasks) units.push_back({task, {length, seed}});
  for (const Unit& unit : units) {
    unit_ = unit;
    for (const AccuracyMethod& method : methods_)
      for (const uint32_t budget : Budgets(method)) total_ += Missing(method, budget);
  }
  bar_.emplace("accuracy", options_.progress || ProgressBar::OnTerminal());
  for (const Unit& unit : units) {
    unit_ = unit;
    KV_RETURN_IF_ERROR(RunUnit().WithContext("task " + unit.first + " of " +
                                             std::to_string(unit.second.first) + " tokens, seed " +
                                             std::to_string(unit.second.second)));
  }
  bar_.reset();
  if (options_.report.empty()) return OkStatus();
  // Only what was asked for: a file may hold cells of other experiments.
  const auto asked = [](const auto& list, const auto& item) {
    return std::find(list.begin(), list.end(), item) != list.end();
  };
  std::erase_if(cells_, [&](const auto& entry) {
    const CellName& name = entry.first;
    return !asked(options_.tasks, name.task) || !asked(options_.lengths, name.length) ||
           !asked(options_.methods, name.policy) ||
           (name.budget > 0 && !asked(options_.budgets, name.budget));
  });
  return WriteAccuracyReport(cells_, options_.methods, options_.report);
}

}  // namespace

Status RunAccuracy(const AccuracyOptions& options) { return Table(options).Run(); }

}  // namespace icecache
