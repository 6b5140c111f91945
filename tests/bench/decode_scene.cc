#include "tests/bench/decode_scene.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <numeric>
#include <thread>

#include "kernels/distance.h"
#include "tests/bench/trace.h"
#include "worker/layer_upload.h"
#include "worker/progress.h"

namespace icecache {
namespace {

constexpr const char* kName = "bench-decode";
constexpr Duration kUploadDeadline = std::chrono::seconds(60);  // busy neighbours

struct NamedShape {
  const char* name;
  ModelShape shape;
};
// From the models' own config.json.
constexpr NamedShape kShapes[] = {
    {"llama-3.1-8b", {32, 8, 32, 128, DType::kF16}}, {"llama-3.2-1b", {16, 8, 32, 64, DType::kF16}},
    {"mistral-7b", {32, 8, 32, 128, DType::kF16}},   {"qwen3-4b", {36, 8, 32, 128, DType::kF16}},
    {"qwen3-8b", {36, 8, 32, 128, DType::kF16}},     {"qwen3-32b", {64, 8, 64, 128, DType::kF16}},
};

// Classes of heads in the shares in which they are found (notes in docs/decode.md).
constexpr const char* kClasses[] = {"topic", "retrieval", "broad", "topic",
                                    "sinky", "topic",     "broad", "retrieval"};

std::string UcxTransports(const std::string& transport) {
  return transport == "tcp" ? "tcp,self" : "posix,cma,tcp,self";
}

}  // namespace

Result<ModelShape> ShapeByName(const std::string& name) {
  std::string names;
  for (const NamedShape& shape : kShapes) {
    if (name == shape.name) return shape.shape;
    names += (names.empty() ? "" : ", ") + std::string(shape.name);
  }
  return InvalidArgument("shape '" + name + "', expected one of " + names);
}

DecodeScene::DecodeScene(const DecodeSceneOptions& options)
    : options_(options),
      window_(options.shape, options.sink_tokens, options.window_tokens),
      local_(std::make_unique<LocalKv>(options.shape)) {
  const size_t floats = size_t{options.shape.layers} * options.steps * options.shape.head_dim;
  q_.resize(floats * options.shape.query_heads);
  k_.resize(floats * options.shape.kv_heads);
  v_.resize(k_.size());
}

Result<std::unique_ptr<DecodeScene>> DecodeScene::Make(const DecodeSceneOptions& options) {
  std::unique_ptr<DecodeScene> scene(new DecodeScene(options));
  KV_RETURN_IF_ERROR(scene->Start());
  return scene;
}

Status DecodeScene::Start() {
  // The server that was built beside this program.
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe");
  ::setenv("ICECACHE_BIN_DIR", self.parent_path().c_str(), 0);
  const ModelShape& shape = options_.shape;
  const uint64_t kv = shape.token_bytes() * options_.context_tokens;
  // Pages are not all full, and a layer that is being built exists twice.
  const uint64_t memory = kv + kv / 4 + 2 * kv / shape.layers + (256u << 20);
  server_ = std::make_unique<test::TestServer>(std::vector<std::string>{
      "--memory-size", std::to_string(memory), "--threads", std::to_string(options_.server_threads),
      "--build-threads", "2", "--transports", "posix,cma,tcp,self"});
  ServerLinkOptions link;
  link.control.address = server_->address();
  link.control.client = "icecache-bench";
  link.cache.request_deadline = kUploadDeadline;
  KV_ASSIGN_OR_RETURN(const std::unique_ptr<ServerLink> owner, ServerLink::Connect(link));
  wire::Create create;
  create.name = kName;
  create.shape = shape;
  create.model = "synthetic";
  create.sink_tokens = options_.sink_tokens;
  create.window_tokens = options_.window_tokens;
  create.policy = options_.policy;
  create.seed = options_.seed;
  KV_ASSIGN_OR_RETURN(const wire::Grant grant, owner->control().Create(create));
  const ContextHandle context{grant.context.id, grant.epoch, shape};
  KV_RETURN_IF_ERROR(owner->cache().Attach(grant));
  ProgressBar bar("draw and index", ProgressBar::OnTerminal());
  for (uint16_t l = 0; l < shape.layers; ++l) {
    KV_RETURN_IF_ERROR(AddLayer(LayerId(l), *owner, context));
    bar.Update(l + 1u, shape.layers);
  }
  bar.Finish();
  KV_RETURN_IF_ERROR(owner->control().Seal(context.id));
  return owner->control().Publish(context.id);  // stays when this connection goes
}

// Draws all heads on other threads, since the connection must be served meanwhile.
Status DecodeScene::AddLayer(LayerId layer, ServerLink& link, const ContextHandle& context) {
  const ModelShape& shape = options_.shape;
  auto rows = std::make_shared<LayerRows>(shape, TokenPos(0), options_.context_tokens);
  std::vector<float> energy(size_t{shape.kv_heads} * shape.head_dim);
  std::vector<Status> status(shape.kv_heads);
  std::atomic<uint16_t> next{0}, done{0};
  const uint32_t thread_count = std::max(1u, std::thread::hardware_concurrency());
  std::vector<std::jthread> threads;
  for (uint32_t t = 0; t < thread_count; ++t) {
    threads.emplace_back([&] {
      for (uint16_t h = next++; h < shape.kv_heads; h = next++) {
        status[h] = DrawHead(layer, KvHeadId(h), rows.get(), &energy[size_t{h} * shape.head_dim]);
        ++done;
      }
    });
  }
  Status pumped;
  while (done < shape.kv_heads) {
    if (pumped.ok()) pumped = link.Pump();
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  threads.clear();
  KV_RETURN_IF_ERROR(pumped);
  KV_RETURN_IF_ERROR(FirstError(status));
  window_.LoadDocument(layer, *rows);
  local_->Append(layer, *rows);
  LayerUpload upload(link.cache(), context);
  upload.Start(layer, std::move(rows), std::move(energy));
  return upload.WaitAll();
}

Status DecodeScene::DrawHead(LayerId layer, KvHeadId head, LayerRows* rows, float* energy) {
  const ModelShape& shape = options_.shape;
  TraceSpec spec;
  spec.name = std::string("calibrated:") + kClasses[head.value % std::size(kClasses)];
  spec.keys = options_.context_tokens;
  spec.extra_keys = options_.steps;
  spec.dim = shape.head_dim;
  spec.group = shape.group();
  spec.query_count = options_.steps;
  spec.dtype = shape.dtype;
  spec.seed = options_.seed * 1000003 + layer.value * 1009u + head.value + 1;
  spec.text_seed = options_.seed * 7919 + 1;
  spec.look_seed = options_.seed * 104729 + head.value + 1;
  spec.local = false;
  KV_ASSIGN_OR_RETURN(const Trace trace, MakeTrace(spec));
  const size_t bytes = options_.context_tokens * shape.row_bytes();
  std::copy_n(trace.k.begin(), bytes, rows->k(head).begin());
  std::copy_n(trace.v.begin(), bytes, rows->v(head).begin());
  std::copy(trace.energy.begin(), trace.energy.end(), energy);
  const size_t dim = shape.head_dim;
  for (uint32_t s = 0; s < options_.steps; ++s) {
    const size_t step = size_t{layer.value} * options_.steps + s;
    std::copy_n(trace.Query(s), shape.group() * dim,
                q_.begin() + static_cast<ptrdiff_t>(
                                 (step * shape.query_heads + head.value * shape.group()) * dim));
    const TokenRows token = trace.Rows(options_.context_tokens + s, 1);
    const size_t at = (step * shape.kv_heads + head.value) * dim;
    ToF32(token.k, shape.dtype, dim, k_.data() + at);
    ToF32(token.v, shape.dtype, dim, v_.data() + at);
  }
  return OkStatus();
}

const float* DecodeScene::q(LayerId layer, uint32_t step) const {
  return q_.data() + (size_t{layer.value} * options_.steps + step) * options_.shape.query_heads *
                         options_.shape.head_dim;
}
const float* DecodeScene::k(LayerId layer, uint32_t step) const {
  return k_.data() + (size_t{layer.value} * options_.steps + step) * options_.shape.kv_heads *
                         options_.shape.head_dim;
}
const float* DecodeScene::v(LayerId layer, uint32_t step) const {
  return v_.data() + (k(layer, step) - k_.data());
}

Result<DecodeScene::Session> DecodeScene::Join(const std::string& transport, ReplyMode mode,
                                               const DevicePages& device) {
  Session session;
  ServerLinkOptions link;
  link.control.address = server_->address();
  link.control.client = "icecache-bench";
  link.cache.reply_mode = mode;
  link.cache.device = device;
  link.ucx.transports = UcxTransports(transport);
  KV_ASSIGN_OR_RETURN(session.link, ServerLink::Connect(link));
  const std::string name = std::string(kName) + "-" + std::to_string(sessions_++);
  KV_ASSIGN_OR_RETURN(session.grant, session.link->control().Fork(kName, name));
  session.handle = {session.grant.context.id, session.grant.epoch, options_.shape};
  KV_RETURN_IF_ERROR(session.link->cache().Attach(session.grant));
  return session;
}

std::vector<float> DecodeScene::TokenMass(LayerId layer, KvHeadId head, uint32_t step) const {
  const ModelShape& shape = options_.shape;
  const TokenRows rows = local_->rows(layer, head);
  const uint32_t n = options_.context_tokens;
  std::vector<float> scores(size_t{shape.group()} * n), mass(n, 0.0f);
  DotRows(q(layer, step) + size_t{head.value} * shape.group() * shape.head_dim, shape.group(),
          rows.k, rows.dtype, n, shape.head_dim, scores.data(), n);
  for (uint32_t g = 0; g < shape.group(); ++g) {
    float* x = scores.data() + size_t{g} * n;
    const float sum = ExpShifted(x, n, MaxOf(x, n), x);
    for (uint32_t t = 0; t < n; ++t) mass[t] += x[t] / sum;
  }
  return mass;
}

double DecodeScene::LayerOverlap(uint32_t count) const {
  double sum = 0;
  uint32_t heads = 0;
  count = std::min(count, options_.context_tokens);
  const auto best = [count](const std::vector<float>& mass) {
    std::vector<uint32_t> order(mass.size());
    std::iota(order.begin(), order.end(), 0u);
    std::nth_element(order.begin(), order.begin() + count - 1, order.end(),
                     [&](uint32_t a, uint32_t b) { return mass[a] > mass[b]; });
    order.resize(count);
    return order;
  };
  for (uint16_t l = 1; l < options_.shape.layers; ++l) {
    for (uint16_t h = 0; h < options_.shape.kv_heads; ++h, ++heads) {
      const uint32_t step = (l * 7u + h) % options_.steps;
      const auto before = best(TokenMass(LayerId(static_cast<uint16_t>(l - 1)), KvHeadId(h), step));
      const std::vector<float> mass = TokenMass(LayerId(l), KvHeadId(h), step);
      double found = 0, most = 0;
      for (const uint32_t t : before) found += mass[t];
      for (const uint32_t t : best(mass)) most += mass[t];
      sum += found / most;
    }
  }
  return heads == 0 ? 0 : sum / heads;
}

uint64_t DecodeScene::server_bytes() const {
  return static_cast<uint64_t>(std::max(0.0, server_->StatusNumber("/memory/used_bytes")));
}

}  // namespace icecache
