// icecache-bench batch: several sequences of one worker decode together (worker/batch_loop.h), with a
// real model against a real server. The same sequences, each on a fork of one document, are decoded
// so many at a time as --batch says; every one must say the same tokens for every batch before
// anything is reported.
//
// What a batch can win on a CPU: one round trip per layer and shard instead of one per sequence,
// weights read once for all rows, and servers that select while the worker attends. What it cannot:
// the selections and the arithmetic of each row.
#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "common/limits.h"
#include "common/log.h"
#include "tests/bench/command.h"
#include "tests/bench/measure.h"
#include "tests/support/process.h"
#include "worker/batch_loop.h"
#include "worker/serve/options.h"
#include "worker/served_context.h"

namespace icecache {
namespace {

using Json = nlohmann::ordered_json;
using Said = std::vector<std::vector<int32_t>>;  // by sequence

struct Flags {
  std::string model = "tests/models/recall", text = "LICENSE", device = "cpu";
  std::vector<std::string> batch = {"1", "2", "4", "8"};
  uint32_t tokens = 8192, budget = 256, new_tokens = 48, sequences = 8, rounds = 3;
  uint32_t threads = 1, server_threads = 1;
  bool json = false;
};

constexpr uint32_t kQuestionTokens = 4;

struct Reading {
  std::vector<double> seconds;   // of a round: all sequences from first to last token
  std::vector<double> step_ms;   // of all rounds
  uint64_t rows = 0, steps = 0;  // of one round
  AttentionStats attention, shared;  // of one round
};

class Bench {
 public:
  explicit Bench(const Flags& flags) : flags_(flags) {}
  Status Prepare();
  Status Round(uint32_t batch, Said* said, Reading* reading);
  Json Describe(uint32_t batch, const Reading& reading, double first_rate) const;

 private:
  struct Fork {
    ServedContext context;
    std::unique_ptr<AttentionIceCache> attention;
  };
  Result<std::unique_ptr<Fork>> MakeFork();
  Status Join(BatchLoop& loop, uint32_t index, Fork& fork, std::vector<int32_t>* said);

