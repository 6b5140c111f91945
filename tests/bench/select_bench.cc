// icecache-bench select: one point of the index's quality and cost. Results are checked before
// anything is timed.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <thread>

#include "cacheserver/select/cluster_tree.h"
#include "cacheserver/select/dci_tree.h"
#include "kernels/attention.h"
#include "kernels/distance.h"
#include "kernels/gpu/assigner_gpu.h"
#include "tests/bench/command.h"
#include "tests/bench/measure.h"
#include "tests/bench/select_flags.h"
#include "tests/bench/select_profile.h"
#include "tests/bench/select_truth.h"

namespace icecache {
namespace {

using Json = nlohmann::ordered_json;

// Whether pages and residual are full attention when all may be read.
bool SumsToFullAttention(PolicyKind kind) {
  return kind == PolicyKind::kClusterTree || kind == PolicyKind::kExact ||
         kind == PolicyKind::kSequential || kind == PolicyKind::kRandomPages ||
         kind == PolicyKind::kSequentialPages;
}

constexpr uint32_t kColdRepeats = 3;  // each empties the caches first

// What one way of asking gives, over all queries.
struct Reading {
  std::vector<double> micros, cold_micros, top16, top256, mass, error, no_residual_error,
      tokens_read, estimate_error, pages, tokens;
};

class SelectBench {
 public:
  SelectBench(const SelectFlags& flags, PolicyKind kind, const ClusterTreeOptions& tree_options,
              GroupRank rank, Trace trace)
      : flags_(flags),
        kind_(kind),
        tree_options_(tree_options),
        rank_(rank),
        trace_(std::move(trace)),
        truth_(trace_) {}

  Result<Json> Run();

 private:
  struct Slice {
    std::unique_ptr<SelectionPolicy> policy;
    std::unique_ptr<PageStore> store;
    double build_us = 0;
  };
  std::unique_ptr<SelectionPolicy> NewPolicy(uint64_t seed) const {
    const PolicyOptions options{trace_.dtype, trace_.dim, seed};
    if (kind_ == PolicyKind::kDciTree && flags_.dci_improved)
      return MakeDciTree(options, DciTreeOptions::Improved());
    if (kind_ == PolicyKind::kClusterTree) return MakeClusterTree(options, tree_options_);
    return MakePolicy(kind_, options);
  }
  BuildHints Hints() const {
    BuildHints hints;
    if (flags_.energy) hints.query_energy = trace_.energy;
    hints.queries = trace_.history;
    hints.query_group = trace_.group;
    hints.seed = flags_.seed;
    return hints;
  }
  Result<Packing> Propose(const TokenRows& rows, const BuildHints& hints) const;
  Result<double> TimeBuild(const TokenRows& rows, SelectionPolicy* policy,
                           PageLayout* layout) const;
  Result<Slice> BuildSlice(uint32_t tokens) const;
  Status BuildAgain(const Slice& first, Json* out) const;
  Status CheckAnswers(const Slice& slice) const;
  static uint32_t TokensOf(const Slice& slice, const Selection& got);
  Reading Ask(const Slice& slice, uint32_t read_cap, bool residual, bool judge);
  Status InsertAll(Slice* slice, std::vector<double>* micros) const;
  Status Insert(Slice* slice, Json* out);
  Status BuildOnThreads(const Slice& alone, Json* out) const;
  void Oracles(const Slice& slice, const Reading& service, Json* out);
  Json Parameters() const;
  Status Profile(Json* out) const;

  SelectRequest RequestOf(uint32_t query, uint32_t read_cap, bool residual) const {
    return {.queries = trace_.Query(query),
            .group = trace_.group,
            .max_pages = flags_.budget_pages,
            .read_cap = read_cap,
            .min_mass = static_cast<float>(flags_.min_mass),
            .rank = rank_,
            .local_lse = trace_.local_lse.empty()
                             ? nullptr
                             : trace_.local_lse.data() + size_t{query} * trace_.group,
            .residual = residual};
  }

