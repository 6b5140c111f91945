// icecache-bench growth: what happens to the answers of an index while tokens are added to it, with
// and without clustering it again. One trace, asked as its text goes on (TraceSpec::follow).
//
// A longer text is harder for everybody, so every error stands beside that of two oracles in the
// same step: the exact best tokens of each head, as many as the budget ships, and as many as were
// read. The claim to check is that ours does not grow faster than theirs.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "cacheserver/select/query_energy.h"
#include "tests/bench/accuracy_method.h"
#include "tests/bench/accuracy_plot.h"
#include "tests/bench/command.h"
#include "tests/bench/measure.h"
#include "tests/bench/select_truth.h"

namespace icecache {
namespace {

using Json = nlohmann::ordered_json;

constexpr uint32_t kBins = 16;  // of the added tokens, in results and plots

struct Flags {
  std::string trace = "calibrated:broad";
  std::vector<std::string> methods = {"cluster_tree", "cluster_tree/recluster=0"};
  uint32_t keys = 32768, tokens = 2000, queries = 200, dim = 128, group = 4, budget_pages = 14;
  uint32_t seeds = 1;
  uint64_t seed = 1;
  double drift = 0.5;
  std::string plot;
  bool json = false;
};

// Means over the heads and queries of each bin.
struct Growth {
  std::vector<double> error, oracle, oracle_reads, tokens_read;
  uint32_t builds = 0;
  double build_ms = 0;
};

// One method on one trace.
class GrowingSlice {
 public:
  GrowingSlice(const Flags& flags, const AccuracyMethod& method, const Trace& trace, uint64_t seed)
      : flags_(flags),
        method_(method),
        trace_(trace),
        seed_(seed),
        truth_(trace),
        energy_(std::max(1u, 256 * trace.query_count / std::max(1u, trace.extra_keys))) {}

  Result<Growth> Grow();

 private:
  Status Build(uint32_t tokens);
  Status InsertTo(uint32_t tokens);
  void Ask(uint32_t query, uint32_t bin);