  const Flags& flags_;
  LoadedModel loaded_;
  WorkerOptions worker_;
  std::vector<int32_t> text_;
  std::unique_ptr<test::TestServer> server_;
  std::unique_ptr<ServerLink> link_;
  ServedContext document_;
};

Status Bench::Prepare() {
  worker_.model = flags_.model;
  worker_.device = flags_.device;
  worker_.threads = flags_.threads;
  worker_.budget = flags_.budget;
  KV_ASSIGN_OR_RETURN(loaded_, LoadModelAndTokenizer(worker_));
  KV_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(flags_.text));
  KV_ASSIGN_OR_RETURN(text_, loaded_.tokenizer->Encode(text, true));
  const size_t length = text_.size();
  if (length < 2 * kQuestionTokens) return InvalidArgument("--text is too short");
  while (text_.size() < flags_.tokens) text_.push_back(text_[text_.size() % length]);
  server_ = std::make_unique<test::TestServer>(std::vector<std::string>{
      "--memory-size", "1GiB", "--threads", std::to_string(flags_.server_threads), "--lease-ms",
      "60000"});
  worker_.server = server_->address();
  KV_ASSIGN_OR_RETURN(link_, ConnectToServer(worker_, loaded_.compute));
  PrefillRequest request;
  request.name = "document";
  request.tokens = std::span(text_).first(flags_.tokens);
  request.prefill.threads = flags_.threads;
  request.prefill.device = loaded_.compute.device.get();
  request.prefill.pump = [this] { return link_->Pump(); };
  KV_ASSIGN_OR_RETURN(document_, PrefillToServer(*link_, *loaded_.model, request));
  return link_->control().Seal(document_.handle.id);
}

Result<std::unique_ptr<Bench::Fork>> Bench::MakeFork() {
  auto fork = std::make_unique<Fork>();
  KV_ASSIGN_OR_RETURN(fork->context,
                      ForkFromServer(*link_, *loaded_.model, "document", FreshContextName("fork"),
                                     document_.window));
  fork->attention = std::make_unique<AttentionIceCache>(
      loaded_.model->shape(), link_->cache(), *loaded_.compute.attention,
      IceCacheOptionsOf(worker_, loaded_.compute));
  fork->attention->Begin(fork->context.handle, fork->context.window,
                         fork->context.grant.context.segments);
  return fork;
}

// Sequence `index` asks how the text goes on at a place of its own.
Status Bench::Join(BatchLoop& loop, uint32_t index, Fork& fork, std::vector<int32_t>* said) {
  BatchSequence sequence;
  sequence.attention = fork.attention.get();
  sequence.position = fork.context.tokens;
  const size_t at = 1 + (size_t{index} * 997) % (flags_.tokens - kQuestionTokens - 1);
  sequence.feed.assign(text_.begin() + static_cast<ptrdiff_t>(at),
                       text_.begin() + static_cast<ptrdiff_t>(at + kQuestionTokens));
  sequence.max_new_tokens = flags_.new_tokens;
  sequence.on_token = [said](int32_t token) {
    said->push_back(token);
    return true;
  };
  sequence.on_end = [](const Status&) {};
  return loop.Join(std::move(sequence));
}

Status Bench::Round(uint32_t batch, Said* said, Reading* reading) {
  said->assign(flags_.sequences, {});
  std::vector<std::unique_ptr<Fork>> forks;
  for (uint32_t i = 0; i < flags_.sequences; ++i) {
    KV_ASSIGN_OR_RETURN(std::unique_ptr<Fork> fork, MakeFork());
    forks.push_back(std::move(fork));
  }
  BatchLoop loop(*loaded_.model, link_->cache(), *loaded_.compute.attention);
  uint32_t next = 0;
  const auto start = std::chrono::steady_clock::now();
  for (;;) {
    while (next < flags_.sequences && loop.size() < batch) {
      KV_RETURN_IF_ERROR(Join(loop, next, *forks[next], &(*said)[next]));
      ++next;
    }
    if (loop.size() == 0) break;
    const auto step = std::chrono::steady_clock::now();
    KV_RETURN_IF_ERROR(loop.Step());
    KV_RETURN_IF_ERROR(link_->Pump());
    reading->step_ms.push_back(std::chrono::duration<double, std::milli>(
                                   std::chrono::steady_clock::now() - step)
                                   .count());
  }
  reading->seconds.push_back(
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  reading->rows = loop.stats().rows;
  reading->steps = loop.stats().steps;
  reading->shared = loop.shared_stats();
  reading->attention = {};
  for (const auto& fork : forks) {
    reading->attention += fork->attention->stats();
    KV_RETURN_IF_ERROR(link_->control().Release(fork->context.handle.id));
  }
  return OkStatus();
}

Json Bench::Describe(uint32_t batch, const Reading& r, double first_rate) const {
  const double rate = static_cast<double>(r.rows) / Quantile(r.seconds, 0.5);
  const auto per_token_ms = [&](Duration d) {
    return std::chrono::duration<double, std::milli>(d).count() / static_cast<double>(r.rows);
  };
  Json out;
  out["bench"] = "batch";
  out["batch"] = batch;
  out["tokens_per_second"] = rate;
  out["over_batch_of_first_line"] = first_rate > 0 ? rate / first_rate : 1.0;
  out["step_ms_p50"] = Quantile(r.step_ms, 0.5);
  out["step_ms_p99"] = Quantile(r.step_ms, 0.99);
  out["per_token_ms"] = {
      {"select_wait", per_token_ms(r.attention.select_wait)},
      {"transfer", per_token_ms(r.attention.transfer + r.shared.transfer)},
      {"attention", per_token_ms(r.attention.attention + r.shared.attention)},
      {"server_select", static_cast<double>(r.attention.server_select_ns) / 1e6 /
                            static_cast<double>(r.rows)}};
  out["rows_per_step"] = static_cast<double>(r.rows) / static_cast<double>(r.steps);
  out["degraded_steps"] = r.attention.degraded_steps;
  out["sequences"] = flags_.sequences;
  out["new_tokens"] = flags_.new_tokens;
  out["context"] = flags_.tokens;
  out["budget"] = flags_.budget;
  out["rounds"] = flags_.rounds;
  out["threads"] = flags_.threads;
  out["server_threads"] = flags_.server_threads;
  out["model"] = loaded_.model->identity();
  out["commit"] = CommitName();
  out["machine"] = MachineName();
  return out;
}

class BatchCommand final : public BenchCommand {
 public:
  const char* name() const override { return "batch"; }
  const char* description() const override {
    return "Sequences of one worker that decode together: tokens per second by batch";
  }
  const char* examples() const override {
    return "icecache-bench batch --batch 1,2,4,8 --json\n"
           "icecache-bench batch --tokens 32768 --budget 64 --batch 1,8";
  }
  void AddFlags(ConfigParser* parser) override {
    Flags& f = flags_;
    parser->AddList("batch", &f.batch, "How many decode together; each of these is measured");
    parser->Add("model", &f.model, "Model directory");
    parser->Add("text", &f.text, "The document's text, repeated as needed");
    parser->Add("device", &f.device, "cpu, cuda or auto");
    parser->Add("tokens", &f.tokens, "Of the document", 256, limits::kContextTokensMax);
    parser->Add("budget", &f.budget, "Tokens a head attends to exactly", 1);
    parser->Add("new_tokens", &f.new_tokens, "That each sequence says", 2, 1u << 16);
    parser->Add("sequences", &f.sequences, "In all", 1, limits::kSelectsPerBatchMax);
    parser->Add("rounds", &f.rounds, "Of every batch, one after the other; the median counts", 1,
                1000);
    parser->Add("threads", &f.threads, "Compute threads of the worker", 1, 1024);
    parser->Add("server_threads", &f.server_threads, "Shards", 1, limits::kShardsMax);
    parser->Add("json", &f.json, "One JSON object a line");
  }
  Status Run() override;

 private:
  Flags flags_;
};

Status BatchCommand::Run() {
  InitLogging(LogLevel::kWarn, LogFormat::kText, "icecache-bench");
  std::vector<uint32_t> batches;
  for (const std::string& text : flags_.batch) {
    const auto batch = static_cast<uint32_t>(std::strtoul(text.c_str(), nullptr, 10));
    if (batch < 1 || batch > limits::kSelectsPerBatchMax) {
      return InvalidArgument("--batch " + text + ", expected 1 to " +
                             std::to_string(limits::kSelectsPerBatchMax));
    }
    batches.push_back(batch);
  }
  Bench bench(flags_);
  KV_RETURN_IF_ERROR(bench.Prepare());
  std::vector<Reading> readings(batches.size());
  Said expected;
  Reading warmup;
  KV_RETURN_IF_ERROR(bench.Round(1, &expected, &warmup));
  for (uint32_t round = 0; round < flags_.rounds; ++round) {
    for (size_t i = 0; i < batches.size(); ++i) {
      Said said;
      KV_RETURN_IF_ERROR(bench.Round(batches[i], &said, &readings[i]));
      if (said != expected) {
        return DataLoss("a batch of " + std::to_string(batches[i]) +
                        " says something else than its sequences alone");
      }
    }
  }
  const double first =
      static_cast<double>(readings[0].rows) / Quantile(readings[0].seconds, 0.5);
  for (size_t i = 0; i < batches.size(); ++i) {
    const Json line = bench.Describe(batches[i], readings[i], first);
    if (flags_.json) {
      std::printf("%s\n", line.dump().c_str());
    } else {
      std::printf("batch %2u  %8.1f tokens/s  x%.2f  step %.2f ms (p99 %.2f)\n", batches[i],
                  line["tokens_per_second"].get<double>(),
                  line["over_batch_of_first_line"].get<double>(),
                  line["step_ms_p50"].get<double>(), line["step_ms_p99"].get<double>());
    }
  }
  return OkStatus();
}

}  // namespace

std::unique_ptr<BenchCommand> MakeBatchCommand() { return std::make_unique<BatchCommand>(); }

}  // namespace icecache
