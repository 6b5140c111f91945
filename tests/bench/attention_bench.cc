// icecache-bench attention: decode attention on a device over selected pages, next to attention
// over all pages by the same kernel, to the time that the bytes take at the speed of a device copy,
// and to an empty launch; all in one run. Results are compared with the float64 reference before
// anything is timed. A peer for the dense side: tests/bench/sdpa_peer.py.
//
// One layer of Llama-3.1-8B's attention (8 kv heads x 4, head_dim 128) for a batch of sequences. A
// point's pages lie at random places of the device's memory.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <numeric>

#include "kernels/attention.h"
#include "kernels/distance.h"
#include "kernels/gpu/attention_gpu.h"
#include "tests/bench/command.h"
#include "tests/bench/device_timing.h"
#include "tests/bench/measure.h"
#include "tests/bench/random.h"

namespace icecache {
namespace {

using Json = nlohmann::ordered_json;
using gpu::DeviceMemory;
using gpu::MemoryKind;

constexpr uint32_t kKvHeads = 8, kGroup = 4, kDim = 128;
constexpr size_t kRowBytes = kDim * 2;
constexpr size_t kPageBytes = 2 * limits::kPageTokens * kRowBytes;
constexpr size_t kPatternBytes = size_t{4} << 20;  // random content, repeated over the memory
constexpr double kErrorMax = 1e-4;

struct Flags {
  std::string device = "cuda", dtype = "bf16";
  std::vector<std::string> context = {"8k", "32k", "128k"}, batch = {"1", "8", "32"},
                           budget = {"64", "256"};
  uint32_t rounds = 100;
  uint64_t seed = 1;
  bool json = false;
};

// Attention of one layer for a batch: what is launched.
class Scene {
 public:
  Scene(gpu::Device& device, DType dtype, uint64_t seed)
      : device_(device), dtype_(dtype), random_(seed) {}

  // Memory for `batch` sequences of `context` tokens. RESOURCE_EXHAUSTED when they do not fit.
  Status Fill(uint32_t context, uint32_t batch);
  // The tables of `pages` pages per (sequence, kv head), at random places.
  Status Choose(uint32_t pages);
  void Launch();
  // The largest difference to the reference over the first and the last task.
  Result<double> Error();

  uint64_t bytes() const { return uint64_t{batch_} * kKvHeads * chosen_ * kPageBytes; }
  uint32_t splits() const { return args_.splits; }

 private:
  std::vector<float> Reference(uint32_t task);

