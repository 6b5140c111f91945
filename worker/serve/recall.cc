#include "worker/serve/recall.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <optional>
#include <thread>
#include <utility>

#include "worker/attention_exact.h"
#include "worker/attention_full.h"
#include "worker/attention_icecache.h"
#include "worker/attention_sink_window.h"
#include "worker/decode_loop.h"
#include "worker/progress.h"
#include "worker/serve/interrupt.h"
#include "worker/serve/methods.h"
#include "worker/serve/recall_report.h"
#include "worker/served_context.h"
#include "worker/token_loop.h"

namespace icecache {
namespace {

constexpr Duration kWaitFileMax = std::chrono::minutes(10);

class RecallRun {
 public:
  explicit RecallRun(const RecallOptions& options)
      : options_(options), progress_(options.worker.progress || ProgressBar::OnTerminal()) {}

  Status Run();

 private:
  Status Prepare();
  Status Read();
  Status Share();
  Status JoinFork();
  Status WaitForFile();
  Status RunMethod(Method method);
  Status AskIceCache(RecallMethodReport* report);
  // `begin` sets the attention back to the state right after the document.
  Status AskAll(DecodeAttention& attention, const std::function<Status()>& begin,
                const std::function<Status()>& end, RecallMethodReport* report);
  Status Ask(DecodeLoop& loop, const RecallQuestion& question, RecallAnswer* answer);
  bool Wants(Method method) const {
    return std::find(methods_.begin(), methods_.end(), method) != methods_.end();
  }
  Status Pump() {
    if (link_) return link_->Pump();
    return Interrupted() ? Cancelled("interrupted") : OkStatus();
  }

