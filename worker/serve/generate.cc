#include "worker/serve/generate.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <memory>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "common/limits.h"
#include "common/log.h"
#include "common/size.h"
#include "worker/attention_exact.h"
#include "worker/attention_full.h"
#include "worker/attention_icecache.h"
#include "worker/attention_sink_window.h"
#include "worker/decode_loop.h"
#include "worker/model/sampler.h"
#include "worker/prefill.h"
#include "worker/progress.h"
#include "worker/serve/generate_batch.h"
#include "worker/serve/interrupt.h"
#include "worker/serve/methods.h"
#include "worker/serve/summary.h"
#include "worker/served_context.h"

namespace icecache {
namespace {

using Tokens = std::vector<int32_t>;

// One run of the command: what is loaded, the sequence, and how it is attended to.
class Generation {
 public:
  explicit Generation(const GenerateOptions& options)
      : options_(options), progress_(options.worker.progress || ProgressBar::OnTerminal()) {}

  Status Run();

 private:
  Status ReadInputs();
  Status PrepareServed();
  Status PrefillOrFork(PrefillRequest* request);
  Status PrepareLocal();
  void BeginServed();
  Status Decode();
  Status DecodeOn(const std::function<bool(int32_t)>& on_token);
  Status Resume(const Status& lost);
  Status ForkAgain();
  PrefillOptions PrefillSettings(ProgressBar* bar);
  Status Pump() {
    if (link_) return link_->Pump();
    return Interrupted() ? Cancelled("interrupted") : OkStatus();
  }

