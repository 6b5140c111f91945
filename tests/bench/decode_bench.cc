// icecache-bench decode: whole decode steps of a known model's shape, without its weights: every
// layer through a server process, the transport and the worker's own code, next to full attention
// over the same K and V in the same run. Outputs are compared with full attention before anything
// is timed, and every fourth step after that.
//
// Where a token's time goes: `select` is the servers' choosing (the slowest shard's, where shards
// work side by side) as far as the worker waited for it, `wait` the rest of the waiting, `transfer`
// making requests and decoding, verifying and placing what came, `attention` computing. `remote` is
// the first three.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "common/limits.h"
#include "common/log.h"
#include "common/size.h"
#include "tests/bench/command.h"
#include "tests/bench/decode_scene.h"
#include "tests/bench/measure.h"
#include "worker/attention_full.h"
#include "worker/attention_icecache.h"
#include "worker/serve/compute.h"

namespace icecache {
namespace {

using Json = nlohmann::ordered_json;

constexpr uint32_t kCheckEvery = 4;
constexpr double kErrorMax = 0.5;  // mean relative error above which something is broken

struct Flags {
  std::string shape = "llama-3.1-8b", policy = "cluster_tree", device = "cpu";
  std::vector<std::string> context = {"32k"}, transport = {"shm"}, reply_mode = {"auto"},
                           transfer = {"native"}, prefetch = {"off"}, layer_reuse = {"1"};
  uint32_t layers = 0, budget = 256, steps = 32, warmup = 4, server_threads = 2, read_cap = 1024;
  uint32_t resident_multiple = 3;
  double prefetch_cosine = IceCacheOptions().prefetch_cosine;
  uint64_t seed = 1, memory = uint64_t{3} << 30;
  bool json = false;
};

// One way of decoding.
struct Point {
  std::string transport;
  ReplyMode mode = ReplyMode::kAuto;
  bool int8 = false, prefetch = false;
  uint32_t layer_reuse = 1;
};

double Millis(Duration d) { return std::chrono::duration<double, std::milli>(d).count(); }

// Per step, summed over the layers that are run.
struct Reading {
  std::vector<double> total, select, wait, transfer, attention, remote, full;
  std::vector<double> error;  // per query head, relative
  uint64_t bytes = 0, steps = 0;
  AttentionStats sum;
  double cold_remote_ms = 0;
  uint64_t cold_bytes = 0;
};

class DecodeRun {
 public:
  DecodeRun(DecodeScene& scene, const Flags& flags, const Point& point, const Compute& compute)
      : scene_(scene),
        flags_(flags),
        point_(point),
        compute_(compute),
        shape_(scene.options().shape) {}

  Status Run();
  Json Result(const ModelShape& model) const;

 private:
  Status Step(uint32_t step, bool timed);
  Status FullStep(LayerId layer, uint32_t step, const std::vector<float>& out);