  const RecallOptions& options_;
  const bool progress_;
  std::vector<Method> methods_;
  LoadedModel loaded_;
  RecallDocument document_;
  std::unique_ptr<ServerLink> link_;
  std::optional<ServedContext> served_;  // the document's; forked for each question
  std::string parent_;                   // its name
  std::unique_ptr<LocalKv> local_;
  SinkWindow window_;  // right after the document
  RecallReport report_;
};

Status RecallRun::Prepare() {
  for (const std::string& name : options_.methods) {
    KV_ASSIGN_OR_RETURN(const Method method, ParseMethod(name));
    methods_.push_back(method);
  }
  if (methods_.empty()) return InvalidArgument("--methods: name at least one");
  if (!options_.fork_of.empty() && (Wants(Method::kFullKv) || Wants(Method::kExact))) {
    return InvalidArgument(
        "--fork-of never sees the whole document, so it cannot run full_kv or "
        "exact; use --methods icecache,sink_window");
  }
  KV_ASSIGN_OR_RETURN(loaded_, LoadModelAndTokenizer(options_.worker));
  KV_ASSIGN_OR_RETURN(document_, MakeRecallDocument(*loaded_.tokenizer, options_.document));
  const uint64_t end = uint64_t{options_.question_first} + options_.question_count;
  if (options_.question_count == 0 || end > document_.questions.size()) {
    return InvalidArgument("questions " + std::to_string(options_.question_first) + " to " +
                           std::to_string(end) + ": there is one per fact, " +
                           std::to_string(document_.questions.size()) +
                           "; raise --facts or ask fewer");
  }
  const bool served = Wants(Method::kIceCache) || options_.publish || !options_.fork_of.empty();
  if (served) {
    KV_ASSIGN_OR_RETURN(link_, ConnectToServer(options_.worker, loaded_.compute));
  }
  report_.document_tokens = static_cast<uint32_t>(document_.tokens.size());
  report_.facts = options_.document.facts;
  return OkStatus();
}

Status RecallRun::Read() {
  const ModelShape& shape = loaded_.model->shape();
  if (Wants(Method::kFullKv) || Wants(Method::kExact)) local_ = std::make_unique<LocalKv>(shape);
  window_ = SinkWindow(shape, options_.worker.sink_tokens, options_.worker.window_tokens);
  const auto keep = [this](const FinishedLayer& layer) {
    window_.LoadDocument(layer.layer, *layer.rows);
    if (local_) local_->Append(layer.layer, *layer.rows);
  };
  ProgressBar bar("prefill", progress_);
  parent_ = options_.context.empty() ? FreshContextName("recall") : options_.context;
  PrefillRequest request = PrefillRequestOf(options_.worker, parent_, document_.tokens);
  request.on_layer = keep;
  request.prefill.threads = options_.worker.threads;
  request.prefill.device = loaded_.compute.device.get();
  request.prefill.pump = [this] { return Pump(); };
  request.prefill.progress = [&bar](uint64_t done, uint64_t total) { bar.Update(done, total); };
  const auto start = std::chrono::steady_clock::now();
  if (link_) {
    KV_ASSIGN_OR_RETURN(served_, PrefillToServer(*link_, *loaded_.model, request));
  } else {
    KV_RETURN_IF_ERROR(Prefill(*loaded_.model, document_.tokens, request.prefill,
                               [&](const FinishedLayer& layer) -> Status {
                                 keep(layer);
                                 return OkStatus();
                               })
                           .status());
  }
  report_.prefill_tokens = report_.document_tokens;
  report_.prefill = std::chrono::steady_clock::now() - start;
  return OkStatus();
}

// Seals the document, so that every question can fork it, and publishes it if asked to.
Status RecallRun::Share() {
  if (!link_) return OkStatus();
  KV_RETURN_IF_ERROR(link_->control().Seal(served_->handle.id));
  if (options_.publish) KV_RETURN_IF_ERROR(link_->control().Publish(served_->handle.id));
  if (options_.ready_file.empty()) return OkStatus();
  std::ofstream file(options_.ready_file);
  file << parent_ << "\n";
  file.close();
  return file ? OkStatus() : InvalidArgument("cannot write --ready-file " + options_.ready_file);
}

Status RecallRun::JoinFork() {
  parent_ = options_.fork_of;
  KV_ASSIGN_OR_RETURN(served_, ForkFromServer(*link_, *loaded_.model, parent_,
                                              FreshContextName(parent_), std::nullopt));
  if (served_->tokens != report_.document_tokens) {
    return InvalidArgument("context '" + parent_ + "' has " + std::to_string(served_->tokens) +
                           " tokens, this document " + std::to_string(report_.document_tokens) +
                           "; give the same --tokens, --facts, --seed and text as its maker");
  }
  window_ = served_->window;
  return OkStatus();
}

Status RecallRun::WaitForFile() {
  if (options_.wait_file.empty()) return OkStatus();
  const auto start = std::chrono::steady_clock::now();
  std::error_code error;
  while (!std::filesystem::exists(options_.wait_file, error)) {
    KV_RETURN_IF_ERROR(Pump());
    if (std::chrono::steady_clock::now() - start > kWaitFileMax) {
      return DeadlineExceeded("--wait-file " + options_.wait_file +
                              " did not appear in 10 minutes");
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));  // far below a heartbeat
  }
  return OkStatus();
}

Status RecallRun::Ask(DecodeLoop& loop, const RecallQuestion& question, RecallAnswer* answer) {
  for (const int32_t token : question.tokens) KV_RETURN_IF_ERROR(loop.Feed(token));
  Sampler greedy{SamplerOptions{}};
  std::vector<int32_t> said;
  KV_RETURN_IF_ERROR(loop.Generate(greedy, static_cast<uint32_t>(question.answer.size()), {},
                                   [&said](int32_t token) {
                                     said.push_back(token);
                                     return true;
                                   }));
  answer->right = said == question.answer;
  answer->said = loaded_.tokenizer->Decode(said, false);
  return OkStatus();
}

Status RecallRun::AskAll(DecodeAttention& attention, const std::function<Status()>& begin,
                         const std::function<Status()>& end, RecallMethodReport* report) {
  DecodeLoop loop(*loaded_.model, attention, [this] { return Pump(); });
  loop.ResetStats();
  ProgressBar bar(report->name, progress_);
  for (uint32_t i = 0; i < options_.question_count; ++i) {
    const RecallQuestion& question = document_.questions[options_.question_first + i];
    KV_RETURN_IF_ERROR(begin());
    loop.Begin(report_.document_tokens);
    RecallAnswer answer;
    answer.name = question.name;
    answer.fact_position = question.fact_position;
    KV_RETURN_IF_ERROR(Ask(loop, question, &answer));
    KV_RETURN_IF_ERROR(end());
    report->answers.push_back(std::move(answer));
    bar.Update(i + 1, options_.question_count);
  }
  report->stats = loop.stats();
  return OkStatus();
}

Status RecallRun::AskIceCache(RecallMethodReport* report) {
  AttentionIceCache attention(loaded_.model->shape(), link_->cache(), *loaded_.compute.attention,
                              IceCacheOptionsOf(options_.worker, loaded_.compute));
  std::optional<ServedContext> fork;
  return AskAll(
      attention,
      [&]() -> Status {
        const AttentionTimer timer(&report->between);
        KV_ASSIGN_OR_RETURN(fork, ForkFromServer(*link_, *loaded_.model, parent_,
                                                 FreshContextName(parent_), window_));
        attention.Begin(fork->handle, fork->window, fork->grant.context.segments);
        return OkStatus();
      },
      [&] {
        const AttentionTimer timer(&report->between);
        return link_->control().Release(fork->handle.id);
      },
      report);
}

Status RecallRun::RunMethod(Method method) {
  const ModelShape& shape = loaded_.model->shape();
  RecallMethodReport report;
  report.name = MethodName(method);
  report.budget = options_.worker.budget;
  const auto nothing = [] { return OkStatus(); };
  const auto truncate = [this] {
    local_->Truncate(report_.document_tokens);
    return OkStatus();
  };
  if (method == Method::kIceCache) {
    KV_RETURN_IF_ERROR(AskIceCache(&report));
  } else if (method == Method::kFullKv) {
    report.budget = report_.document_tokens;
    AttentionFull attention(shape, *local_, *loaded_.compute.attention);
    KV_RETURN_IF_ERROR(AskAll(attention, truncate, nothing, &report));
  } else if (method == Method::kExact) {
    AttentionExact attention(shape, *local_, *loaded_.compute.attention, BudgetOf(options_.worker));
    KV_RETURN_IF_ERROR(AskAll(attention, truncate, nothing, &report));
  } else {
    report.budget = options_.worker.sink_tokens + options_.worker.window_tokens;
    AttentionSinkWindow attention(shape, *loaded_.compute.attention);
    const auto begin = [&] {
      attention.Begin(window_);
      return OkStatus();
    };
    KV_RETURN_IF_ERROR(AskAll(attention, begin, nothing, &report));
  }
  report_.methods.push_back(std::move(report));
  return OkStatus();
}

Status RecallRun::Run() {
  KV_RETURN_IF_ERROR(Prepare());
  if (options_.fork_of.empty()) {
    KV_RETURN_IF_ERROR(Read());
    KV_RETURN_IF_ERROR(Share());
  } else {
    KV_RETURN_IF_ERROR(JoinFork());
  }
  KV_RETURN_IF_ERROR(WaitForFile());
  for (const Method method : methods_) KV_RETURN_IF_ERROR(RunMethod(method));
  if (served_) KV_RETURN_IF_ERROR(link_->control().Release(served_->handle.id));
  const std::string json = FormatRecallJson(report_);
  if (options_.json.empty()) {
    std::fputs(json.c_str(), stdout);
    return OkStatus();
  }
  std::fputs(FormatRecallTable(report_).c_str(), stdout);
  std::ofstream file(options_.json);
  file << json;
  file.close();
  return file ? OkStatus() : InvalidArgument("cannot write --json " + options_.json);
}

}  // namespace