  gpu::Device& device_;
  const DType dtype_;
  TraceRandom random_;
  uint32_t batch_ = 0, context_pages_ = 0, chosen_ = 0;
  std::vector<std::byte> pattern_;
  std::vector<float> queries_;
  std::vector<uint32_t> frames_;  // chosen, per task
  DeviceMemory memory_, tables_, states_, result_;
  gpu::AttendArgs args_;
  gpu::MergeArgs merge_;
};

Status Scene::Fill(uint32_t context, uint32_t batch) {
  batch_ = batch;
  context_pages_ = context / limits::kPageTokens;
  const size_t bytes = size_t{batch} * kKvHeads * context_pages_ * kPageBytes;
  memory_ = DeviceMemory();
  KV_ASSIGN_OR_RETURN(memory_, DeviceMemory::Allocate(device_, MemoryKind::kDevice, bytes));
  if (pattern_.empty()) {
    std::vector<float> values(kPatternBytes / 2);
    random_.Fill(values.data(), values.size(), 1);
    pattern_.resize(kPatternBytes);
    FromF32(values.data(), values.size(), dtype_, pattern_.data());
  }
  for (size_t at = 0; at < bytes; at += kPatternBytes) {
    device_.Copy(memory_.data(at), pattern_.data(), std::min(kPatternBytes, bytes - at));
  }
  return device_.Synchronize();
}

Status Scene::Choose(uint32_t pages) {
  chosen_ = std::min(pages, context_pages_);
  const uint32_t task_count = batch_ * kKvHeads;
  const uint32_t heads = task_count * kGroup;
  queries_.resize(size_t{heads} * kDim);
  random_.Fill(queries_.data(), queries_.size(), 3.0f / std::sqrt(float{kDim}));
  std::vector<gpu::AttendTask> tasks;
  std::vector<PageView> views;
  std::vector<uint32_t> order(context_pages_);
  frames_.clear();
  for (uint32_t t = 0; t < task_count; ++t) {
    std::iota(order.begin(), order.end(), t * context_pages_);
    for (uint32_t i = 0; i < chosen_; ++i) {
      std::swap(order[i], order[i + random_.Below(context_pages_ - i)]);
      const std::byte* const k = memory_.data(order[i] * kPageBytes);
      views.push_back({k, k + kPageBytes / 2, limits::kPageTokens});
      frames_.push_back(order[i]);
    }
    tasks.push_back({t * kGroup, kGroup, t * chosen_, (t + 1) * chosen_, gpu::kAllVisible});
  }
  const size_t query_bytes = queries_.size() * 4, task_bytes = tasks.size() * sizeof(tasks[0]);
  const size_t tasks_at = query_bytes, views_at = (tasks_at + task_bytes + 15) / 16 * 16;
  for (DeviceMemory* old : {&tables_, &states_, &result_}) *old = DeviceMemory();
  KV_ASSIGN_OR_RETURN(tables_, DeviceMemory::Allocate(device_, MemoryKind::kDevice,
                                                      views_at + views.size() * sizeof(views[0])));
  device_.Copy(tables_.data(), queries_.data(), query_bytes);
  device_.Copy(tables_.data(tasks_at), tasks.data(), task_bytes);
  device_.Copy(tables_.data(views_at), views.data(), views.size() * sizeof(views[0]));
  args_ = {};
  args_.splits = gpu::SplitsFor(device_.info().processors, task_count, chosen_);
  const size_t state_bytes = AttentionStates::FlatFloats(heads, kDim) * 4;
  KV_ASSIGN_OR_RETURN(
      states_, DeviceMemory::Allocate(device_, MemoryKind::kDevice, args_.splits * state_bytes));
  KV_ASSIGN_OR_RETURN(result_, DeviceMemory::Allocate(device_, MemoryKind::kDevice, query_bytes));
  args_.queries = tables_.data<float>();
  args_.tasks = tables_.data<gpu::AttendTask>(tasks_at);
  args_.pages = tables_.data<PageView>(views_at);
  args_.states = states_.data<float>();
  args_.dtype = dtype_;
  args_.task_count = task_count;
  args_.heads = heads;
  args_.group = args_.query_heads = kGroup;
  args_.head_dim = kDim;
  merge_ = {};
  merge_.terms[0] = {args_.states, args_.splits};
  merge_.term_count = 1;
  merge_.heads = heads;
  merge_.head_dim = kDim;
  merge_.result = result_.data<float>();
  return device_.Synchronize();
}

void Scene::Launch() {
  device_.Launch(args_);
  device_.Launch(merge_);
}

std::vector<float> Scene::Reference(uint32_t task) {
  std::vector<PageView> views;
  std::vector<PageId> ids;
  for (uint32_t i = 0; i < chosen_; ++i) {
    // What lies in a frame is the part of the pattern that was copied there.
    const size_t at = size_t{frames_[size_t{task} * chosen_ + i]} * kPageBytes % kPatternBytes;
    views.push_back({pattern_.data() + at, pattern_.data() + at + kPageBytes / 2, 16});
    ids.emplace_back(i);
  }
  AttentionStates states(kGroup, kDim);
  const PagedKv kv{dtype_, kDim, chosen_, views.data()};
  MakeReferenceAttention()->AttendPages(queries_.data() + size_t{task} * kGroup * kDim, kv, ids,
                                        states.ref());
  std::vector<float> out(kGroup * kDim);
  FinishStates(states.ref(), out.data());
  return out;
}

Result<double> Scene::Error() {
  Launch();
  std::vector<float> actual(queries_.size());
  device_.Copy(actual.data(), result_.data(), actual.size() * 4);
  KV_RETURN_IF_ERROR(device_.Synchronize());
  double error = 0;
  for (const uint32_t task : {0u, batch_ * kKvHeads - 1}) {
    const std::vector<float> expected = Reference(task);
    for (size_t i = 0; i < expected.size(); ++i) {
      const double here = actual[size_t{task} * kGroup * kDim + i];
      error = std::max(error, std::isfinite(here) ? std::abs(here - expected[i]) : INFINITY);
    }
  }
  return error;
}

class AttentionCommand final : public BenchCommand {
 public:
  const char* name() const override { return "attention"; }
  const char* description() const override {
    return "Decode attention on a GPU: selected pages against all of them";
  }
  const char* examples() const override {
    return "icecache-bench attention --device cuda --json\n"
           "icecache-bench attention --context 32k --batch 8 --budget 256";
  }
  void AddFlags(ConfigParser* parser) override;
  Status Run() override;

 private:
  Status RunPoint(gpu::Device& device, uint32_t context, uint32_t batch);
  void Print(const Json& point) const;