  DecodeScene& scene_;
  const Flags& flags_;
  const Point& point_;
  const Compute& compute_;
  const ModelShape shape_;
  std::unique_ptr<AttentionBackend> cpu_ = MakeCpuAttention();  // of full attention, for checks
  DecodeScene::Session session_;
  std::unique_ptr<AttentionIceCache> attention_;
  std::unique_ptr<AttentionFull> full_;
  ReplyMode mode_used_ = ReplyMode::kAuto;
  Reading reading_;
};

Status DecodeRun::Run() {
  KV_ASSIGN_OR_RETURN(session_, scene_.Join(point_.transport, point_.mode, compute_.pages()));
  IceCacheOptions options;
  options.budget = {flags_.budget, scene_.options().sink_tokens, scene_.options().window_tokens};
  options.read_cap = flags_.read_cap;
  options.resident_multiple = flags_.resident_multiple;
  options.frames = compute_.frames.get();
  options.intake = compute_.intake.get();
  options.int8 = point_.int8;
  options.prefetch = point_.prefetch;
  options.prefetch_cosine = static_cast<float>(flags_.prefetch_cosine);
  options.layer_reuse = point_.layer_reuse;
  attention_ = std::make_unique<AttentionIceCache>(shape_, session_.link->cache(),
                                                   *compute_.attention, options);
  attention_->Begin(session_.handle, scene_.window(), session_.grant.context.segments);
  scene_.local().Truncate(scene_.options().context_tokens);
  full_ = std::make_unique<AttentionFull>(shape_, scene_.local(), *cpu_);
  const uint32_t untimed = 1 + flags_.warmup;
  for (uint32_t step = 0; step < untimed; ++step) KV_RETURN_IF_ERROR(Step(step, false));
  mode_used_ = session_.link->cache().link(ShardId(0)).mode();
  const double error = Mean(reading_.error);
  if (!(error <= kErrorMax)) {
    return DataLoss("the outputs are " + std::to_string(error) +
                    " off full attention on average; nothing was timed");
  }
  for (uint32_t step = untimed; step < untimed + flags_.steps; ++step) {
    KV_RETURN_IF_ERROR(Step(step, true));
  }
  return session_.link->control().Release(session_.handle.id);
}

Status DecodeRun::Step(uint32_t step, bool timed) {
  const bool check = !timed || step % kCheckEvery == 0;
  const TokenPos position(scene_.options().context_tokens + step);
  const size_t width = size_t{shape_.query_heads} * shape_.head_dim;
  std::vector<std::vector<float>> out(shape_.layers, std::vector<float>(width));
  KV_RETURN_IF_ERROR(session_.link->Pump());
  attention_->ResetStats();
  const auto start = std::chrono::steady_clock::now();
  for (uint16_t l = 0; l < shape_.layers; ++l) {
    const LayerId layer(l);
    KV_RETURN_IF_ERROR(attention_->Attend(layer, position, 1, scene_.q(layer, step),
                                          scene_.k(layer, step), scene_.v(layer, step),
                                          out[l].data()));
  }
  const Duration total = std::chrono::steady_clock::now() - start;
  const AttentionStats stats = attention_->stats();
  const Duration remote = stats.select_wait + stats.transfer;
  if (step == 0) {
    reading_.cold_remote_ms = Millis(remote);
    reading_.cold_bytes = stats.bytes_moved;
  }
  if (timed) {
    const double select =
        std::min(Millis(stats.select_wait), static_cast<double>(stats.slowest_select_ns) / 1e6);
    reading_.total.push_back(Millis(total));
    reading_.select.push_back(select);
    reading_.wait.push_back(Millis(stats.select_wait) - select);
    reading_.transfer.push_back(Millis(stats.transfer));
    reading_.attention.push_back(Millis(stats.attention));
    reading_.remote.push_back(Millis(remote));
    reading_.bytes += stats.bytes_moved;
    ++reading_.steps;
    reading_.sum += stats;
  }
  full_->ResetStats();
  for (uint16_t l = 0; l < shape_.layers; ++l) {
    if (check) {
      KV_RETURN_IF_ERROR(FullStep(LayerId(l), step, out[l]));
    } else {
      LayerRows token(shape_, position, 1);
      token.StoreToken(position, scene_.k(LayerId(l), step), scene_.v(LayerId(l), step));
      scene_.local().Append(LayerId(l), token);
    }
    KV_RETURN_IF_ERROR(session_.link->Pump());
  }
  if (timed && check) reading_.full.push_back(Millis(full_->stats().attention));
  return OkStatus();
}

Status DecodeRun::FullStep(LayerId layer, uint32_t step, const std::vector<float>& out) {
  std::vector<float> full(out.size());
  KV_RETURN_IF_ERROR(full_->Attend(layer, TokenPos(scene_.options().context_tokens + step), 1,
                                   scene_.q(layer, step), scene_.k(layer, step),
                                   scene_.v(layer, step), full.data()));
  for (uint32_t h = 0; h < shape_.query_heads; ++h) {
    double difference = 0, norm = 0;
    for (size_t i = size_t{h} * shape_.head_dim; i < size_t{h + 1} * shape_.head_dim; ++i) {
      difference += (double{out[i]} - full[i]) * (double{out[i]} - full[i]);
      norm += double{full[i]} * full[i];
    }
    reading_.error.push_back(std::sqrt(difference / std::max(norm, 1e-30)));
  }
  return OkStatus();
}

Json DecodeRun::Result(const ModelShape& model) const {
  const Reading& r = reading_;
  const double scale = static_cast<double>(model.layers) / shape_.layers;
  const auto p50 = [&](const std::vector<double>& x) { return scale * Quantile(x, 0.5); };
  const auto steps = static_cast<double>(std::max<uint64_t>(1, r.steps));
  Json out;
  out["bench"] = "decode";
  out["shape"] = flags_.shape;
  out["context"] = scene_.options().context_tokens;
  out["budget"] = flags_.budget;
  out["transport"] = point_.transport;
  out["reply_mode"] = ReplyModeName(mode_used_);
  out["transfer"] = point_.int8 ? "int8" : "native";
  out["prefetch"] = point_.prefetch;
  out["layer_reuse"] = point_.layer_reuse;
  out["layers"] = model.layers;
  out["layers_run"] = shape_.layers;
  out["scaled"] = shape_.layers < model.layers;  // times and bytes: those of layers_run, scaled up
  out["remote_ms_p50"] = p50(r.remote);
  out["remote_ms_p99"] = scale * Quantile(r.remote, 0.99);
  out["select_ms_p50"] = p50(r.select);
  out["wait_ms_p50"] = p50(r.wait);
  out["transfer_ms_p50"] = p50(r.transfer);
  out["attention_ms_p50"] = p50(r.attention);
  out["total_ms_p50"] = p50(r.total);
  out["total_ms_p99"] = scale * Quantile(r.total, 0.99);
  out["full_ms_p50"] = p50(r.full);
  out["full_over_attention"] = Quantile(r.full, 0.5) / Quantile(r.attention, 0.5);
  out["full_over_total"] = Quantile(r.full, 0.5) / Quantile(r.total, 0.5);
  out["error_mean"] = Mean(r.error);
  out["error_p99"] = Quantile(r.error, 0.99);
  out["hit_rate"] = r.sum.hit_rate();
  out["grown_pages"] = r.sum.grown_pages;
  if (point_.prefetch) {
    out["prefetch_cosine"] = flags_.prefetch_cosine;
    out["asked_again"] =
        static_cast<double>(r.sum.asked_again) / static_cast<double>(std::max<uint64_t>(1, r.sum.asked_ahead));
  }
  out["bytes_per_token_cold"] = scale * static_cast<double>(r.cold_bytes);
  out["bytes_per_token_warm"] = scale * static_cast<double>(r.bytes) / steps;
  out["remote_ms_cold"] = scale * r.cold_remote_ms;
  out["server_select_ms"] = scale * static_cast<double>(r.sum.server_select_ns) / 1e6 / steps;
  out["attended_tokens_per_head"] = r.sum.tokens_per_head();
  out["degraded_steps"] = r.sum.degraded_steps;
  out["steps"] = flags_.steps;
  out["server_threads"] = flags_.server_threads;
  out["seed"] = flags_.seed;
  out["commit"] = CommitName();
  out["machine"] = MachineName();
  out["device"] = compute_.device ? compute_.device->info().name : "cpu";
  return out;
}

Status OneOf(const char* flag, const std::string& value, const std::string& a,
             const std::string& b) {
  if (value == a || value == b) return OkStatus();
  return InvalidArgument(std::string(flag) + " '" + value + "', expected " + a + " or " + b);
}

// Every combination of the switches, the leftmost turning slowest.
Result<std::vector<Point>> Points(const Flags& flags) {
  std::vector<Point> points(1);
  const auto times = [&](const std::vector<std::string>& values, auto set) -> Status {
    std::vector<Point> product;
    for (const Point& point : points) {
      for (const std::string& value : values) {
        KV_RETURN_IF_ERROR(set(value, &product.emplace_back(point)));
      }
    }
    points = std::move(product);
    return OkStatus();
  };
  KV_RETURN_IF_ERROR(times(flags.transport, [](const std::string& value, Point* p) {
    p->transport = value;
    return OneOf("transport", value, "shm", "tcp");
  }));
  KV_RETURN_IF_ERROR(times(flags.reply_mode, [](const std::string& value, Point* p) -> Status {
    KV_ASSIGN_OR_RETURN(p->mode, ParseReplyMode(value));
    return OkStatus();
  }));
  KV_RETURN_IF_ERROR(times(flags.transfer, [](const std::string& value, Point* p) {
    p->int8 = value == "int8";
    return OneOf("transfer", value, "native", "int8");
  }));
  KV_RETURN_IF_ERROR(times(flags.prefetch, [](const std::string& value, Point* p) {
    p->prefetch = value == "on";
    return OneOf("prefetch", value, "off", "on");
  }));
  KV_RETURN_IF_ERROR(times(flags.layer_reuse, [](const std::string& value, Point* p) -> Status {
    p->layer_reuse = static_cast<uint32_t>(std::strtoul(value.c_str(), nullptr, 10));
    if (p->layer_reuse >= 1 && p->layer_reuse <= limits::kLayerReuseMax) return OkStatus();
    return InvalidArgument("layer_reuse '" + value + "', expected 1 to " +
                           std::to_string(limits::kLayerReuseMax));
  }));
  return points;
}

class DecodeCommand final : public BenchCommand {
 public:
  const char* name() const override { return "decode"; }
  const char* description() const override {
    return "Whole decode steps of a model's shape through a server, next to full attention";
  }
  const char* examples() const override {
    return "icecache-bench decode --shape llama-3.1-8b --context 32k --budget 256 --json\n"
           "icecache-bench decode --context 8k,32k --transport shm,tcp --reply-mode inline,mapped";
  }
  void AddFlags(ConfigParser* parser) override;
  Status Run() override;

