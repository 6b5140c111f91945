// icecache-bench chain: what it costs that a context is a chain of segments, as it is after forks:
// the same tokens in 1, 2, 4, 8 sealed segments, asked the same queries under the same budget; and
// again after the merging that a server would do (context/merge_plan.h).
//
// Selections of all lengths are timed in turns, so that each meets the same machine; every line
// holds the ratios to one segment in the same run. Before anything is timed, pages and residual are
// compared with exact attention over all tokens, with leave to read everything.
#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "cacheserver/context/context.h"
#include "cacheserver/context/merge_plan.h"
#include "cacheserver/context/segment_merge.h"
#include "tests/bench/command.h"
#include "tests/bench/measure.h"
#include "tests/bench/trace.h"

namespace icecache {
namespace {

using Json = nlohmann::ordered_json;

constexpr LayerId kLayer{0};
constexpr KvHeadId kHead{0};
constexpr uint32_t kCheckedQueries = 3;

struct Flags {
  std::vector<std::string> segments = {"1", "2", "4", "8"};
  std::vector<std::string> trace = {"calibrated:retrieval", "calibrated:topic", "calibrated:broad"};
  std::string policy = "cluster_tree";
  uint32_t keys = 32768, dim = 128, group = 4, budget_pages = 12, read_cap = 1024, queries = 64,
           repeats = 5;
  uint64_t seed = 1;
  bool json = false;
};

// One chain over a trace, and what it answered.
struct Chain {
  uint32_t segments = 0;
  bool merged = false;
  std::unique_ptr<Context> context;
  std::vector<double> micros, mass, error, tokens_read;
};

class ChainBench {
 public:
  ChainBench(const Flags& flags, const Trace& trace, std::vector<uint32_t> lengths)
      : flags_(flags),
        trace_(trace),
        lengths_(std::move(lengths)),
        pool_((2 * lengths_.size() + 3) * size_t{4} * trace.keys * trace.dim *
                  DTypeBytes(trace.dtype) +
              2 * lengths_.size() * 16 * limits::kExtentBytes) {}

  Status Run(const std::string& trace_name);

 private:
  Result<std::unique_ptr<Context>> Build(uint32_t segments, PolicyKind policy);
  Status Fill(Context& context, uint32_t first, uint32_t end);
  Status Merge(Context& context);
  Status Select(const Context& context, uint32_t query, uint32_t read_cap);
  Status Check(const Context& context);
  Status Measure(Chain* chain, uint32_t query);
  void Print(const std::string& trace_name, const Chain& chain, const Chain& alone) const;