  Flags flags_;
  double copy_gbs_ = 0, empty_us_ = 0;
};

void AttentionCommand::AddFlags(ConfigParser* parser) {
  parser->Add("device", &flags_.device, "cuda, or emulated (checks results; times mean nothing)");
  parser->Add("dtype", &flags_.dtype, "Of K and V: bf16 or f16");
  parser->AddList("context", &flags_.context, "Tokens per sequence: 8k, 32k, 128k");
  parser->AddList("batch", &flags_.batch, "Sequences that decode together");
  parser->AddList("budget", &flags_.budget, "Tokens per kv head");
  parser->Add("rounds", &flags_.rounds, "Timed rounds per point", 1, 100000);
  parser->Add("seed", &flags_.seed, "Seed of contents and places");
  parser->Add("json", &flags_.json, "One JSON object per line instead of a table");
}

Status AttentionCommand::RunPoint(gpu::Device& device, uint32_t context, uint32_t batch) {
  Scene scene(device, *ParseDType(flags_.dtype), flags_.seed);
  Json point = {{"bench", "attention"},   {"device", device.info().name},
                {"dtype", flags_.dtype},  {"context", context},
                {"batch", batch},         {"seed", flags_.seed},
                {"commit", CommitName()}, {"machine", MachineName()},
                {"copy_gb_s", copy_gbs_}, {"empty_launch_us", empty_us_}};
  if (const Status fits = scene.Fill(context, batch); !fits.ok()) {
    point["skipped"] = fits.ToString();
    Print(point);
    return OkStatus();
  }
  DeviceTimes full;
  const auto measure = [&](uint32_t tokens, DeviceTimes* times) -> Status {
    KV_RETURN_IF_ERROR(scene.Choose(tokens / limits::kPageTokens));
    KV_ASSIGN_OR_RETURN(const double error, scene.Error());
    if (!(error <= kErrorMax)) {
      return DataLoss("attention is " + std::to_string(error) +
                      " off the reference; nothing was timed");
    }
    point["error_max"] = error;
    KV_ASSIGN_OR_RETURN(*times, TimeQueued(device, flags_.rounds, [&] { scene.Launch(); }));
    return OkStatus();
  };
  KV_RETURN_IF_ERROR(measure(context, &full));
  const double full_floor = static_cast<double>(scene.bytes()) / copy_gbs_ / 1e3;
  for (const std::string& text : flags_.budget) {
    const auto budget = static_cast<uint32_t>(std::strtoul(text.c_str(), nullptr, 10));
    if (budget < limits::kPageTokens || budget > context) {
      return InvalidArgument("budget '" + text + "', expected 16 to the context's tokens");
    }
    DeviceTimes sparse;
    KV_RETURN_IF_ERROR(measure(budget, &sparse));
    const double floor = static_cast<double>(scene.bytes()) / copy_gbs_ / 1e3;
    point["budget"] = budget;
    point["splits"] = scene.splits();
    point["working_set_bytes"] = scene.bytes();
    point["p50_us"] = sparse.p50_us;
    point["p99_us"] = sparse.p99_us;
    point["floor_us"] = floor;
    point["of_copy_bandwidth"] = floor / sparse.p50_us;
    point["over_empty_launch"] = sparse.p50_us / empty_us_;
    point["full_p50_us"] = full.p50_us;
    point["full_of_copy_bandwidth"] = full_floor / full.p50_us;
    point["full_over_sparse"] = full.p50_us / sparse.p50_us;
    Print(point);
  }
  return OkStatus();
}

void AttentionCommand::Print(const Json& point) const {
  if (flags_.json) {
    std::printf("%s\n", point.dump().c_str());
  } else if (point.contains("skipped")) {
    std::printf("%7u %5u  %s\n", point["context"].get<uint32_t>(), point["batch"].get<uint32_t>(),
                point["skipped"].get<std::string>().c_str());
  } else {
    std::printf("%7u %5u %6u %9.1f %9.1f %9.1f %6.2f %10.1f %7.1f\n",
                point["context"].get<uint32_t>(), point["batch"].get<uint32_t>(),
                point["budget"].get<uint32_t>(), point["p50_us"].get<double>(),
                point["p99_us"].get<double>(), point["floor_us"].get<double>(),
                point["of_copy_bandwidth"].get<double>(), point["full_p50_us"].get<double>(),
                point["full_over_sparse"].get<double>());
  }
  std::fflush(stdout);
}

Status AttentionCommand::Run() {
  const auto dtype = ParseDType(flags_.dtype);
  if (!dtype || *dtype == DType::kF32) {
    return InvalidArgument("dtype '" + flags_.dtype + "', expected bf16 or f16");
  }
  KV_ASSIGN_OR_RETURN(const auto device, BenchDevice(flags_.device));
  KV_ASSIGN_OR_RETURN(copy_gbs_, DeviceCopyGBs(*device));
  KV_ASSIGN_OR_RETURN(empty_us_, EmptyLaunchMicros(*device));
  if (!flags_.json) {
    std::printf("%s; copy %.0f GB/s, empty launch %.1f us\n", device->info().name.c_str(),
                copy_gbs_, empty_us_);
    std::printf("context batch budget       p50       p99     floor  /copy       full  full/us\n");
  }
  for (const std::string& context : flags_.context) {
    KV_ASSIGN_OR_RETURN(const uint32_t tokens, ParseTokenCount(context));
    for (const std::string& batch : flags_.batch) {
      const auto sequences = static_cast<uint32_t>(std::strtoul(batch.c_str(), nullptr, 10));
      if (sequences == 0 || sequences > 4096) {
        return InvalidArgument("batch '" + batch + "', expected 1 to 4096");
      }
      KV_RETURN_IF_ERROR(RunPoint(*device, tokens, sequences));
    }
  }
  return OkStatus();
}

}  // namespace

std::unique_ptr<BenchCommand> MakeAttentionCommand() {
  return std::make_unique<AttentionCommand>();
}

}  // namespace icecache
