#include "worker/serve/generate_batch.h"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <utility>

#include "common/limits.h"
#include "worker/batch_loop.h"
#include "worker/prefill.h"
#include "worker/progress.h"
#include "worker/serve/interrupt.h"
#include "worker/serve/methods.h"
#include "worker/served_context.h"

namespace icecache {
namespace {

using Json = nlohmann::ordered_json;

// A request while it decodes.
struct Running {
  const BatchRequest* request = nullptr;
  ServedContext context;
  std::unique_ptr<AttentionIceCache> attention;
  std::optional<StreamDecoder> decoder;
  std::string answer;
  uint32_t tokens = 0;
};

class BatchGeneration {
 public:
  explicit BatchGeneration(const GenerateOptions& options)
      : options_(options), progress_(options.worker.progress || ProgressBar::OnTerminal()) {}

  Status Run();

 private:
  Status ReadInputs();
  Status PrepareContext();
  // The next request joins the loop. One that cannot ends with its error; the others go on.
  void Start(const BatchRequest& request);
  Status TryStart(const BatchRequest& request);
  void Say(Running& running, const std::string& text);
  void End(Running* running, const Status& status);
  void ReportEnd(const BatchRequest& request, const Running* running, const Status& status);
  void PrintSummary() const;

  const GenerateOptions& options_;
  const bool progress_;
  LoadedModel loaded_;
  std::vector<BatchRequest> requests_;
  std::vector<int32_t> prompt_;
  std::unique_ptr<ServerLink> link_;
  std::string parent_;
  std::optional<ServedContext> document_;  // prefilled here
  std::optional<SinkWindow> window_;       // right after the document, once known
  std::vector<std::unique_ptr<Running>> running_;
  std::vector<std::unique_ptr<Running>> ended_;
  std::unique_ptr<BatchLoop> loop_;
  AttentionStats stats_;  // of those that have ended
  uint64_t done_ = 0;
  Status first_error_;
};

void Print(const Json& line) {
  const std::string text =
      line.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
  std::fwrite(text.data(), 1, text.size(), stdout);
  std::fflush(stdout);
}

Status BatchGeneration::ReadInputs() {
  if (options_.method != "icecache") {
    return InvalidArgument("--requests needs --method icecache, not " + options_.method);
  }
  if (!options_.question.empty() || !options_.question_file.empty()) {
    return InvalidArgument("--requests brings the questions; leave --question out");
  }
  KV_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(options_.requests));
  KV_ASSIGN_OR_RETURN(requests_, ParseBatchRequests(text, options_));
  KV_ASSIGN_OR_RETURN(loaded_, LoadModelAndTokenizer(options_.worker));
  KV_ASSIGN_OR_RETURN(const std::string prompt,
                      TextOf(options_.prompt, options_.prompt_file, "prompt"));
  if (options_.fork_of.empty() == prompt.empty()) {
    return InvalidArgument(
        "--requests are about a prompt or a published context: give one of --prompt-file FILE, "
        "--prompt TEXT and --fork-of CONTEXT");
  }
  KV_ASSIGN_OR_RETURN(prompt_, loaded_.tokenizer->Encode(prompt, true));
  return OkStatus();
}

// Read once, sealed, then forked for every request.
Status BatchGeneration::PrepareContext() {
  KV_ASSIGN_OR_RETURN(link_, ConnectToServer(options_.worker, loaded_.compute));
  loop_ = std::make_unique<BatchLoop>(*loaded_.model, link_->cache(), *loaded_.compute.attention);
  if (!options_.fork_of.empty()) {
    parent_ = options_.fork_of;
    return OkStatus();
  }
  parent_ = options_.context.empty() ? FreshContextName("generate") : options_.context;
  ProgressBar bar("prefill", progress_);
  PrefillRequest request = PrefillRequestOf(options_.worker, parent_, prompt_);
  request.prefill.threads = options_.worker.threads;
  request.prefill.device = loaded_.compute.device.get();
  request.prefill.pump = [this] { return link_->Pump(); };
  request.prefill.progress = [&bar](uint64_t done, uint64_t total) { bar.Update(done, total); };
  KV_ASSIGN_OR_RETURN(document_, PrefillToServer(*link_, *loaded_.model, request));
  window_ = document_->window;
  KV_RETURN_IF_ERROR(link_->control().Seal(document_->handle.id));
  if (!options_.publish) return OkStatus();
  return link_->control().Publish(document_->handle.id, options_.durable);
}

Status BatchGeneration::TryStart(const BatchRequest& request) {
  auto running = std::make_unique<Running>();
  Running* const r = running.get();
  r->request = &request;
  r->decoder.emplace(*loaded_.tokenizer);
  BatchSequence sequence;
  KV_ASSIGN_OR_RETURN(sequence.feed, loaded_.tokenizer->Encode(request.question, false));
  if (sequence.feed.empty()) return InvalidArgument("the question is empty");
  KV_ASSIGN_OR_RETURN(r->context, ForkFromServer(*link_, *loaded_.model, parent_,
                                                 FreshContextName(parent_), window_));
  if (!window_) window_ = r->context.window;
  WorkerOptions worker = options_.worker;
  worker.budget = request.budget;
  r->attention = std::make_unique<AttentionIceCache>(
      loaded_.model->shape(), link_->cache(), *loaded_.compute.attention,
      IceCacheOptionsOf(worker, loaded_.compute));
  r->attention->Begin(r->context.handle, r->context.window, r->context.grant.context.segments);
  sequence.attention = r->attention.get();
  sequence.position = r->context.tokens;
  sequence.sampling = {request.temperature, request.top_p, request.seed};
  sequence.max_new_tokens = request.max_new_tokens;
  if (!options_.ignore_eos) sequence.stop = loaded_.config.eos_ids;
  sequence.on_token = [this, r](int32_t token) {
    ++r->tokens;
    Say(*r, r->decoder->Push(token));
    return true;
  };
  sequence.on_end = [this, r](const Status& status) { End(r, status); };
  KV_RETURN_IF_ERROR(loop_->Join(std::move(sequence)));
  running_.push_back(std::move(running));
  return OkStatus();
}

void BatchGeneration::Start(const BatchRequest& request) {
  const Status status = TryStart(request);
  if (!status.ok()) ReportEnd(request, nullptr, status);
}

void BatchGeneration::Say(Running& running, const std::string& text) {
  if (text.empty()) return;
  running.answer += text;
  Print({{"id", running.request->id}, {"text", text}});
}

// Called by the loop: what it took part with goes when the step is over.
void BatchGeneration::End(Running* running, const Status& status) {
  Say(*running, running->decoder->Finish());
  ReportEnd(*running->request, running, status);
  stats_ += running->attention->stats();
  const auto it = std::find_if(running_.begin(), running_.end(),
                               [&](const auto& r) { return r.get() == running; });
  ended_.push_back(std::move(*it));
  running_.erase(it);
}

void BatchGeneration::ReportEnd(const BatchRequest& request, const Running* running,
                                const Status& status) {
  ++done_;
  const uint32_t tokens = running == nullptr ? 0 : running->tokens;
  Json line = {{"id", request.id}};
  line["end"] = !status.ok() ? "error" : tokens < request.max_new_tokens ? "stop" : "length";
  line["tokens"] = tokens;
  if (running != nullptr) line["answer"] = running->answer;
  if (!status.ok()) {
    line["error"] = status.ToString();
    if (first_error_.ok()) first_error_ = status.WithContext("request " + request.id);
  }
  Print(line);
}

Status BatchGeneration::Run() {
  KV_RETURN_IF_ERROR(ReadInputs());
  KV_RETURN_IF_ERROR(PrepareContext());
  ProgressBar bar("requests", progress_);
  size_t next = 0;
  for (;;) {
    const Status pumped = link_->Pump();
    if (!pumped.ok()) {
      loop_->EndAll(pumped);
      for (; next < requests_.size(); ++next) ReportEnd(requests_[next], nullptr, pumped);
      break;
    }
    while (next < requests_.size() && loop_->size() < options_.batch) Start(requests_[next++]);
    if (loop_->size() == 0) break;
    (void)loop_->Step();  // every sequence that it ended has said why
    for (const auto& ended : ended_) {
      if (!link_->Pump().ok()) break;
      (void)link_->control().Release(ended->context.handle.id);
    }
    ended_.clear();
    bar.Update(done_, requests_.size());
  }
  bar.Finish();
  PrintSummary();
  if (document_ && link_->Pump().ok()) {
    const Status released = link_->control().Release(document_->handle.id);
    if (first_error_.ok() && !released.ok()) return released;
  }
  return first_error_;
}

void BatchGeneration::PrintSummary() const {
  const BatchStats& s = loop_->stats();
  if (s.steps == 0) return;
  const double seconds = std::chrono::duration<double>(s.total).count();
  std::fprintf(stderr,
               "\nbatch      %llu tokens in %llu steps of %.1f sequences, %.2f ms/step, "
               "%.1f tokens/s\n",
               static_cast<unsigned long long>(s.rows), static_cast<unsigned long long>(s.steps),
               static_cast<double>(s.rows) / static_cast<double>(s.steps),
               1000 * seconds / static_cast<double>(s.steps),
               static_cast<double>(s.rows) / seconds);
  if (stats_.degraded_steps > 0 || stats_.bad_pages > 0) {
    std::fprintf(stderr,
                 "caution    %llu layer steps without the whole answer, %llu pages failed "
                 "verification\n",
                 static_cast<unsigned long long>(stats_.degraded_steps),
                 static_cast<unsigned long long>(stats_.bad_pages));
  }
}

Status BadField(const std::string& where, const char* key, const Json& value,
                const std::string& expected) {
  return InvalidArgument(where + ": " + key + " is " + value.dump() + ", expected " + expected);
}

Status ReadCount(const Json& line, const std::string& where, const char* key, uint64_t min,
                 uint64_t max, auto* out) {
  const auto it = line.find(key);
  if (it == line.end()) return OkStatus();
  if (!it->is_number_unsigned() || it->template get<uint64_t>() < min ||
      it->template get<uint64_t>() > max) {
    return BadField(where, key, *it,
                    "a whole number from " + std::to_string(min) + " to " + std::to_string(max));
  }
  *out = it->template get<std::remove_pointer_t<decltype(out)>>();
  return OkStatus();
}

Status ReadNumber(const Json& line, const std::string& where, const char* key, double* out) {
  const auto it = line.find(key);
  if (it == line.end()) return OkStatus();
  if (!it->is_number()) return BadField(where, key, *it, "a number");
  *out = it->get<double>();
  return OkStatus();
}

Status ReadText(const Json& line, const std::string& where, const char* key, std::string* out) {
  const auto it = line.find(key);
  if (it == line.end()) return OkStatus();
  if (!it->is_string()) return BadField(where, key, *it, "a string");
  *out = it->get<std::string>();
  return OkStatus();
}

Result<BatchRequest> ParseRequest(const Json& line, const std::string& where,
                                  const GenerateOptions& defaults) {
  if (!line.is_object()) return InvalidArgument(where + ": not a JSON object");
  static const std::set<std::string_view> known = {"id",          "question", "budget", "max_new_tokens",
                                                   "temperature", "top_p",    "seed"};
  for (const auto& [key, value] : line.items()) {
    if (known.contains(key)) continue;
    return InvalidArgument(where + ": unknown field '" + key +
                           "'; there are id, question, budget, max_new_tokens, temperature, top_p "
                           "and seed");
  }
  BatchRequest r;
  r.budget = defaults.worker.budget;
  r.max_new_tokens = defaults.max_new_tokens;
  r.temperature = defaults.temperature;
  r.top_p = defaults.top_p;
  r.seed = defaults.seed;
  KV_RETURN_IF_ERROR(ReadText(line, where, "id", &r.id));
  KV_RETURN_IF_ERROR(ReadText(line, where, "question", &r.question));
  KV_RETURN_IF_ERROR(ReadCount(line, where, "budget", 1, UINT32_MAX, &r.budget));
  KV_RETURN_IF_ERROR(ReadCount(line, where, "max_new_tokens", 0, limits::kContextTokensMax,
                               &r.max_new_tokens));
  KV_RETURN_IF_ERROR(ReadCount(line, where, "seed", 0, UINT64_MAX, &r.seed));
  KV_RETURN_IF_ERROR(ReadNumber(line, where, "temperature", &r.temperature));
  KV_RETURN_IF_ERROR(ReadNumber(line, where, "top_p", &r.top_p));
  if (r.question.empty()) return InvalidArgument(where + ": there is no question");
  const Status sampling = SamplerOptions{r.temperature, r.top_p, r.seed}.Validate();
  if (!sampling.ok()) return sampling.WithContext(where);
  return r;
}

}  // namespace