  const Flags& flags_;
  const AccuracyMethod& method_;
  const Trace& trace_;
  const uint64_t seed_;
  SelectTruth truth_;
  QueryEnergy energy_;
  std::unique_ptr<SelectionPolicy> policy_;
  std::unique_ptr<PageStore> store_;
  Selection got_;
  Growth growth_;
  std::vector<std::vector<double>> error_, oracle_, oracle_reads_, read_;  // [kBins]
};

Status GrowingSlice::Build(uint32_t tokens) {
  policy_ = method_.Make(trace_.dtype, trace_.dim);
  store_ = std::make_unique<PageStore>(trace_.dtype, trace_.dim);
  BuildHints hints;
  hints.queries = trace_.history;
  hints.query_group = trace_.group;
  hints.seed = seed_;
  switch (method_.energy) {
    case AccuracyMethod::Energy::kRecent:
      hints.query_energy = energy_.value();
      break;
    case AccuracyMethod::Energy::kBuild:
      hints.query_energy = trace_.energy;
      break;
    case AccuracyMethod::Energy::kNone:
      if (growth_.builds == 0) hints.query_energy = trace_.energy;
      break;
  }
  const TokenRows rows = trace_.Rows(0, tokens);
  const double begin = ThreadCpuMicros();
  KV_ASSIGN_OR_RETURN(const PageLayout layout, policy_->Build(rows, hints));
  growth_.build_ms += (ThreadCpuMicros() - begin) / 1e3;
  ++growth_.builds;
  return store_->ApplyLayout(rows, layout);
}

Status GrowingSlice::InsertTo(uint32_t tokens) {
  for (uint32_t t = store_->token_count(); t < tokens; ++t) {
    const TokenRows row = trace_.Rows(t, 1);
    KV_ASSIGN_OR_RETURN(const InsertPlan plan, policy_->Insert(row, store_->kv()));
    KV_RETURN_IF_ERROR(store_->ApplyInsert(plan, row));
    const uint32_t added = t + 1 - trace_.keys;
    if (method_.recluster > 0 && added % method_.recluster == 0) KV_RETURN_IF_ERROR(Build(t + 1));
  }
  return OkStatus();
}

void GrowingSlice::Ask(uint32_t query, uint32_t bin) {
  SelectRequest request;
  request.queries = trace_.Query(query);
  request.group = trace_.group;
  request.max_pages = flags_.budget_pages;
  request.read_cap = method_.read_cap;
  request.min_mass = method_.min_mass;
  request.rank = method_.rank;
  request.residual = method_.residual;
  if (!trace_.local_lse.empty())
    request.local_lse = trace_.local_lse.data() + size_t{query} * trace_.group;
  policy_->Select(request, store_->kv(), &got_);
  truth_.Assign(query, *store_);
  read_[bin].push_back(got_.tokens_read);
  for (uint32_t h = 0; h < trace_.group; ++h) {
    error_[bin].push_back(
        truth_.OutputError(h, got_.pages, request.residual ? &got_.residual : nullptr));
    oracle_[bin].push_back(truth_.OracleError(h, flags_.budget_pages * limits::kPageTokens));
    oracle_reads_[bin].push_back(truth_.OracleError(h, got_.tokens_read));
  }
}

Result<Growth> GrowingSlice::Grow() {
  for (auto* bins : {&error_, &oracle_, &oracle_reads_, &read_}) bins->resize(kBins);
  energy_.Assign(trace_.energy);
  KV_RETURN_IF_ERROR(Build(trace_.keys));
  // Every query is seen, as many as asked for are judged.
  const uint32_t stride = std::max(1u, trace_.query_count / flags_.queries);
  for (uint32_t q = 0; q < trace_.query_count; ++q) {
    KV_RETURN_IF_ERROR(InsertTo(trace_.asked_after[q]));
    energy_.Observe(trace_.Query(q), trace_.group, trace_.dim);
    if (q % stride == 0) Ask(q, static_cast<uint32_t>(uint64_t{q} * kBins / trace_.query_count));
  }
  KV_RETURN_IF_ERROR(policy_->Validate(store_->kv()));
  for (uint32_t bin = 0; bin < kBins; ++bin) {
    growth_.error.push_back(Mean(error_[bin]));
    growth_.oracle.push_back(Mean(oracle_[bin]));
    growth_.oracle_reads.push_back(Mean(oracle_reads_[bin]));
    growth_.tokens_read.push_back(Mean(read_[bin]));
  }
  return growth_;
}

double MeanOf(const std::vector<double>& bins, uint32_t first, uint32_t count) {
  const auto begin = bins.begin() + first;
  return Mean(std::vector<double>(begin, begin + count));
}

// Last quarter to first quarter.
double GrowthOf(const std::vector<double>& bins) {
  return MeanOf(bins, kBins - kBins / 4, kBins / 4) / MeanOf(bins, 0, kBins / 4);
}

class GrowthCommand final : public BenchCommand {
 public:
  const char* name() const override { return "growth"; }
  const char* description() const override {
    return "Output error while tokens are added, with and without clustering again: one JSON "
           "object per method and seed";
  }
  const char* examples() const override {
    return "icecache-bench growth --trace calibrated:topic --seeds 3 --json --plot growth.svg\n"
           "icecache-bench growth --trace file:text.ickv@2.1 --keys 4096 --tokens 2000 "
           "--methods cluster_tree/strict,cluster_tree/strict/recluster=0";
  }
  void AddFlags(ConfigParser* parser) override;
  Status Run() override;

 private:
  Result<Trace> MakeTraceOf(uint64_t seed) const;
  Json ToJson(const AccuracyMethod& method, const Trace& trace, uint64_t seed,
              const Growth& growth) const;
  Status DrawPlot(const std::vector<std::pair<std::string, std::vector<Growth>>>& all,
                  uint32_t tokens) const;