void AddRecallCommand(ConfigParser& parser, RecallOptions* o) {
  ConfigParser& command = parser.AddCommand(
      "recall", "Measure methods on questions about one long document",
      "icecache-worker recall --model tests/models/recall --json out.json\n"
      "icecache-worker recall --model tests/models/recall --context doc --publish\n"
      "icecache-worker recall --model tests/models/recall --fork-of doc --methods icecache "
      "--question-first 32 --question-count 32");
  AddWorkerOptions(command, &o->worker);
  command.Section("Document");
  command.Add("tokens", &o->document.tokens, "Tokens of the document, facts included", 64,
              limits::kContextTokensMax);
  command.Add("facts", &o->document.facts, "Facts scattered in it", 1, 256);
  command.Add("seed", &o->document.seed, "Seed of the document");
  command.AddList("text_files", &o->document.text_files,
                  "Text around the facts; empty: /usr/share/common-licenses/*");
  command.Section("Questions");
  command.AddList("methods", &o->methods, "Any of icecache, full_kv, exact, sink_window");
  command.Add("question_first", &o->question_first, "First question to ask, from 0");
  command.Add("question_count", &o->question_count, "Questions to ask", 1);
  command.Add("json", &o->json, "Write the results here; empty: JSON to stdout");
  command.Section("Sharing");
  command.Add("context", &o->context, "Name of the document's context; empty: a fresh one");
  command.Add("publish", &o->publish, "Let other workers fork it by name; it stays until dropped");
  command.Add("fork_of", &o->fork_of, "Ask a context that another worker has published");
  command.Add("ready_file", &o->ready_file, "Write the context's name here when it can be forked");
  command.Add("wait_file", &o->wait_file, "Start asking when this file is there");
}

Status RunRecall(const RecallOptions& options) {
  RecallRun run(options);
  return run.Run();
}

}  // namespace icecache