  const GenerateOptions& options_;
  const bool progress_;
  Method method_ = Method::kIceCache;
  LoadedModel loaded_;
  Tokens prompt_, question_;
  std::unique_ptr<ServerLink> link_;
  std::optional<ServedContext> served_;
  std::unique_ptr<LocalKv> local_;
  std::unique_ptr<DecodeAttention> attention_;
  uint32_t tokens_ = 0;  // of the sequence when decoding starts
  std::vector<float> last_hidden_;
  std::string parent_;  // what the sequence was forked from, by name; empty: from nothing that lasts
  std::optional<DecodeLoop> loop_;
  std::optional<Sampler> sampler_;
  Tokens history_;  // the question and what was sampled: what follows tokens_
  GenerateSummary summary_;
};

// Of a server that may come back.
bool MayPass(const Status& status) {
  return status.code() == StatusCode::kUnavailable ||
         status.code() == StatusCode::kDeadlineExceeded;
}

Status Generation::ReadInputs() {
  KV_ASSIGN_OR_RETURN(method_, ParseMethod(options_.method));
  const bool fork = !options_.fork_of.empty();
  if (options_.durable && !options_.publish) {
    return InvalidArgument("--durable says how to publish; add --publish");
  }
  if (options_.match != "off" && options_.match != "own" && options_.match != "shared") {
    return InvalidArgument("--match " + options_.match + ": expected off, own or shared");
  }
  if ((options_.shared && !options_.publish) || (options_.fork_at > 0 && !fork)) {
    return InvalidArgument("--shared needs --publish, and --fork-at needs --fork-of");
  }
  if ((fork || options_.publish) && method_ != Method::kIceCache) {
    return InvalidArgument("--fork-of and --publish need --method icecache, not " +
                           options_.method);
  }
  KV_ASSIGN_OR_RETURN(loaded_, LoadModelAndTokenizer(options_.worker));
  KV_ASSIGN_OR_RETURN(const std::string prompt,
                      TextOf(options_.prompt, options_.prompt_file, "prompt"));
  KV_ASSIGN_OR_RETURN(const std::string question,
                      TextOf(options_.question, options_.question_file, "question"));
  KV_ASSIGN_OR_RETURN(prompt_, loaded_.tokenizer->Encode(prompt, true));
  KV_ASSIGN_OR_RETURN(question_, loaded_.tokenizer->Encode(question, false));
  if (fork && !prompt.empty()) {
    return InvalidArgument(
        "--fork-of joins a context without prefilling, so there is no prompt; "
        "put the text in --question-file");
  }
  if (fork && question_.empty()) {
    return InvalidArgument("--fork-of needs a question: --question TEXT or --question-file FILE");
  }
  if (!fork && prompt_.empty()) {
    return InvalidArgument(
        "there is no prompt; give --prompt-file FILE, --prompt TEXT or "
        "--fork-of CONTEXT");
  }
  return OkStatus();
}

PrefillOptions Generation::PrefillSettings(ProgressBar* bar) {
  PrefillOptions prefill;
  prefill.threads = options_.worker.threads;
  prefill.device = loaded_.compute.device.get();
  prefill.pump = [this] { return Pump(); };
  prefill.progress = [bar](uint64_t done, uint64_t total) { bar->Update(done, total); };
  return prefill;
}

Status Generation::PrepareServed() {
  KV_ASSIGN_OR_RETURN(link_, ConnectToServer(options_.worker, loaded_.compute));
  const Model& model = *loaded_.model;
  const std::string name =
      options_.context.empty() ? FreshContextName("generate") : options_.context;
  PrefillRequest request = PrefillRequestOf(options_.worker, name, prompt_);
  if (!options_.fork_of.empty()) {
    parent_ = options_.fork_of;
    const wire::Fork fork{.parent = parent_, .name = name, .tokens = options_.fork_at};
    KV_ASSIGN_OR_RETURN(served_, ForkFromServer(*link_, model, fork, std::nullopt));
  } else {
    KV_RETURN_IF_ERROR(PrefillOrFork(&request));
  }
  if (options_.publish) {
    // What is published is the document; this worker goes on in a fork of its own.
    KV_RETURN_IF_ERROR(link_->control().Seal(
        served_->handle.id, PrefixKeys(PrefixIdentityOf(model, request), prompt_, true)));
    KV_RETURN_IF_ERROR(
        link_->control().Publish(served_->handle.id, options_.durable, options_.shared));
    parent_ = name;
    if (options_.max_new_tokens > 0 || !question_.empty()) {
      const wire::Fork fork{.parent = name, .name = FreshContextName(name)};
      KV_ASSIGN_OR_RETURN(served_, ForkFromServer(*link_, model, fork, served_->window));
    }
  }
  BeginServed();
  return OkStatus();
}

// A context that another worker has prefilled serves as far as the prompt is the same; the rest goes
// before the question.
Status Generation::PrefillOrFork(PrefillRequest* request) {
  if (options_.match != "off" && !options_.publish) {
    // Logits come from running a token: one is left if no question follows.
    const auto tokens_max = static_cast<uint32_t>(prompt_.size() - (question_.empty() ? 1 : 0));
    KV_ASSIGN_OR_RETURN(served_, ForkMatch(*link_, *loaded_.model, *request, tokens_max,
                                           options_.match == "shared"));
  }
  if (served_) {
    summary_.matched_tokens = served_->tokens;
    question_.insert(question_.begin(), prompt_.begin() + served_->tokens, prompt_.end());
    return OkStatus();
  }
  ProgressBar bar("prefill", progress_);
  request->prefill = PrefillSettings(&bar);
  KV_ASSIGN_OR_RETURN(served_, PrefillToServer(*link_, *loaded_.model, *request));
  last_hidden_ = served_->last_hidden;
  summary_.prefill_tokens = prompt_.size();
  return OkStatus();
}

void Generation::BeginServed() {
  auto attention = std::make_unique<AttentionIceCache>(
      loaded_.model->shape(), link_->cache(), *loaded_.compute.attention,
      IceCacheOptionsOf(options_.worker, loaded_.compute));
  attention->Begin(served_->handle, served_->window, served_->grant.context.segments);
  attention_ = std::move(attention);
  tokens_ = served_->tokens;
}

Status Generation::PrepareLocal() {
  const ModelShape& shape = loaded_.model->shape();
  const SparseBudget budget = BudgetOf(options_.worker);
  SinkWindow window(shape, budget.sink_tokens, budget.window_tokens);
  if (NeedsLocalKv(method_)) local_ = std::make_unique<LocalKv>(shape);
  ProgressBar bar("prefill", progress_);
  KV_ASSIGN_OR_RETURN(last_hidden_, Prefill(*loaded_.model, prompt_, PrefillSettings(&bar),
                                            [&](FinishedLayer layer) -> Status {
                                              window.LoadDocument(layer.layer, *layer.rows);
                                              if (local_) local_->Append(layer.layer, *layer.rows);
                                              return OkStatus();
                                            }));
  summary_.prefill_tokens = prompt_.size();
  tokens_ = static_cast<uint32_t>(prompt_.size());
  if (method_ == Method::kFullKv) {
    attention_ = std::make_unique<AttentionFull>(shape, *local_, *loaded_.compute.attention);
  } else if (method_ == Method::kExact) {
    attention_ =
        std::make_unique<AttentionExact>(shape, *local_, *loaded_.compute.attention, budget);
  } else {
    auto attention = std::make_unique<AttentionSinkWindow>(shape, *loaded_.compute.attention);
    attention->Begin(window);
    attention_ = std::move(attention);
  }
  return OkStatus();
}

// Feeds what is in history_ and not in the attention, then samples, until the count is full.
Status Generation::DecodeOn(const std::function<bool(int32_t)>& on_token) {
  loop_.emplace(*loaded_.model, *attention_, [this] { return Pump(); });
  loop_->Begin(tokens_, last_hidden_);
  size_t fed = 0;
  const std::vector<int32_t> stop =
      options_.ignore_eos ? std::vector<int32_t>{} : loaded_.config.eos_ids;
  const size_t end = question_.size() + options_.max_new_tokens;
  for (;;) {
    for (; fed < history_.size(); ++fed) KV_RETURN_IF_ERROR(loop_->Feed(history_[fed]));
    if (history_.size() == end) return OkStatus();
    KV_ASSIGN_OR_RETURN(const int32_t token, loop_->Next(*sampler_));
    if (std::find(stop.begin(), stop.end(), token) != stop.end() || !on_token(token)) {
      return OkStatus();
    }
    history_.push_back(token);
    if (history_.size() == end) return OkStatus();  // nothing needs the last one's logits
  }
}

Status Generation::ForkAgain() {
  KV_ASSIGN_OR_RETURN(link_, ConnectToServer(options_.worker, loaded_.compute));
  const wire::Fork fork{.parent = parent_,
                        .name = FreshContextName(parent_),
                        .tokens = options_.fork_of.empty() ? 0 : options_.fork_at};
  KV_ASSIGN_OR_RETURN(served_, ForkFromServer(*link_, *loaded_.model, fork, std::nullopt));
  BeginServed();
  return OkStatus();
}

// The server went away, and with it the rows of this sequence. When it is back with the context
// that the sequence was forked from, a new fork takes its place; the tokens since are run again.
Status Generation::Resume(const Status& lost) {
  LogWarn("cache server lost; waiting for it", {{"reason", lost.ToString()}});
  const auto start = std::chrono::steady_clock::now();
  Status status = lost;
  while (std::chrono::steady_clock::now() - start < limits::kLeaseTime && !Interrupted()) {
    loop_.reset();
    attention_.reset();
    served_.reset();
    link_.reset();
    status = ForkAgain();
    // Not there any more, or not ours: waiting does not help.
    if (status.ok() || !MayPass(status)) break;
    std::this_thread::sleep_for(limits::kReconnectBackoffMin);
  }
  if (!status.ok()) {
    LogWarn("not resumed", {{"reason", status.ToString()}});
    return lost;
  }
  LogWarn("resumed on a new fork",
          {{"parent", parent_}, {"tokens_again", std::to_string(history_.size())}});
  return OkStatus();
}

Status Generation::Decode() {
  ProgressBar bar("generate", progress_ && ::isatty(STDOUT_FILENO) == 0);
  const uint64_t total = question_.size() + options_.max_new_tokens;
  StreamDecoder decoder(*loaded_.tokenizer);
  sampler_.emplace(SamplerOptions{options_.temperature, options_.top_p, options_.seed});
  history_ = question_;
  const auto on_token = [&](int32_t token) {
    const std::string text = decoder.Push(token);
    std::fwrite(text.data(), 1, text.size(), stdout);
    bar.Update(history_.size() + 1, total);
    ++summary_.generated_tokens;
    return std::fflush(stdout) == 0;  // nobody reads any more: stop
  };
  Status status = DecodeOn(on_token);
  while (!status.ok() && !parent_.empty() && MayPass(status)) {
    const Status resumed = Resume(status);
    status = resumed.ok() ? DecodeOn(on_token) : resumed;
    if (!resumed.ok()) break;
  }
  bar.Finish();
  if (options_.max_new_tokens > 0) std::fputs((decoder.Finish() + "\n").c_str(), stdout);
  std::fflush(stdout);
  if (loop_) summary_.decode = loop_->stats();
  return status;
}

Status Generation::Run() {
  const SamplerOptions sampling{options_.temperature, options_.top_p, options_.seed};
  KV_RETURN_IF_ERROR(sampling.Validate());
  KV_RETURN_IF_ERROR(ReadInputs());
  const auto start = std::chrono::steady_clock::now();
  KV_RETURN_IF_ERROR(method_ == Method::kIceCache ? PrepareServed() : PrepareLocal());
  summary_.prepare = std::chrono::steady_clock::now() - start;
  summary_.method = MethodName(method_);
  summary_.budget = options_.worker.budget;
  const Status status = Decode();
  if (summary_.decode.tokens > 0 || summary_.prefill_tokens > 0) PrintSummary(summary_);
  // A context that is not published goes now, not when the server notices that we have gone.
  if (served_ && link_ && link_->Pump().ok()) {
    const Status released = link_->control().Release(served_->handle.id);
    if (status.ok() && !released.ok()) return released;
  }
  return status;
}

}  // namespace

void AddGenerateCommand(ConfigParser& parser, GenerateOptions* o) {
  ConfigParser& command = parser.AddCommand(
      "generate", "Continue a prompt, with its KV cache in the cache server",
      "icecache-worker generate --model DIR --prompt-file book.txt --question 'Who is Ahab?'\n"
      "icecache-worker generate --model DIR --prompt-file book.txt --context book --publish "
      "--durable --max-new-tokens 0\n"
      "icecache-worker generate --model DIR --fork-of book --question-file q.txt --budget 512\n"
      "icecache-worker generate --model DIR --fork-of book --requests questions.jsonl --batch 8");
  AddWorkerOptions(command, &o->worker);
  command.Section("Text");
  command.Add("prompt_file", &o->prompt_file, "File with the prompt");
  command.Add("prompt", &o->prompt, "The prompt itself");
  command.Add("question_file", &o->question_file,
              "File with text that follows the prompt, through sparse attention");
  command.Add("question", &o->question, "The same, itself");
  command.Add("requests", &o->requests,
              "File of questions to answer side by side, one JSON object a line: question, and as "
              "needed id, budget, max_new_tokens, temperature, top_p, seed. Answers are JSON lines");
  command.Add("batch", &o->batch, "With --requests: so many decode together", 1,
              limits::kSelectsPerBatchMax);
  command.Section("Sharing");
  command.Add("context", &o->context, "Name of the context that is made; empty: a fresh one");
  command.Add("publish", &o->publish, "Seal the prompt and let other workers fork it by name");
  command.Add("durable", &o->durable,
              "Publish on the server's disk, too: the context outlives the server");
  command.Add("shared", &o->shared, "Publish to other tenants, too");
  command.Add("fork_of", &o->fork_of, "Continue a published context instead of a prompt");
  command.Add("fork_at", &o->fork_at, "Continue it behind so many tokens; 0: all",
              0, limits::kContextTokensMax);
  command.Add("match", &o->match,
              "Look for a published context that begins with the prompt, and run only the rest: "
              "off, own (the tenant's) or shared (other tenants', too: trust those who share)");
  command.Section("Generation");
  command.Add("method", &o->method,
              "icecache, full_kv, exact or sink_window; all but the first need no server");
  command.Add("max_new_tokens", &o->max_new_tokens, "Tokens to generate at most");
  command.Add("ignore_eos", &o->ignore_eos, "Go on after the model's end-of-text token");
  command.Add("temperature", &o->temperature, "0: greedy", 0, 100);
  command.Add("top_p", &o->top_p, "Sample from the likeliest tokens of this share", 0, 1);
  command.Add("seed", &o->seed, "Seed of the sampler");
}

Status RunGenerate(const GenerateOptions& options) {
  if (!options.requests.empty()) return RunGenerateBatch(options);
  Generation generation(options);
  return generation.Run();
}

}  // namespace icecache