  Flags flags_;
};

void GrowthCommand::AddFlags(ConfigParser* parser) {
  parser->Section("Data");
  parser->Add("trace", &flags_.trace,
              "calibrated:{retrieval,sinky,topic,broad,diffuse} | file:PATH@L.H (whose last "
              "--tokens queries are asked)");
  parser->Add("keys", &flags_.keys, "tokens indexed by the first build", 1,
              limits::kContextTokensMax);
  parser->Add("tokens", &flags_.tokens, "tokens added one by one", 16, 1u << 20);
  parser->Add("queries", &flags_.queries, "group queries judged on the way", 16, 100000);
  parser->Add("drift", &flags_.drift, "share of topics that only the added tokens have", 0, 1);
  parser->Add("dim", &flags_.dim, "head_dim", 16, limits::kHeadDimMax);
  parser->Add("group", &flags_.group, "query heads of the kv head", 1, limits::kGroupMax);
  parser->Add("seed", &flags_.seed, "of the first trace");
  parser->Add("seeds", &flags_.seeds, "traces", 1, 100);
  parser->Section("Methods");
  parser->AddList("methods", &flags_.methods,
              "NAME[/OPTION]... as in icecache-bench accuracy; recluster=N and energy=E matter here");
  parser->Add("budget_pages", &flags_.budget_pages, "pages returned at most", 1,
              limits::kPagesPerSelectMax);
  parser->Section("Output");
  parser->Add("plot", &flags_.plot, "SVG of error over the oracle's, by added tokens");
  parser->Add("json", &flags_.json, "one line of JSON per method and seed");
}

Result<Trace> GrowthCommand::MakeTraceOf(uint64_t seed) const {
  TraceSpec spec;
  spec.name = flags_.trace;
  spec.keys = flags_.keys;
  spec.extra_keys = flags_.tokens;
  spec.query_count = spec.name.starts_with("file:") ? flags_.tokens : flags_.queries;
  spec.dim = flags_.dim;
  spec.group = flags_.group;
  spec.seed = seed;
  spec.follow = true;
  spec.drift = flags_.drift;
  return MakeTrace(spec);
}

Json GrowthCommand::ToJson(const AccuracyMethod& method, const Trace& trace, uint64_t seed,
                           const Growth& growth) const {
  Json out;
  out["bench"] = "growth";
  out["trace"] = flags_.trace;
  out["method"] = method.name;
  out["keys"] = trace.keys;
  out["tokens"] = trace.extra_keys;
  out["drift"] = flags_.drift;
  out["budget_pages"] = flags_.budget_pages;
  out["seed"] = seed;
  out["error_mean"] = Mean(growth.error);
  out["tokens_read_mean"] = Mean(growth.tokens_read);
  out["error_growth"] = GrowthOf(growth.error);
  out["oracle_growth"] = GrowthOf(growth.oracle);
  out["oracle_equal_reads_growth"] = GrowthOf(growth.oracle_reads);
  out["builds"] = growth.builds;
  out["build_ms_mean"] = growth.build_ms / growth.builds;
  out["error"] = growth.error;
  out["oracle_error"] = growth.oracle;
  out["oracle_equal_reads_error"] = growth.oracle_reads;
  out["commit"] = CommitName();
  out["machine"] = MachineName();
  return out;
}

Status GrowthCommand::DrawPlot(const std::vector<std::pair<std::string, std::vector<Growth>>>& all,
                               uint32_t tokens) const {
  Plot plot{"Error over the oracle's, " + flags_.trace + ", " + std::to_string(flags_.keys) +
                " tokens before",
            "tokens added",
            "error / error of the exact best tokens",
            false,
            false,
            {}};
  for (const auto& [name, growths] : all) {
    PlotLine line{name, {}};
    for (uint32_t bin = 0; bin < kBins; ++bin) {
      double ratio = 0;
      for (const Growth& g : growths)
        ratio += g.error[bin] / g.oracle[bin] / static_cast<double>(growths.size());
      line.points.emplace_back((bin + 0.5) * tokens / kBins, ratio);
    }
    plot.lines.push_back(std::move(line));
  }
  const std::string svg = DrawSvg(plot);
  std::FILE* const file = std::fopen(flags_.plot.c_str(), "w");
  if (file == nullptr) return Unavailable("--plot " + flags_.plot + ": cannot be written");
  const bool written = std::fwrite(svg.data(), 1, svg.size(), file) == svg.size();
  return std::fclose(file) == 0 && written
             ? OkStatus()
             : Unavailable("--plot " + flags_.plot + ": cannot be written");
}

Status GrowthCommand::Run() {
  std::vector<AccuracyMethod> methods;
  for (const std::string& name : flags_.methods) {
    KV_ASSIGN_OR_RETURN(AccuracyMethod method, ParseAccuracyMethod(name));
    if (method.kind != AccuracyMethod::Kind::kPolicy)
      return InvalidArgument("--methods " + name + ": the oracles are in every line anyway");
    methods.push_back(std::move(method));
  }
  std::vector<std::pair<std::string, std::vector<Growth>>> all;
  for (const AccuracyMethod& method : methods) all.push_back({method.name, {}});
  uint32_t tokens = flags_.tokens;
  for (uint64_t seed = flags_.seed; seed < flags_.seed + flags_.seeds; ++seed) {
    KV_ASSIGN_OR_RETURN(const Trace trace, MakeTraceOf(seed));
    tokens = trace.extra_keys;
    for (size_t i = 0; i < methods.size(); ++i) {
      GrowingSlice slice(flags_, methods[i], trace, seed);
      KV_ASSIGN_OR_RETURN(Growth growth, slice.Grow());
      std::printf("%s\n", ToJson(methods[i], trace, seed, growth).dump(flags_.json ? -1 : 2).c_str());
      std::fflush(stdout);
      all[i].second.push_back(std::move(growth));
    }
  }
  return flags_.plot.empty() ? OkStatus() : DrawPlot(all, tokens);
}

}  // namespace

std::unique_ptr<BenchCommand> MakeGrowthCommand() { return std::make_unique<GrowthCommand>(); }

}  // namespace icecache