  const SelectFlags& flags_;
  const PolicyKind kind_;
  const ClusterTreeOptions tree_options_;
  const GroupRank rank_;
  const double clock_us_ = ThreadClockCostMicros();  // in every interval, and in no policy
  const Trace trace_;
  SelectTruth truth_;
  CacheSweep sweep_;
};

// As a worker does, with the seeds of this build.
Result<Packing> SelectBench::Propose(const TokenRows& rows, const BuildHints& hints) const {
  std::unique_ptr<gpu::Device> device;
  if (flags_.proposed == "cuda") {
    KV_ASSIGN_OR_RETURN(device, gpu::MakeCudaDevice({}));
  } else if (flags_.proposed == "emulated") {
    device = gpu::MakeEmulatedDevice({});
  } else if (flags_.proposed != "cpu") {
    return InvalidArgument("--proposed '" + flags_.proposed + "': use none, cpu, emulated or cuda");
  }
  const auto assigner = device != nullptr ? gpu::MakeGpuAssigner(*device) : MakeCpuAssigner();
  return packing::Propose(rows, hints.query_energy, flags_.seed, *assigner);
}

Result<double> SelectBench::TimeBuild(const TokenRows& rows, SelectionPolicy* policy,
                                      PageLayout* layout) const {
  BuildHints hints = Hints();
  Packing proposed;
  if (flags_.proposed != "none") {
    KV_ASSIGN_OR_RETURN(proposed, Propose(rows, hints));
    hints.proposed = &proposed;
  }
  const double begin = ProcessCpuMicros();
  KV_ASSIGN_OR_RETURN(*layout, policy->Build(rows, hints));
  return ProcessCpuMicros() - begin;
}

Result<SelectBench::Slice> SelectBench::BuildSlice(uint32_t tokens) const {
  Slice slice;
  slice.policy = NewPolicy(flags_.seed);
  slice.store = std::make_unique<PageStore>(trace_.dtype, trace_.dim);
  const TokenRows rows = trace_.Rows(0, tokens);
  PageLayout layout;
  KV_ASSIGN_OR_RETURN(slice.build_us, TimeBuild(rows, slice.policy.get(), &layout));
  KV_RETURN_IF_ERROR(slice.store->ApplyLayout(rows, layout));
  KV_RETURN_IF_ERROR(slice.policy->Validate(slice.store->kv()));
  return slice;
}

// The same rows again: what a build costs a thread that has built before, as a server's have. The
// first of a process also pays for the first touch of all memory it works in.
Status SelectBench::BuildAgain(const Slice& first, Json* out) const {
  std::string image, again;
  first.policy->Save(&image);
  std::vector<double> micros = {first.build_us};
  const uint32_t builds = flags_.Builds();
  while (micros.size() < builds) {
    const auto policy = NewPolicy(flags_.seed);
    PageLayout layout;
    KV_ASSIGN_OR_RETURN(micros.emplace_back(),
                        TimeBuild(trace_.Rows(0, trace_.keys), policy.get(), &layout));
    again.clear();
    policy->Save(&again);
    if (again != image) return Internal("a slice built again differs from the first");
  }
  (*out)["builds"] = builds;
  (*out)["build_us_per_key"] = Quantile(micros, 0.5) / trace_.keys;
  (*out)["build_us_per_key_first"] = first.build_us / trace_.keys;
  return OkStatus();
}

// Budgets, distinct pages, and full attention when everything may be read.
Status SelectBench::CheckAnswers(const Slice& slice) const {
  auto backend = MakeCpuAttention();
  Selection got;
  std::vector<PageId> chosen;
  for (uint32_t q = 0; q < std::min(3u, trace_.query_count); ++q) {
    slice.policy->Select(RequestOf(q, limits::kContextTokensMax, true), slice.store->kv(), &got);
    std::vector<bool> seen(slice.store->page_count());
    chosen.clear();
    if (got.pages.size() > flags_.budget_pages) return Internal("more pages than asked for");
    for (const SelectedPage& page : got.pages) {
      if (page.page.value >= seen.size() || seen[page.page.value])
        return Internal("a page is unknown or repeated");
      seen[page.page.value] = true;
      chosen.push_back(page.page);
    }
    if (!SumsToFullAttention(kind_)) continue;
    AttentionStates full(trace_.group, trace_.dim);
    for (uint32_t p = 0; p < seen.size(); ++p)
      if (!seen[p]) chosen.emplace_back(p);
    backend->AttendPages(trace_.Query(q), slice.store->kv(), chosen, full.ref());
    chosen.resize(got.pages.size());
    backend->AttendPages(trace_.Query(q), slice.store->kv(), chosen, got.residual.ref());
    std::vector<float> x(size_t{trace_.group} * trace_.dim), y(x.size());
    FinishStates(full.ref(), x.data());
    FinishStates(got.residual.ref(), y.data());
    double difference = 0, norm = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      difference += (x[i] - y[i]) * (x[i] - y[i]);
      norm += x[i] * x[i];
    }
    if (!(difference <= 1e-6 * norm))
      return Internal("pages + residual differ from full attention by " +
                      std::to_string(std::sqrt(difference / norm)) + " although all may be read");
  }
  return OkStatus();
}

// Tokens of the answer itself: those of its pages, or those a policy of tokens attended to.
uint32_t SelectBench::TokensOf(const Slice& slice, const Selection& got) {
  uint32_t tokens = 0;
  for (const SelectedPage& page : got.pages)
    tokens += slice.store->kv().pages[page.page.value].fill;
  return got.pages.empty() ? got.tokens_read : tokens;
}

Reading SelectBench::Ask(const Slice& slice, uint32_t read_cap, bool residual, bool judge) {
  Reading reading;
  Selection got;
  std::vector<PageId> near;
  for (uint32_t q = 0; q < trace_.query_count; ++q) {
    SelectRequest request = RequestOf(q, read_cap, residual);
    if (judge || flags_.near > 0) truth_.Assign(q, *slice.store);
    if (flags_.near > 0) near = truth_.NearPages(flags_.near);
    request.near = near;
    // The shortest of a few calls: an interrupt or a neighbour's cache flush is not the policy's
    // cost.
    double best = 1e30;
    for (uint32_t r = 0; r < flags_.repeats; ++r) {
      const double begin = ThreadCpuMicros();
      slice.policy->Select(request, slice.store->kv(), &got);
      best = std::min(best, ThreadCpuMicros() - begin - clock_us_);
    }
    reading.micros.push_back(best);
    if (read_cap > 0 && residual) {
      double cold = 1e30;
      for (uint32_t r = 0; r < std::min(flags_.repeats, kColdRepeats); ++r) {
        sweep_.Run();
        const double begin = ThreadCpuMicros();
        slice.policy->Select(request, slice.store->kv(), &got);
        cold = std::min(cold, ThreadCpuMicros() - begin - clock_us_);
      }
      reading.cold_micros.push_back(cold);
    }
    reading.tokens_read.push_back(got.tokens_read);
    reading.pages.push_back(static_cast<double>(got.pages.size()));
    reading.tokens.push_back(static_cast<double>(TokensOf(slice, got)));
    if (!judge) continue;
    double mass = 0;
    for (uint32_t h = 0; h < trace_.group; ++h) {
      reading.top16.push_back(truth_.Coverage(h, 16, got.pages));
      reading.top256.push_back(truth_.Coverage(h, 256, got.pages));
      // Of tokens attended to where they lie, the share is that of the state itself.
      reading.mass.push_back(got.pages.empty() && residual ? truth_.ShareOf(h, got.residual)
                                                           : truth_.Mass(h, got.pages));
      reading.error.push_back(truth_.OutputError(h, got.pages, residual ? &got.residual : nullptr));
      reading.no_residual_error.push_back(truth_.OutputError(h, got.pages, nullptr));
      mass += reading.mass.back() / trace_.group;
    }
    reading.estimate_error.push_back(std::abs(mass - got.covered_mass));
  }
  return reading;
}

Status SelectBench::InsertAll(Slice* slice, std::vector<double>* micros) const {
  for (uint32_t t = 0; t < trace_.extra_keys; ++t) {
    const TokenRows row = trace_.Rows(trace_.keys + t, 1);
    const PagedKv kv = slice->store->kv();
    const double begin = ThreadCpuMicros();
    KV_ASSIGN_OR_RETURN(const InsertPlan plan, slice->policy->Insert(row, kv));
    micros->push_back(ThreadCpuMicros() - begin - clock_us_);
    KV_RETURN_IF_ERROR(slice->store->ApplyInsert(plan, row));
  }
  return slice->policy->Validate(slice->store->kv());
}

Status SelectBench::Insert(Slice* slice, Json* out) {
  std::vector<double> micros;
  KV_RETURN_IF_ERROR(InsertAll(slice, &micros));
  (*out)["inserts"] = micros.size();
  (*out)["insert_us_mean"] = Mean(micros);
  (*out)["insert_us_p50"] = Quantile(micros, 0.5);
  (*out)["insert_us_p999"] = Quantile(micros, 0.999);
  (*out)["insert_us_max"] = Quantile(micros, 1.0);
  if (micros.empty()) return OkStatus();
  // An insert happens once: what else the machine did meanwhile is told apart by growing an equal
  // slice in the same way.
  KV_ASSIGN_OR_RETURN(Slice again, BuildSlice(trace_.keys));
  std::vector<double> repeated;
  KV_RETURN_IF_ERROR(InsertAll(&again, &repeated));
  for (size_t i = 0; i < micros.size(); ++i) repeated[i] = std::min(repeated[i], micros[i]);
  (*out)["insert_us_mean_of_two"] = Mean(repeated);
  (*out)["insert_us_max_of_two"] = Quantile(repeated, 1.0);
  const Reading grown = Ask(*slice, flags_.read_cap, true, true);
  KV_ASSIGN_OR_RETURN(const Slice fresh, BuildSlice(trace_.keys + trace_.extra_keys));
  const Reading rebuilt = Ask(fresh, flags_.read_cap, true, true);
  (*out)["grown_coverage_top16"] = Mean(grown.top16);
  (*out)["grown_coverage_top256"] = Mean(grown.top256);
  (*out)["grown_mass_coverage_mean"] = Mean(grown.mass);
  (*out)["grown_output_error_mean"] = Mean(grown.error);
  (*out)["grown_query_us_p50"] = Quantile(grown.micros, 0.5);
  (*out)["grown_page_fill"] = static_cast<double>(slice->store->token_count()) /
                              (double{limits::kPageTokens} * slice->store->page_count());
  (*out)["fresh_coverage_top16"] = Mean(rebuilt.top16);
  (*out)["fresh_coverage_top256"] = Mean(rebuilt.top256);
  (*out)["fresh_mass_coverage_mean"] = Mean(rebuilt.mass);
  (*out)["fresh_output_error_mean"] = Mean(rebuilt.error);
  return OkStatus();
}

// One slice per thread, as a server's build threads do it; the first is the slice that was built
// alone and must come out the same.
Status SelectBench::BuildOnThreads(const Slice& alone, Json* out) const {
  if (flags_.threads < 2) return OkStatus();
  std::vector<std::thread> threads;
  std::vector<double> cpu(flags_.threads);
  std::string first, image;
  alone.policy->Save(&image);
  const auto start = std::chrono::steady_clock::now();
  for (uint32_t i = 0; i < flags_.threads; ++i) {
    threads.emplace_back([this, &cpu, &first, i] {
      auto policy = NewPolicy(flags_.seed + i);
      const BuildHints hints = Hints();
      const double begin = ThreadCpuMicros();
      KV_CHECK(policy->Build(trace_.Rows(0, trace_.keys), hints).ok());
      cpu[i] = ThreadCpuMicros() - begin;
      if (i == 0) policy->Save(&first);
    });
  }
  for (std::thread& thread : threads) thread.join();
  const std::chrono::duration<double, std::micro> wall = std::chrono::steady_clock::now() - start;
  if (first != image) return Internal("a slice built beside others differs from one built alone");
  (*out)["threads_build_us_per_key"] = Mean(cpu) / trace_.keys;
  (*out)["threads_build_wall_us_per_key"] = wall.count() / flags_.threads / trace_.keys;
  (*out)["threads_build_speedup"] =
      (*out)["build_us_per_key"].get<double>() * trace_.keys * flags_.threads / wall.count();
  return OkStatus();
}

void SelectBench::Oracles(const Slice& slice, const Reading& service, Json* out) {
  std::vector<double> tokens, pages, equal_reads, page_mass, page_top16;
  const auto reads = static_cast<uint32_t>(Mean(service.tokens_read));
  for (uint32_t q = 0; q < trace_.query_count; ++q) {
    truth_.Assign(q, *slice.store);
    const std::vector<SelectedPage> best = truth_.OraclePages(flags_.budget_pages);
    for (uint32_t h = 0; h < trace_.group; ++h) {
      tokens.push_back(truth_.OracleError(h, flags_.budget_pages * limits::kPageTokens));
      equal_reads.push_back(truth_.OracleError(h, reads));
      pages.push_back(truth_.OutputError(h, best, nullptr));
      page_mass.push_back(truth_.Mass(h, best));
      page_top16.push_back(truth_.Coverage(h, 16, best));
    }
  }
  (*out)["oracle_output_error_mean"] = Mean(tokens);
  (*out)["oracle_equal_reads_output_error_mean"] = Mean(equal_reads);
  (*out)["page_oracle_output_error_mean"] = Mean(pages);
  (*out)["page_oracle_mass_mean"] = Mean(page_mass);
  (*out)["page_oracle_top16"] = Mean(page_top16);
}

Status SelectBench::Profile(Json* out) const {
  KV_ASSIGN_OR_RETURN(const TraceProfile profile, ProfileTrace(trace_, flags_.seed));
  for (const auto& [name, value] : profile) (*out)[name] = value;
  return OkStatus();
}

Json SelectBench::Parameters() const {
  Json out;
  out["bench"] = "select";
  out["policy"] = flags_.policy;
  out["keys"] = trace_.keys;
  out["dim"] = trace_.dim;
  out["group"] = trace_.group;
  out["trace"] = flags_.trace;
  out["seed"] = flags_.seed;
  out["dtype"] = DTypeName(trace_.dtype);
  out["budget_pages"] = flags_.budget_pages;
  out["read_cap"] = flags_.read_cap;
  out["rank"] = flags_.rank;
  out["near"] = flags_.near;
  out["queries"] = trace_.query_count;
  out["group_spread"] = flags_.group_spread;
  out["energy"] = flags_.energy;
  out["dci_improved"] = flags_.dci_improved;
  out["layout"] = flags_.layout;
  out["sketch"] = flags_.sketch;
  out["threads"] = flags_.threads;
  out["insert_fraction"] = flags_.insert_fraction;
  return out;
}

Result<Json> SelectBench::Run() {
  Json out = Parameters();
  KV_ASSIGN_OR_RETURN(Slice slice, BuildSlice(trace_.keys));
  KV_RETURN_IF_ERROR(CheckAnswers(slice));
  KV_RETURN_IF_ERROR(BuildAgain(slice, &out));
  KV_RETURN_IF_ERROR(BuildOnThreads(slice, &out));
  double index_bytes = 0;
  slice.policy->VisitCounters([&](std::string_view name, double value) {
    if (name == "index_bytes") index_bytes = value;
    if (name == "sketched") out["sketched"] = value > 0;
  });
  out["index_bytes_per_key"] = index_bytes / trace_.keys;
  out["page_fill"] =
      static_cast<double>(trace_.keys) / (double{limits::kPageTokens} * slice.store->page_count());
  const Reading service = Ask(slice, flags_.read_cap, true, true);
  const Reading strict = Ask(slice, 0, true, true);
  const Reading plain = Ask(slice, flags_.read_cap, false, false);
  const Reading plain_strict = Ask(slice, 0, false, true);
  out["query_us_p50"] = Quantile(service.micros, 0.5);
  out["query_us_p99"] = Quantile(service.micros, 0.99);
  out["query_cold_us_p50"] = Quantile(service.cold_micros, 0.5);
  out["query_strict_us_p50"] = Quantile(strict.micros, 0.5);
  out["query_no_residual_us_p50"] = Quantile(plain.micros, 0.5);
  out["query_strict_no_residual_us_p50"] = Quantile(plain_strict.micros, 0.5);
  out["pages_mean"] = Mean(service.pages);
  out["coverage_top16"] = Mean(service.top16);
  out["coverage_top256"] = Mean(service.top256);
  out["coverage_top16_strict"] = Mean(strict.top16);
  out["coverage_top16_strict_no_residual"] = Mean(plain_strict.top16);
  out["mass_coverage_p10"] = Quantile(service.mass, 0.1);
  out["mass_coverage_p50"] = Quantile(service.mass, 0.5);
  out["mass_coverage_mean"] = Mean(service.mass);
  out["mass_estimate_error_mean"] = Mean(service.estimate_error);
  out["tokens_read_mean"] = Mean(service.tokens_read);
  out["tokens_read_strict_mean"] = Mean(strict.tokens_read);
  out["output_error_mean"] = Mean(service.error);
  out["output_error_p90"] = Quantile(service.error, 0.9);
  out["output_error_strict_mean"] = Mean(strict.error);
  out["output_error_strict_p90"] = Quantile(strict.error, 0.9);
  out["mass_coverage_strict_mean"] = Mean(strict.mass);
  out["tokens_strict_mean"] = Mean(strict.tokens);
  out["bytes_strict_mean"] =
      Mean(strict.tokens) * 2 * trace_.dim * static_cast<double>(DTypeBytes(trace_.dtype));
  out["output_error_pages_only_mean"] = Mean(plain_strict.error);
  out["output_error_no_residual_mean"] = Mean(service.no_residual_error);
  Oracles(slice, service, &out);
  KV_RETURN_IF_ERROR(Insert(&slice, &out));
  if (flags_.profile) KV_RETURN_IF_ERROR(Profile(&out));
  out["exact_scan_us_p50"] = ExactScanMicros(trace_);
  out["query_per_exact_scan"] =
      out["query_us_p50"].get<double>() / out["exact_scan_us_p50"].get<double>();
  out["memory_read_gb_s"] = ReadBandwidthGBs();
  out["commit"] = CommitName();
  out["machine"] = MachineName();
  return out;
}

class SelectCommand final : public BenchCommand {
 public:
  const char* name() const override { return "select"; }
  const char* description() const override {
    return "Quality and cost of a selection policy on one slice: one JSON object";
  }
  const char* examples() const override {
    return "icecache-bench select --keys 32768 --group 1 --trace clustered --json\n"
           "icecache-bench select --policy dci_tree --trace calibrated:topic --budget-pages 4\n"
           "icecache-bench select --trace weak --insert-fraction 0.25 --rank max_token";
  }
  void AddFlags(ConfigParser* parser) override { flags_.AddTo(parser); }
  Status Run() override;

