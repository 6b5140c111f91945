// Settings that the commands of icecache-worker share, and what is made from them: the model with
// its tokenizer, the link to the server, the attention method.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "common/config.h"
#include "worker/attention_icecache.h"
#include "worker/model/model.h"
#include "worker/model/model_config.h"
#include "worker/model/tokenizer.h"
#include "worker/serve/compute.h"
#include "worker/served_context.h"
#include "worker/server_link.h"

namespace icecache {

struct WorkerOptions {
  std::string model;
  std::string kv_dtype = "f16";
  uint32_t threads = 0;  // 0: one per core
  std::string device = "auto";
  uint64_t gpu_memory = 0;  // 0: nine tenths of what is free
  std::string page_way = "auto";
  uint64_t share_pages = 0;  // bytes of page frames that other workers may read

  std::string server = "127.0.0.1:7400";
  std::string tenant;
  std::string secret;
  std::string tls_ca;
  std::string transports;
  std::string reply_mode = "auto";

  uint32_t budget = 256;
  uint32_t sink_tokens = 16;
  uint32_t window_tokens = 16;
  uint32_t read_cap = 1024;
  double min_mass = 0;
  uint32_t budget_growth = 4;
  uint32_t check_every = 0;
  bool residual = true;
  uint32_t resident_multiple = 3;
  uint32_t select_deadline_ms = 2000;
  bool prefetch = false;
  double prefetch_cosine = 0.8;
  uint32_t layer_reuse = 1;
  std::string transfer = "native";
  std::string policy = "cluster_tree";
  std::string build_on = "server";
  uint64_t index_seed = 1;

  bool progress = false;
  std::string log_level = "warn";
  std::string log_format = "text";
};

// Adds the settings to a command. `options` holds the defaults and outlives the parser.
// AddModelOptions: those of a command that talks to no server.
void AddModelOptions(ConfigParser& parser, WorkerOptions* options);
void AddWorkerOptions(ConfigParser& parser, WorkerOptions* options);
// What can only be judged after parsing, and logging as asked for.
Status ApplyWorkerOptions(const WorkerOptions& options, const char* program);

struct LoadedModel {
  Compute compute;  // before the model, which uses it
  ModelConfig config;
  std::unique_ptr<Model> model;
  std::unique_ptr<Tokenizer> tokenizer;
};
Result<LoadedModel> LoadModelAndTokenizer(const WorkerOptions& options);

// Borrows `compute`.
Result<std::unique_ptr<ServerLink>> ConnectToServer(const WorkerOptions& options,
                                                    const Compute& compute);

SparseBudget BudgetOf(const WorkerOptions& options);
IceCacheOptions IceCacheOptionsOf(const WorkerOptions& options, const Compute& compute);
// How the prefill itself runs (PrefillRequest::prefill) is the caller's.
PrefillRequest PrefillRequestOf(const WorkerOptions& options, std::string name,
                                std::span<const int32_t> tokens);

// `text`, or the content of `file`; INVALID_ARGUMENT when both are given. `what`: the flag's name.
Result<std::string> TextOf(const std::string& text, const std::string& file, const char* what);

// Whole content; NOT_FOUND naming the file.
Result<std::string> ReadTextFile(const std::string& path);

}  // namespace icecache
