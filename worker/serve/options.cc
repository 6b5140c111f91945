#include "worker/serve/options.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <thread>
#include <utility>

#include "common/limits.h"
#include "common/log.h"
#include "worker/model/device_model.h"
#include "worker/serve/interrupt.h"

namespace icecache {

namespace {

void AddOutputOptions(ConfigParser& parser, WorkerOptions* o) {
  parser.Section("Output");
  parser.Add("progress", &o->progress, "Progress bars even where stderr is no terminal");
  parser.Add("log_level", &o->log_level, "debug, info, warn, error or off");
  parser.Add("log_format", &o->log_format, "text or json");
}

void AddModelSection(ConfigParser& parser, WorkerOptions* o) {
  parser.Section("Model");
  parser.Add("model", &o->model,
             "Hugging Face model directory: config.json, model.safetensors, tokenizer.json", true);
  parser.Add("kv_dtype", &o->kv_dtype, "Element type of stored K and V: f16, bf16 or f32");
  parser.AddCheck("kv_dtype", [o] {
    return ParseDType(o->kv_dtype)
               ? OkStatus()
               : InvalidArgument("'" + o->kv_dtype + "', expected f16, bf16 or f32");
  });
  parser.Add("threads", &o->threads, "Compute threads; 0: one per core", 0, 1024);
  parser.Add("device", &o->device,
             "Where the model and attention run: cpu, cuda, auto (cuda where there is a GPU)");
  parser.AddCheck("device", [o] { return CheckDeviceName(o->device); });
  parser.AddSize("gpu_memory", &o->gpu_memory,
                 "Most GPU memory for weights and pages; 0: nine tenths of what is free");
  parser.Add(
      "page_way", &o->page_way,
      "How pages get into a GPU's memory: registered (read by it in the server's memory, same "
      "host), ipc (written there by a server with CUDA, same host), landing (through a pinned "
      "buffer), frames (verified on the host), auto (the first of these that can be had)");
  parser.AddCheck("page_way", [o] { return ParsePageWay(o->page_way).status(); });
  parser.AddSize("share_pages", &o->share_pages,
                 "GPU memory for pages that other workers of this tenant on this host may copy; "
                 "theirs are copied likewise instead of coming from the server; 0: none");
}

void AddIndexOptions(ConfigParser& parser, WorkerOptions* o) {
  parser.Add("policy", &o->policy,
             "How the server chooses: cluster_tree, or another of docs/policies.md, by name");
  parser.Add("build_on", &o->build_on,
             "Who clusters a prefilled layer: server, or worker, which takes that load off the "
             "server and makes the prefill longer; cluster_tree only");
  parser.AddCheck("build_on", [o] {
    return o->build_on == "server" || o->build_on == "worker"
               ? OkStatus()
               : InvalidArgument("'" + o->build_on + "', expected server or worker");
  });
  parser.Add("index_seed", &o->index_seed, "Seed of the server's index");
}

}  // namespace

void AddModelOptions(ConfigParser& parser, WorkerOptions* o) {
  AddModelSection(parser, o);
  AddOutputOptions(parser, o);
}

void AddWorkerOptions(ConfigParser& parser, WorkerOptions* o) {
  AddModelSection(parser, o);
  parser.Section("Cache server");
  parser.Add("server", &o->server, "host:port of the server's control plane");
  parser.Add("tenant", &o->tenant, "Tenant; empty: the server's default one");
  parser.Add("tls_ca", &o->tls_ca,
             "Speak TLS on the control plane and trust this PEM file of certificates, or `system`");
  parser.AddSecret("secret", &o->secret, "The tenant's secret (better in ICECACHE_SECRET)");
  parser.Add("transports", &o->transports, "UCX_TLS of the data plane; empty: posix,cma,tcp,self");

  parser.Add(
      "reply_mode", &o->reply_mode,
      "How pages come: inline (sent), mapped (read in the server's memory, same host), attend "
      "(not at all: the server attends to them), remote (read from the server's memory over RDMA), "
      "auto (mapped, else inline)");
  parser.AddCheck("reply_mode", [o] { return ParseReplyMode(o->reply_mode).status(); });

  parser.Section("Attention");
  parser.Add("budget", &o->budget,
             "Tokens that a head attends to exactly, sinks and window included", 1);
  parser.Add("sink_tokens", &o->sink_tokens, "First tokens that are always attended to", 0,
             limits::kSinkTokensMax);
  parser.Add("window_tokens", &o->window_tokens, "Recent tokens that are always attended to", 0,
             limits::kWindowTokensMax);
  AddIndexOptions(parser, o);
  parser.Add("read_cap", &o->read_cap,
             "Tokens the server may read exactly, beyond the pages, for its estimate of the rest",
             0, limits::kReadCapMax);
  parser.Add("min_mass", &o->min_mass,
             "Fetch as many pages as reach this share of the attention mass by the server's estimate: "
             "fewer than the budget, or up to --budget-growth times as many; 0: the budget, always",
             0, 1);
  parser.Add("budget_growth", &o->budget_growth,
             "With --min-mass: how many times its budget a head may take; 1: never more than it", 1,
             limits::kBudgetGrowthMax);
  parser.Add("check_every", &o->check_every,
             "Let the server compare one in so many layer steps with exact attention and count mass "
             "and error in its metrics (icecache_check*); 0: none");
  parser.Add("residual", &o->residual, "Merge the server's estimate of what is not fetched");
  parser.Add("resident_multiple", &o->resident_multiple,
             "Pages the worker keeps, in units of one selection's pages", 1, 64);
  parser.Section("Speed for accuracy (docs/decode.md has what each costs)");
  parser.Add("prefetch", &o->prefetch,
             "Ask for a token's pages a step ahead, with the queries of the token before");
  parser.Add("prefetch_cosine", &o->prefetch_cosine,
             "With --prefetch: ask again for heads whose queries are less alike than this", -1, 1);
  parser.Add("layer_reuse", &o->layer_reuse,
             "Search everything in every so-manyth layer only, and the next layers near what it "
             "chose; 1: in all layers",
             1, limits::kLayerReuseMax);
  parser.Add("transfer", &o->transfer,
             "native, or int8: pages that are sent (reply mode inline) come in about 0.57 of the "
             "bytes");
  parser.AddCheck("transfer", [o] {
    return o->transfer == "native" || o->transfer == "int8"
               ? OkStatus()
               : InvalidArgument("'" + o->transfer + "', expected native or int8");
  });

  parser.Section("Patience");
  parser.AddMillis("select_deadline", &o->select_deadline_ms,
                   "How long a layer step waits for the server before it goes on without");
  AddOutputOptions(parser, o);
}

Status ApplyWorkerOptions(const WorkerOptions& options, const char* program) {
  KV_ASSIGN_OR_RETURN(const LogLevel level, ParseLogLevel(options.log_level));
  KV_ASSIGN_OR_RETURN(const LogFormat format, ParseLogFormat(options.log_format));
  InitLogging(level, format, program);
  if (options.build_on == "worker" && options.policy != "cluster_tree") {
    return InvalidArgument("--build-on worker: policy " + options.policy +
                           " lays pages out by itself; use cluster_tree, or --build-on server");
  }
  return OkStatus();
}

Result<LoadedModel> LoadModelAndTokenizer(const WorkerOptions& options) {
  LoadedModel loaded;
  KV_ASSIGN_OR_RETURN(loaded.config, LoadModelConfig(options.model));
  ModelOptions model;
  const std::optional<DType> dtype = ParseDType(options.kv_dtype);
  if (!dtype)
    return InvalidArgument("--kv-dtype " + options.kv_dtype + ": expected f16, bf16, f32");
  model.kv_dtype = *dtype;
  model.threads =
      options.threads > 0 ? options.threads : std::max(1u, std::thread::hardware_concurrency());
  KV_ASSIGN_OR_RETURN(const PageWay way, ParsePageWay(options.page_way));
  KV_ASSIGN_OR_RETURN(loaded.compute, ChooseCompute(options.device, options.gpu_memory, way));
  gpu::Device* const device = loaded.compute.device.get();
  KV_ASSIGN_OR_RETURN(loaded.model, device == nullptr
                                        ? LoadModel(options.model, model)
                                        : LoadDeviceModel(options.model, model, *device));
  if (options.share_pages > 0) {
    loaded.compute.SharePages(loaded.model->shape(), options.share_pages);
  }
  KV_ASSIGN_OR_RETURN(loaded.tokenizer, Tokenizer::Load(options.model));
  return loaded;
}

Result<std::unique_ptr<ServerLink>> ConnectToServer(const WorkerOptions& options,
                                                    const Compute& compute) {
  ServerLinkOptions link;
  link.control.address = options.server;
  link.control.tenant = options.tenant;
  link.control.secret = options.secret;
  link.control.tls_ca = options.tls_ca;
  link.control.interrupted = Interrupted;
  link.cache.interrupted = Interrupted;
  KV_ASSIGN_OR_RETURN(link.cache.reply_mode, ParseReplyMode(options.reply_mode));
  link.cache.device = compute.pages();
  link.ucx.transports = options.transports;
  link.sharing = compute.sharing.get();
  return ServerLink::Connect(link);
}

SparseBudget BudgetOf(const WorkerOptions& options) {
  return {options.budget, options.sink_tokens, options.window_tokens};
}

PrefillRequest PrefillRequestOf(const WorkerOptions& options, std::string name,
                                std::span<const int32_t> tokens) {
  PrefillRequest request;
  request.name = std::move(name);
  request.tokens = tokens;
  request.sink_tokens = options.sink_tokens;
  request.window_tokens = options.window_tokens;
  request.policy = options.policy;
  request.seed = options.index_seed;
  request.build_here = options.build_on == "worker";
  return request;
}

IceCacheOptions IceCacheOptionsOf(const WorkerOptions& options, const Compute& compute) {
  IceCacheOptions icecache;
  icecache.budget = BudgetOf(options);
  icecache.frames = compute.frames.get();
  icecache.intake = compute.intake.get();
  icecache.sharing = compute.sharing.get();
  icecache.resident_multiple = options.resident_multiple;
  icecache.read_cap = options.read_cap;
  icecache.min_mass = static_cast<float>(options.min_mass);
  icecache.budget_growth = options.budget_growth;
  icecache.check_every = options.check_every;
  icecache.residual = options.residual;
  icecache.prefetch = options.prefetch;
  icecache.prefetch_cosine = static_cast<float>(options.prefetch_cosine);
  icecache.layer_reuse = options.layer_reuse;
  icecache.int8 = options.transfer == "int8";
  icecache.select_deadline = std::chrono::milliseconds(options.select_deadline_ms);
  return icecache;
}

Result<std::string> TextOf(const std::string& text, const std::string& file, const char* what) {
  if (!text.empty() && !file.empty()) {
    return InvalidArgument(std::string("--") + what + " and --" + what +
                           "-file are both given; use one");
  }
  return file.empty() ? Result<std::string>(text) : ReadTextFile(file);
}

Result<std::string> ReadTextFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return NotFound("cannot read '" + path + "': " + std::strerror(errno));
  std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (file.bad()) return DataLoss("cannot read '" + path + "' to its end");
  return text;
}

}  // namespace icecache