 private:
  Status RunContext(uint32_t tokens, const ModelShape& model);
  Result<uint32_t> LayersThatFit(uint32_t tokens, const ModelShape& model) const;
  void Print(const Json& point) const;
  Flags flags_;
  Compute compute_;
};

void DecodeCommand::AddFlags(ConfigParser* parser) {
  parser->Add("shape", &flags_.shape, "Model whose layers, heads and head_dim are used");
  parser->Add("device", &flags_.device, "Where attention runs: cpu, cuda, auto");
  parser->AddList("context", &flags_.context, "Tokens of the document: 8k, 32k, 128k");
  parser->Add("layers", &flags_.layers,
              "Layers to run; 0: as many as --memory holds. Fewer than the model's are scaled up",
              0, limits::kLayersMax);
  parser->AddSize("memory", &flags_.memory, "For K and V, here and in the server together");
  parser->Add("budget", &flags_.budget, "Tokens per head, sinks and window included", 48);
  parser->Add("steps", &flags_.steps, "Tokens that are timed", 4, 100000);
  parser->Add("warmup", &flags_.warmup, "Tokens between the first (cold) and the timed ones");
  parser->AddList("transport", &flags_.transport, "shm, tcp");
  parser->AddList("reply_mode", &flags_.reply_mode, "auto, inline, mapped, attend");
  parser->AddList("transfer", &flags_.transfer, "native, int8");
  parser->AddList("prefetch", &flags_.prefetch, "off, on");
  parser->Add("prefetch_cosine", &flags_.prefetch_cosine, "As icecache-worker --prefetch-cosine",
              -1, 1);
  parser->AddList("layer_reuse", &flags_.layer_reuse, "Layers per anchor: 1, 2, 4 ...");
  parser->Add("server_threads", &flags_.server_threads, "Shards of the server", 1, 64);
  parser->Add("policy", &flags_.policy, "Selection policy of the server");
  parser->Add("read_cap", &flags_.read_cap, "As icecache-worker --read-cap");
  parser->Add("resident_multiple", &flags_.resident_multiple,
              "As icecache-worker --resident-multiple", 1, 64);
  parser->Add("seed", &flags_.seed, "Seed of the traces");
  parser->Add("json", &flags_.json, "One JSON object per line instead of a table");
}

Result<uint32_t> ParseTokens(const std::string& text) {
  char* end = nullptr;
  const unsigned long number = std::strtoul(text.c_str(), &end, 10);
  const bool kilo = *end == 'k';
  const unsigned long tokens = kilo ? number * 1024 : number;
  if (end == text.c_str() || *(end + (kilo ? 1 : 0)) != '\0' || tokens < 256 ||
      tokens > limits::kContextTokensMax) {
    return InvalidArgument("context '" + text + "', expected 256 to " +
                           std::to_string(limits::kContextTokensMax) + " tokens, like 32k");
  }
  return static_cast<uint32_t>(tokens);
}

Result<uint32_t> DecodeCommand::LayersThatFit(uint32_t tokens, const ModelShape& model) const {
  if (flags_.layers > 0) return std::min(flags_.layers, model.layers);
  const uint64_t layer = 2 * model.token_bytes() / model.layers * tokens * 5 / 4;
  const uint64_t fit = flags_.memory / layer;
  if (fit == 0) {
    return InvalidArgument("--memory " + FormatSize(flags_.memory) + " holds no layer of " +
                           std::to_string(tokens) + " tokens; one takes " + FormatSize(layer));
  }
  return static_cast<uint32_t>(std::min<uint64_t>(fit, model.layers));
}

void DecodeCommand::Print(const Json& point) const {
  if (flags_.json) {
    std::printf("%s\n", point.dump().c_str());
    std::fflush(stdout);
    return;
  }
  const auto number = [&](const char* key) { return point.at(key).get<double>(); };
  std::printf("%7.0f %-4s %-7s %-6s %-4s %5.0f %7.2f = %6.2f + %5.2f + %5.2f %7.2f %8.2f %6.1f %7.4f %5.2f %9s\n",
              number("context"), point.at("transport").get<std::string>().c_str(),
              point.at("reply_mode").get<std::string>().c_str(),
              point.at("transfer").get<std::string>().c_str(),
              point.at("prefetch").get<bool>() ? "on" : "off", number("layer_reuse"),
              number("remote_ms_p50"),
              number("select_ms_p50"), number("wait_ms_p50"), number("transfer_ms_p50"),
              number("attention_ms_p50"), number("full_ms_p50"), number("full_over_attention"),
              number("error_mean"), number("hit_rate"),
              FormatSize(static_cast<uint64_t>(number("bytes_per_token_warm"))).c_str());
  std::fflush(stdout);
}

Status DecodeCommand::Run() {
  InitLogging(LogLevel::kWarn, LogFormat::kText, "icecache-bench");
  KV_ASSIGN_OR_RETURN(const ModelShape model, ShapeByName(flags_.shape));
  KV_ASSIGN_OR_RETURN(compute_, ChooseCompute(flags_.device, 0, PageWay::kAuto));
  if (!flags_.json) {
    std::printf("%7s %-4s %-7s %-6s %-4s %5s %7s = %6s + %5s + %5s %7s %8s %6s %7s %5s %9s\n",
                "context", "link", "mode", "bytes", "ahead", "reuse", "remote", "select", "wait",
                "trans", "attend", "full ms", "times", "error", "hits", "B/token");
  }
  for (const std::string& text : flags_.context) {
    KV_ASSIGN_OR_RETURN(const uint32_t tokens, ParseTokens(text));
    KV_RETURN_IF_ERROR(RunContext(tokens, model));
  }
  return OkStatus();
}

Status DecodeCommand::RunContext(uint32_t tokens, const ModelShape& model) {
  DecodeSceneOptions options;
  options.shape = model;
  KV_ASSIGN_OR_RETURN(options.shape.layers, LayersThatFit(tokens, model));
  options.context_tokens = tokens;
  options.steps = 1 + flags_.warmup + flags_.steps;
  options.server_threads = flags_.server_threads;
  options.policy = flags_.policy;
  options.seed = flags_.seed;
  KV_ASSIGN_OR_RETURN(const std::unique_ptr<DecodeScene> scene, DecodeScene::Make(options));
  if (options.shape.layers < model.layers) {
    std::fprintf(stderr, "%u of %u layers are run, and times and bytes scaled up\n",
                 options.shape.layers, model.layers);
  }
  const double overlap = scene->LayerOverlap(flags_.budget);
  KV_ASSIGN_OR_RETURN(const std::vector<Point> points, Points(flags_));
  for (const Point& point : points) {
    DecodeRun run(*scene, flags_, point, compute_);
    KV_RETURN_IF_ERROR(run.Run());
    Json result = run.Result(model);
    result["layer_overlap"] = overlap;
    Print(result);
  }
  return OkStatus();
}

}  // namespace

std::unique_ptr<BenchCommand> MakeDecodeCommand() { return std::make_unique<DecodeCommand>(); }

}  // namespace icecache