  const Flags& flags_;
  const Trace& trace_;
  const std::vector<uint32_t> lengths_;
  PagePool pool_;
  const std::unique_ptr<AttentionBackend> attention_ = MakeCpuAttention();
  wire::HeadSelection answer_;
  uint64_t next_id_ = 1;
};

Result<std::unique_ptr<Context>> ChainBench::Build(uint32_t segments, PolicyKind policy) {
  std::unique_ptr<Context> context;
  for (uint32_t i = 0; i < segments; ++i) {
    ContextSpec spec;
    spec.id = ContextId(next_id_);
    spec.segment = SegmentId(next_id_++);
    spec.shape = {.layers = 1,
                  .kv_heads = 1,
                  .query_heads = trace_.group,
                  .head_dim = trace_.dim,
                  .dtype = trace_.dtype};
    spec.sink_tokens = spec.window_tokens = 0;
    spec.policy = policy;
    spec.seed = flags_.seed;
    if (i == 0) {
      KV_ASSIGN_OR_RETURN(context, Context::Create(spec, pool_, *attention_));
    } else {
      KV_ASSIGN_OR_RETURN(context, Context::Fork(*context, spec));
    }
    const uint64_t keys = trace_.keys;
    KV_RETURN_IF_ERROR(Fill(*context, static_cast<uint32_t>(keys * i / segments),
                            static_cast<uint32_t>(keys * (i + 1) / segments)));
    KV_RETURN_IF_ERROR(context->Seal());
  }
  KV_RETURN_IF_ERROR(context->Validate());
  return context;
}

Status ChainBench::Fill(Context& context, uint32_t first, uint32_t end) {
  const size_t row_bytes = trace_.dim * DTypeBytes(trace_.dtype);
  for (uint32_t at = first; at < end; at += limits::kPutRowsTokensMax) {
    const uint32_t count = std::min(limits::kPutRowsTokensMax, end - at);
    const TokenRows rows = trace_.Rows(at, count);
    KV_RETURN_IF_ERROR(context.PutRows(kLayer, kHead, at, count, {rows.k, count * row_bytes},
                                       {rows.v, count * row_bytes}));
  }
  KV_ASSIGN_OR_RETURN(std::unique_ptr<SliceJob> job,
                      context.PrepareBuild(kLayer, kHead, end - first, trace_.energy));
  job->Run();
  return context.Install(kLayer, kHead, std::move(job));
}

// What a server does in the background, until nothing is left to do.
Status ChainBench::Merge(Context& context) {
  for (;;) {
    std::vector<MergeLink> links;
    for (const std::shared_ptr<const Segment>& segment : context.chain()) {
      const uint32_t tokens = segment->ends()->tail_first - segment->spec().first_position;
      links.push_back({.tokens = tokens, .holders = 1, .may_end = true});
    }
    const std::optional<MergeRun> run = PlanMerge(links, limits::kContextTokensMax);
    if (!run) return context.Validate();
    const auto begin = context.chain().begin() + run->first, end = begin + run->count;
    const SegmentId first = (*begin)->id(), last = (*(end - 1))->id();
    SegmentMerge merge(pool_, {begin, end}, SegmentId(next_id_++));
    while (!merge.done()) {
      Misses misses;
      KV_ASSIGN_OR_RETURN(std::unique_ptr<SliceJob> job, merge.Prepare(&misses));
      job->Run();
      KV_RETURN_IF_ERROR(merge.Install(std::move(job)));
    }
    if (!context.ReplaceRun(first, last, merge.Take())) return Internal("the run is not there");
  }
}

Status ChainBench::Select(const Context& context, uint32_t query, uint32_t read_cap) {
  SelectRequest request;
  request.queries = trace_.Query(query);
  request.group = trace_.group;
  request.max_pages = flags_.budget_pages;
  request.read_cap = read_cap;
  if (!trace_.local_lse.empty()) {
    request.local_lse = trace_.local_lse.data() + size_t{query} * trace_.group;
  }
  Misses misses;
  return context.Select(kLayer, kHead, request, {}, &answer_, &misses);
}

Status ChainBench::Check(const Context& context) {
  for (uint32_t q = 0; q < std::min(kCheckedQueries, trace_.query_count); ++q) {
    KV_RETURN_IF_ERROR(Select(context, q, limits::kContextTokensMax));
    if (answer_.pages.size() != flags_.budget_pages) {
      return Internal(std::to_string(answer_.pages.size()) + " pages, expected " +
                      std::to_string(flags_.budget_pages));
    }
    KV_ASSIGN_OR_RETURN(const std::optional<SelectionCheck> check,
                        context.CheckSelection(kLayer, kHead, trace_.Query(q), answer_));
    if (!check || !(check->output_error < 1e-3f)) {
      return Internal("a chain of " + std::to_string(context.segment_count()) +
                      " segments: pages and residual differ from full attention by " +
                      std::to_string(check ? check->output_error : 1.0f) +
                      " although all may be read");
    }
  }
  return OkStatus();
}

Status ChainBench::Measure(Chain* chain, uint32_t query) {
  double best = 1e30;  // an interrupt is not the chain's cost
  for (uint32_t r = 0; r < flags_.repeats; ++r) {
    const double begin = ThreadCpuMicros();
    KV_RETURN_IF_ERROR(Select(*chain->context, query, flags_.read_cap));
    best = std::min(best, ThreadCpuMicros() - begin);
  }
  KV_ASSIGN_OR_RETURN(const std::optional<SelectionCheck> check,
                      chain->context->CheckSelection(kLayer, kHead, trace_.Query(query), answer_));
  if (!check) return Internal("a selection could not be compared with exact attention");
  chain->micros.push_back(best);
  chain->mass.push_back(check->mass);
  chain->error.push_back(check->output_error);
  chain->tokens_read.push_back(answer_.tokens_read);
  return OkStatus();
}

void ChainBench::Print(const std::string& trace_name, const Chain& chain,
                       const Chain& alone) const {
  const double p50 = Quantile(chain.micros, 0.5), p99 = Quantile(chain.micros, 0.99);
  const double mass = Mean(chain.mass), error = Mean(chain.error);
  const double time_ratio = p50 / Quantile(alone.micros, 0.5), mass_ratio = mass / Mean(alone.mass);
  if (!flags_.json) {
    std::string segments = std::to_string(chain.segments);
    if (chain.merged) segments += " > " + std::to_string(chain.context->segment_count());
    std::printf("%-22s %8s %9.1f %9.1f %7.2f %9.4f %7.3f %9.4f %8.0f\n", trace_name.c_str(),
                segments.c_str(), p50, p99, time_ratio, mass, mass_ratio, error,
                Mean(chain.tokens_read));
    return;
  }
  const Json line = {{"bench", "chain"},
                     {"trace", trace_name},
                     {"policy", flags_.policy},
                     {"segments", chain.segments},
                     {"merged_to", chain.context->segment_count()},
                     {"keys", trace_.keys},
                     {"dim", trace_.dim},
                     {"group", trace_.group},
                     {"budget_pages", flags_.budget_pages},
                     {"read_cap", flags_.read_cap},
                     {"queries", trace_.query_count},
                     {"repeats", flags_.repeats},
                     {"select_p50_us", p50},
                     {"select_p99_us", p99},
                     {"mass", mass},
                     {"output_error", error},
                     {"tokens_read", Mean(chain.tokens_read)},
                     {"time_ratio", time_ratio},
                     {"mass_ratio", mass_ratio},
                     {"error_ratio", error / std::max(1e-9, Mean(alone.error))},
                     {"seed", flags_.seed},
                     {"commit", CommitName()},
                     {"machine", MachineName()}};
  std::printf("%s\n", line.dump().c_str());
  std::fflush(stdout);
}

Status ChainBench::Run(const std::string& trace_name) {
  KV_ASSIGN_OR_RETURN(const PolicyKind policy, ParsePolicyKind(flags_.policy));
  std::vector<Chain> chains;
  for (const uint32_t length : lengths_) {
    KV_ASSIGN_OR_RETURN(std::unique_ptr<Context> context, Build(length, policy));
    KV_RETURN_IF_ERROR(Check(*context));
    chains.push_back({.segments = length, .context = std::move(context)});
    if (length == 1) continue;
    KV_ASSIGN_OR_RETURN(context, Build(length, policy));
    KV_RETURN_IF_ERROR(Merge(*context));
    KV_RETURN_IF_ERROR(Check(*context));
    chains.push_back({.segments = length, .merged = true, .context = std::move(context)});
  }
  for (uint32_t q = 0; q < trace_.query_count; ++q) {
    for (Chain& chain : chains) KV_RETURN_IF_ERROR(Measure(&chain, q));
  }
  for (const Chain& chain : chains) Print(trace_name, chain, chains.front());
  return OkStatus();
}

class ChainCommand final : public BenchCommand {
 public:
  const char* name() const override { return "chain"; }
  const char* description() const override {
    return "Selections over chains of segments, against one segment of the same tokens";
  }
  const char* examples() const override {
    return "icecache-bench chain --segments 1,2,4,8 --json\n"
           "icecache-bench chain --keys 131072 --trace calibrated:broad";
  }
  void AddFlags(ConfigParser* parser) override {
    parser->AddList("segments", &flags_.segments,
                    "Lengths of chains; ratios are to the first of them");
    parser->AddList("trace", &flags_.trace, "Traces, as of select");
    parser->Add("policy", &flags_.policy, "Selection policy, one that can read everything exactly");
    parser->Add("keys", &flags_.keys, "Tokens of a chain", 64, limits::kCheckTokensMax);
    parser->Add("dim", &flags_.dim, "head_dim", 16, limits::kHeadDimMax);
    parser->Add("group", &flags_.group, "Query heads per kv head", 1, limits::kGroupMax);
    parser->Add("budget_pages", &flags_.budget_pages, "Pages returned", 1,
                limits::kPagesPerSelectMax);
    parser->Add("read_cap", &flags_.read_cap, "Tokens read exactly beyond the returned pages", 0,
                limits::kReadCapMax);
    parser->Add("queries", &flags_.queries, "Groups of queries", 1, 100000);
    parser->Add("repeats", &flags_.repeats, "Calls per query, the shortest counts", 1, 1000);
    parser->Add("seed", &flags_.seed, "Seed of trace and index");
    parser->Add("json", &flags_.json, "One JSON object per line instead of a table");
  }
  Status Run() override;