 private:
  SelectFlags flags_;
};

Status SelectCommand::Run() {
  KV_ASSIGN_OR_RETURN(const PolicyKind kind, ParsePolicyKind(flags_.policy));
  const std::optional<DType> dtype = ParseDType(flags_.dtype);
  if (!dtype) return InvalidArgument("--dtype '" + flags_.dtype + "': use f32, f16 or bf16");
  KV_ASSIGN_OR_RETURN(const GroupRank rank, flags_.Rank());
  TraceSpec spec{.name = flags_.trace,
                 .keys = flags_.keys,
                 .extra_keys = static_cast<uint32_t>(flags_.keys * flags_.insert_fraction),
                 .dim = flags_.dim,
                 .group = flags_.group,
                 .query_count = flags_.queries,
                 .dtype = *dtype,
                 .seed = flags_.seed,
                 .group_spread = flags_.group_spread};
  KV_ASSIGN_OR_RETURN(Trace trace, MakeTrace(spec));
  KV_ASSIGN_OR_RETURN(const ClusterTreeOptions tree_options, flags_.TreeOptions());
  SelectBench bench(flags_, kind, tree_options, rank, std::move(trace));
  KV_ASSIGN_OR_RETURN(const Json out, bench.Run());
  std::printf("%s\n", out.dump(flags_.json ? -1 : 2).c_str());
  return OkStatus();
}

}  // namespace

std::unique_ptr<BenchCommand> MakeSelectCommand() { return std::make_unique<SelectCommand>(); }

}  // namespace icecache