Result<std::vector<BatchRequest>> ParseBatchRequests(std::string_view text,
                                                     const GenerateOptions& defaults) {
  std::vector<BatchRequest> requests;
  std::set<std::string> ids;
  size_t number = 0;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    const std::string_view bytes = text.substr(at, end - at);
    at = end + 1;
    ++number;
    if (bytes.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    const std::string where = "line " + std::to_string(number) + " of --requests";
    const Json line = Json::parse(bytes, nullptr, false);
    if (line.is_discarded()) return InvalidArgument(where + ": not JSON");
    KV_ASSIGN_OR_RETURN(BatchRequest request, ParseRequest(line, where, defaults));
    if (request.id.empty()) request.id = std::to_string(requests.size() + 1);
    if (!ids.insert(request.id).second) {
      return InvalidArgument(where + ": id '" + request.id + "' is there already");
    }
    requests.push_back(std::move(request));
    if (requests.size() > limits::kBatchRequestsMax) {
      return InvalidArgument("--requests has more than " +
                             std::to_string(limits::kBatchRequestsMax) + " requests");
    }
  }
  if (requests.empty()) return InvalidArgument("--requests has no request");
  return requests;
}

Status RunGenerateBatch(const GenerateOptions& options) {
  BatchGeneration generation(options);
  return generation.Run();
}

}  // namespace icecache