 private:
  Flags flags_;
};

Status ChainCommand::Run() {
  std::vector<uint32_t> lengths;
  for (const std::string& text : flags_.segments) {
    const auto length = static_cast<uint32_t>(std::strtoul(text.c_str(), nullptr, 10));
    if (length == 0 || length > limits::kSegmentsPerContextMax) {
      return InvalidArgument("segments '" + text + "', expected 1 to " +
                             std::to_string(limits::kSegmentsPerContextMax));
    }
    lengths.push_back(length);
  }
  if (!flags_.json) {
    std::printf(
        "%s\ntrace                  segments    p50 us    p99 us   ratio      mass   ratio"
        "     error    read\n",
        MachineName().c_str());
  }
  for (const std::string& name : flags_.trace) {
    TraceSpec spec;
    spec.name = name;
    spec.keys = flags_.keys;
    spec.dim = flags_.dim;
    spec.group = flags_.group;
    spec.query_count = flags_.queries;
    spec.seed = flags_.seed;
    KV_ASSIGN_OR_RETURN(const Trace trace, MakeTrace(spec));
    ChainBench bench(flags_, trace, lengths);
    KV_RETURN_IF_ERROR(bench.Run(name));
  }
  return OkStatus();
}

}  // namespace

std::unique_ptr<BenchCommand> MakeChainCommand() { return std::make_unique<ChainCommand>(); }

}  // namespace icecache
