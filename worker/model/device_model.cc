#include "worker/model/device_model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "kernels/distance.h"
#include "worker/model/llama_weights.h"
#include "worker/model/rope.h"

namespace icecache {
namespace {

using gpu::Device;
using gpu::DeviceMemory;
using gpu::MemoryKind;

constexpr size_t kAlignment = 256;
constexpr uint32_t kStepRowsMax = limits::kSelectsPerBatchMax;

// Rows of one or more linear layers with the same input, one below the other.
struct Matrix {
  const std::byte* data = nullptr;
  DType dtype = DType::kF32;
  const float* bias = nullptr;
  uint32_t rows = 0;
  uint32_t cols = 0;
};

// A layer's work before and after attention, for some number of rows of a step.
struct RecordedStep {
  gpu::RecordingId before, after;
};

struct DeviceLayer {
  const float* input_norm = nullptr;
  const float* post_norm = nullptr;
  const float* q_norm = nullptr;  // null: none
  const float* k_norm = nullptr;
  Matrix qkv, o, gate_up, down;
  std::map<uint32_t, RecordedStep> recorded;  // by rows
};

// Activations of a block. Host twins are what the caller and LayerAttention see.
struct Activations {
  uint32_t tokens = 0;  // room for
  DeviceMemory device, pinned;
  float *hidden = nullptr, *normed = nullptr, *qkv = nullptr, *attended = nullptr;
  float *gate_up = nullptr, *inner = nullptr;
  uint32_t* positions = nullptr;
  float *host_hidden = nullptr, *host_qkv = nullptr, *host_attended = nullptr;
  uint32_t* host_positions = nullptr;
};

class DeviceModel final : public Model {
 public:
  DeviceModel(LlamaWeights weights, const ModelOptions& options, Device& device)
      : weights_(std::move(weights)),
        config_(weights_.config),
        shape_(config_.Shape(options.kv_dtype)),
        device_(device) {}

  Status UploadWeights();

  const ModelShape& shape() const override { return shape_; }
  uint32_t vocab_size() const override { return config_.vocab_size; }
  uint32_t hidden_size() const override { return config_.hidden_size; }
  std::string identity() const override { return weights_.identity; }
  Status Embed(std::span<const int32_t> tokens, float* hidden) override {
    return EmbedTokens(weights_, tokens, hidden);
  }
  Status Layer(LayerId layer, TokenPos first, uint32_t tokens, float* hidden,
               LayerAttention& attention) override;
  void Logits(const float* hidden, float* logits) override;
  Status Step(std::span<const StepToken> tokens, StepAttention& attention) override;
  Status StepLogits(uint32_t row, float* logits) override;
  Status Choose(std::span<const TokenChoice> choices, int32_t* tokens) override;

 private:
  uint32_t q_size() const { return shape_.query_heads * shape_.head_dim; }
  uint32_t kv_size() const { return shape_.kv_heads * shape_.head_dim; }
  size_t hidden_bytes(uint32_t tokens) const {
    return size_t{tokens} * config_.hidden_size * sizeof(float);
  }
  size_t LogitsBytes(uint32_t rows) const {
    return size_t{rows} * config_.vocab_size * sizeof(float);
  }

  Result<std::byte*> Room(size_t bytes);
  Result<const float*> UploadVector(const std::vector<float>& values);
  Result<Matrix> UploadMatrix(std::span<const Linear* const> parts);
  Status UploadLayer(const LayerWeights& from, DeviceLayer* to);

  Status Reserve(uint32_t tokens, Activations* a);
  void Norm(const float* x, float* y, const float* weight, uint32_t tokens);
  void NormHeads(float* x, const float* weight, uint32_t tokens, uint32_t heads);
  // y = x W^T for `rows` rows of the matrix from `begin`.
  void Multiply(const float* x, const Matrix& m, uint32_t begin, uint32_t rows, uint32_t tokens,
                bool add, float* y);
  void QueueInput(const Activations& a, uint32_t tokens);  // hidden state and positions
  void QueueBefore(const DeviceLayer& w, const Activations& a, uint32_t tokens);
  void QueueAttended(const Activations& a, uint32_t tokens);  // from the host
  void QueueAfter(const DeviceLayer& w, const Activations& a, uint32_t tokens);
  Status QueueStepPart(DeviceLayer* w, uint32_t rows, bool before);
  Status LogitsOf(const float* hidden, float* logits);
  Status ReadLogits(const Activations& a, const float* row, float* logits);

  const LlamaWeights weights_;
  const ModelConfig& config_;
  const ModelShape shape_;
  Device& device_;
  std::vector<DeviceMemory> memory_;  // of the weights
  std::vector<DeviceLayer> layers_;
  const float* final_norm_ = nullptr;
  Matrix output_;
  const double* frequencies_ = nullptr;
  Activations block_, step_;           // of prefill; of a step, at addresses that recordings keep
  uint32_t step_rows_ = 0;             // of the last Step
  std::set<uint32_t> steps_run_;       // numbers of rows of which every kernel has run
  DeviceMemory logits_, host_logits_;  // [rows, vocab]; pinned: of one row
  DeviceMemory draws_, chosen_;        // pinned: one per row
  Status failed_;                      // of a call that cannot return it; out of the next one
};

Result<std::byte*> DeviceModel::Room(size_t bytes) {
  KV_ASSIGN_OR_RETURN(DeviceMemory memory,
                      DeviceMemory::Allocate(device_, MemoryKind::kDevice, bytes));
  memory_.push_back(std::move(memory));
  return memory_.back().data();
}

Result<const float*> DeviceModel::UploadVector(const std::vector<float>& values) {
  if (values.empty()) return static_cast<const float*>(nullptr);
  KV_ASSIGN_OR_RETURN(std::byte* const at, Room(values.size() * sizeof(float)));
  device_.Copy(at, values.data(), values.size() * sizeof(float));
  return reinterpret_cast<const float*>(at);
}

Result<Matrix> DeviceModel::UploadMatrix(std::span<const Linear* const> parts) {
  Matrix matrix;
  matrix.dtype = parts[0]->weight.dtype;
  matrix.cols = parts[0]->weight.cols;
  bool has_bias = false;
  for (const Linear* part : parts) {
    matrix.rows += part->weight.rows;
    has_bias |= !part->bias.empty();
    if (part->weight.dtype != matrix.dtype) matrix.dtype = DType::kF32;  // holds them all
  }
  const size_t row_bytes = size_t{matrix.cols} * DTypeBytes(matrix.dtype);
  KV_ASSIGN_OR_RETURN(std::byte * at, Room(matrix.rows * row_bytes));
  matrix.data = at;
  std::vector<std::vector<float>> converted;
  std::vector<float> bias;
  for (const Linear* part : parts) {
    const WeightMatrix& w = part->weight;
    const void* from = w.data;
    if (w.dtype != matrix.dtype) {
      converted.emplace_back(size_t{w.rows} * w.cols);
      ToF32(w.data, w.dtype, converted.back().size(), converted.back().data());
      from = converted.back().data();
    }
    device_.Copy(at, from, w.rows * row_bytes);
    at += w.rows * row_bytes;
    bias.insert(bias.end(), part->bias.begin(), part->bias.end());
    if (part->bias.empty()) bias.resize(bias.size() + w.rows, 0.0f);
  }
  if (has_bias) {
    KV_ASSIGN_OR_RETURN(matrix.bias, UploadVector(bias));
  }
  KV_RETURN_IF_ERROR(device_.Synchronize());  // what was converted goes now
  return matrix;
}

Status DeviceModel::UploadLayer(const LayerWeights& from, DeviceLayer* to) {
  KV_ASSIGN_OR_RETURN(to->input_norm, UploadVector(from.input_norm));
  KV_ASSIGN_OR_RETURN(to->post_norm, UploadVector(from.post_norm));
  KV_ASSIGN_OR_RETURN(to->q_norm, UploadVector(from.q_norm));
  KV_ASSIGN_OR_RETURN(to->k_norm, UploadVector(from.k_norm));
  const Linear* const qkv[] = {&from.q, &from.k, &from.v};
  const Linear* const o[] = {&from.o};
  const Linear* const gate_up[] = {&from.gate, &from.up};
  const Linear* const down[] = {&from.down};
  KV_ASSIGN_OR_RETURN(to->qkv, UploadMatrix(qkv));
  KV_ASSIGN_OR_RETURN(to->o, UploadMatrix(o));
  KV_ASSIGN_OR_RETURN(to->gate_up, UploadMatrix(gate_up));
  KV_ASSIGN_OR_RETURN(to->down, UploadMatrix(down));
  return OkStatus();
}

Status DeviceModel::UploadWeights() {
  layers_.resize(config_.layers);
  for (uint32_t i = 0; i < config_.layers; ++i) {
    const Status status = UploadLayer(weights_.layers[i], &layers_[i]);
    if (!status.ok()) {
      return status.WithContext("weights of layer " + std::to_string(i) + " of " +
                                std::to_string(config_.layers));
    }
  }
  KV_ASSIGN_OR_RETURN(final_norm_, UploadVector(weights_.final_norm));
  const Linear output{weights_.output, {}};
  const Linear* const parts[] = {&output};
  KV_ASSIGN_OR_RETURN(output_, UploadMatrix(parts));
  const std::vector<double> frequencies = RopeFrequencies(config_);
  const size_t bytes = frequencies.size() * sizeof(double);
  KV_ASSIGN_OR_RETURN(std::byte* const at, Room(bytes));
  device_.Copy(at, frequencies.data(), bytes);
  frequencies_ = reinterpret_cast<const double*>(at);
  KV_ASSIGN_OR_RETURN(host_logits_,
                      DeviceMemory::Allocate(device_, MemoryKind::kPinned, LogitsBytes(1)));
  KV_ASSIGN_OR_RETURN(
      draws_, DeviceMemory::Allocate(device_, MemoryKind::kPinned, kStepRowsMax * sizeof(double)));
  KV_ASSIGN_OR_RETURN(chosen_, DeviceMemory::Allocate(device_, MemoryKind::kPinned,
                                                      kStepRowsMax * sizeof(int32_t)));
  KV_RETURN_IF_ERROR(Reserve(kStepRowsMax, &step_));
  return device_.Synchronize();
}

Status DeviceModel::Reserve(uint32_t tokens, Activations* a) {
  if (tokens <= a->tokens) return OkStatus();
  *a = Activations();
  size_t bytes = 0;
  const auto place = [&](size_t floats) {
    const size_t at = bytes;
    bytes += (tokens * floats * sizeof(float) + kAlignment - 1) / kAlignment * kAlignment;
    return at;
  };
  const size_t qkv_floats = q_size() + 2 * size_t{kv_size()};
  const size_t inner_floats = config_.intermediate_size;
  const size_t hidden = place(config_.hidden_size), positions = place(1);
  const size_t qkv = place(qkv_floats), attended = place(q_size());
  const size_t host_bytes = bytes;
  const size_t normed = place(config_.hidden_size), gate_up = place(2 * inner_floats);
  const size_t inner = place(inner_floats);
  KV_ASSIGN_OR_RETURN(a->device, DeviceMemory::Allocate(device_, MemoryKind::kDevice, bytes));
  KV_ASSIGN_OR_RETURN(a->pinned, DeviceMemory::Allocate(device_, MemoryKind::kPinned, host_bytes));
  a->hidden = a->device.data<float>(hidden);
  a->normed = a->device.data<float>(normed);
  a->qkv = a->device.data<float>(qkv);
  a->attended = a->device.data<float>(attended);
  a->gate_up = a->device.data<float>(gate_up);
  a->inner = a->device.data<float>(inner);
  a->positions = a->device.data<uint32_t>(positions);
  a->host_hidden = a->pinned.data<float>(hidden);
  a->host_qkv = a->pinned.data<float>(qkv);
  a->host_attended = a->pinned.data<float>(attended);
  a->host_positions = a->pinned.data<uint32_t>(positions);
  a->tokens = tokens;
  return OkStatus();
}

void DeviceModel::Norm(const float* x, float* y, const float* weight, uint32_t tokens) {
  const uint32_t width = config_.hidden_size;
  device_.Launch(gpu::NormArgs{x, y, weight, tokens, width, 1, width, width,
                               static_cast<float>(config_.rms_norm_eps)});
}

void DeviceModel::NormHeads(float* x, const float* weight, uint32_t tokens, uint32_t heads) {
  if (weight == nullptr) return;
  const uint32_t stride = heads * shape_.head_dim;
  device_.Launch(gpu::NormArgs{x, x, weight, tokens * heads, shape_.head_dim, heads, stride, stride,
                               static_cast<float>(config_.rms_norm_eps)});
}

void DeviceModel::Multiply(const float* x, const Matrix& m, uint32_t begin, uint32_t rows,
                           uint32_t tokens, bool add, float* y) {
  const size_t offset = size_t{begin} * m.cols * DTypeBytes(m.dtype);
  device_.Launch(gpu::GemmArgs{x, m.data + offset, m.bias == nullptr ? nullptr : m.bias + begin, y,
                               m.dtype, tokens, rows, m.cols, add});
}

void DeviceModel::QueueBefore(const DeviceLayer& w, const Activations& a, uint32_t tokens) {
  float* const q = a.qkv;
  float* const k = q + size_t{tokens} * q_size();
  float* const v = k + size_t{tokens} * kv_size();
  Norm(a.hidden, a.normed, w.input_norm, tokens);
  if (tokens == 1) {  // q, k and v of one token are neighbours, as their weights are
    Multiply(a.normed, w.qkv, 0, w.qkv.rows, 1, false, q);
  } else {
    Multiply(a.normed, w.qkv, 0, q_size(), tokens, false, q);
    Multiply(a.normed, w.qkv, q_size(), kv_size(), tokens, false, k);
    Multiply(a.normed, w.qkv, q_size() + kv_size(), kv_size(), tokens, false, v);
  }
  NormHeads(q, w.q_norm, tokens, shape_.query_heads);
  NormHeads(k, w.k_norm, tokens, shape_.kv_heads);
  gpu::RopeArgs rope;
  rope.q = q;
  rope.k = k;
  rope.frequencies = frequencies_;
  rope.positions = a.positions;
  rope.tokens = tokens;
  rope.query_heads = shape_.query_heads;
  rope.kv_heads = shape_.kv_heads;
  rope.head_dim = shape_.head_dim;
  rope.q_scale = 1.0f / std::sqrt(static_cast<float>(shape_.head_dim));
  rope.factor = config_.rope_scaling.attention_factor;
  device_.Launch(rope);
  device_.Copy(a.host_qkv, a.qkv, tokens * (q_size() + 2 * size_t{kv_size()}) * sizeof(float));
}

void DeviceModel::QueueAttended(const Activations& a, uint32_t tokens) {
  device_.Copy(a.attended, a.host_attended, size_t{tokens} * q_size() * sizeof(float));
}

void DeviceModel::QueueAfter(const DeviceLayer& w, const Activations& a, uint32_t tokens) {
  Multiply(a.attended, w.o, 0, w.o.rows, tokens, true, a.hidden);
  Norm(a.hidden, a.normed, w.post_norm, tokens);
  Multiply(a.normed, w.gate_up, 0, w.gate_up.rows, tokens, false, a.gate_up);
  device_.Launch(gpu::SwiGluArgs{a.gate_up, a.inner, tokens, config_.intermediate_size});
  Multiply(a.inner, w.down, 0, w.down.rows, tokens, true, a.hidden);
}

void DeviceModel::QueueInput(const Activations& a, uint32_t tokens) {
  device_.Copy(a.hidden, a.host_hidden, hidden_bytes(tokens));
  device_.Copy(a.positions, a.host_positions, tokens * sizeof(uint32_t));
}

Status DeviceModel::Layer(LayerId layer, TokenPos first, uint32_t tokens, float* hidden,
                          LayerAttention& attention) {
  KV_CHECK(layer.value < layers_.size());
  if (uint64_t{first.value} + tokens > limits::kContextTokensMax) {
    return OutOfRange("position " + std::to_string(uint64_t{first.value} + tokens) +
                      ", expected at most " + std::to_string(limits::kContextTokensMax));
  }
  if (tokens == 0) return OkStatus();
  if (!failed_.ok()) return std::exchange(failed_, OkStatus());
  const DeviceLayer& w = layers_[layer.value];
  KV_RETURN_IF_ERROR(Reserve(tokens, &block_));
  const Activations& a = block_;
  std::memcpy(a.host_hidden, hidden, hidden_bytes(tokens));
  for (uint32_t t = 0; t < tokens; ++t) a.host_positions[t] = first.value + t;
  QueueInput(a, tokens);
  QueueBefore(w, a, tokens);
  KV_RETURN_IF_ERROR(device_.Synchronize());  // q, k and v leave the device
  const float* const k = a.host_qkv + size_t{tokens} * q_size();
  KV_RETURN_IF_ERROR(attention.Attend(layer, first, tokens, a.host_qkv, k,
                                      k + size_t{tokens} * kv_size(), a.host_attended));
  QueueAttended(a, tokens);
  QueueAfter(w, a, tokens);
  device_.Copy(a.host_hidden, a.hidden, hidden_bytes(tokens));
  KV_RETURN_IF_ERROR(device_.Synchronize());
  std::memcpy(hidden, a.host_hidden, hidden_bytes(tokens));
  return OkStatus();
}

void DeviceModel::Logits(const float* hidden, float* logits) {
  failed_ = LogitsOf(hidden, logits);
  if (failed_.ok()) return;
  std::fill_n(logits, config_.vocab_size, std::numeric_limits<float>::quiet_NaN());
}

Status DeviceModel::LogitsOf(const float* hidden, float* logits) {
  KV_RETURN_IF_ERROR(Reserve(1, &block_));
  std::memcpy(block_.host_hidden, hidden, hidden_bytes(1));
  device_.Copy(block_.hidden, block_.host_hidden, hidden_bytes(1));
  return ReadLogits(block_, block_.hidden, logits);
}

Status DeviceModel::ReadLogits(const Activations& a, const float* row, float* logits) {
  KV_RETURN_IF_ERROR(DeviceMemory::Grow(device_, MemoryKind::kDevice, LogitsBytes(1), &logits_));
  Norm(row, a.normed, final_norm_, 1);
  Multiply(a.normed, output_, 0, output_.rows, 1, false, logits_.data<float>());
  device_.Copy(host_logits_.data(), logits_.data(), LogitsBytes(1));
  KV_RETURN_IF_ERROR(device_.Synchronize());
  std::memcpy(logits, host_logits_.data(), LogitsBytes(1));
  return OkStatus();
}

// Recorded from the second time on: kernels are loaded when they first run, and not all of that may
// be recorded.
Status DeviceModel::QueueStepPart(DeviceLayer* w, uint32_t rows, bool before) {
  if (!steps_run_.contains(rows)) {
    before ? QueueBefore(*w, step_, rows) : QueueAfter(*w, step_, rows);
    return OkStatus();
  }
  auto recorded = w->recorded.find(rows);
  if (recorded == w->recorded.end()) {
    RecordedStep step;
    KV_ASSIGN_OR_RETURN(step.before, device_.Record([&] { QueueBefore(*w, step_, rows); }));
    KV_ASSIGN_OR_RETURN(step.after, device_.Record([&] { QueueAfter(*w, step_, rows); }));
    recorded = w->recorded.emplace(rows, step).first;
  }
  device_.Replay(before ? recorded->second.before : recorded->second.after);
  return OkStatus();
}

// The hidden state stays on the device from the embedding to the choice of a token, and so does
// what attention on the device computes. The host waits once per layer, for q, k and v, which it
// has to send.
Status DeviceModel::Step(std::span<const StepToken> tokens, StepAttention& attention) {
  KV_RETURN_IF_ERROR(CheckStep(tokens));
  if (!failed_.ok()) return std::exchange(failed_, OkStatus());
  const auto rows = static_cast<uint32_t>(tokens.size());
  const Activations& a = step_;
  for (uint32_t i = 0; i < rows; ++i) {
    KV_RETURN_IF_ERROR(EmbedTokens(weights_, {&tokens[i].token, 1},
                                   a.host_hidden + size_t{i} * config_.hidden_size));
    a.host_positions[i] = tokens[i].position.value;
  }
  step_rows_ = rows;
  QueueInput(a, rows);
  const float* const k = a.host_qkv + size_t{rows} * q_size();
  const float* const v = k + size_t{rows} * kv_size();
  for (uint16_t l = 0; l < shape_.layers; ++l) {
    DeviceLayer& w = layers_[l];
    KV_RETURN_IF_ERROR(QueueStepPart(&w, rows, true));
    KV_RETURN_IF_ERROR(device_.Synchronize());  // q, k and v have left the device
    KV_RETURN_IF_ERROR(attention.AttendStep(LayerId(l), tokens, a.host_qkv, k, v,
                                            attention.on_device() ? a.attended : a.host_attended));
    if (!attention.on_device()) QueueAttended(a, rows);
    KV_RETURN_IF_ERROR(QueueStepPart(&w, rows, false));
  }
  steps_run_.insert(rows);
  return OkStatus();
}

Status DeviceModel::StepLogits(uint32_t row, float* logits) {
  KV_CHECK(row < step_rows_);
  return ReadLogits(step_, step_.hidden + size_t{row} * config_.hidden_size, logits);
}

Status DeviceModel::Choose(std::span<const TokenChoice> choices, int32_t* tokens) {
  if (choices.empty()) return OkStatus();
  const auto count = static_cast<uint32_t>(choices.size());
  KV_CHECK(count <= kStepRowsMax);
  const size_t width = config_.hidden_size;
  KV_RETURN_IF_ERROR(
      DeviceMemory::Grow(device_, MemoryKind::kDevice, LogitsBytes(count), &logits_));
  auto* const uniform = draws_.data<double>();
  for (uint32_t i = 0; i < count; ++i) {
    KV_CHECK(choices[i].row < step_rows_);
    uniform[i] = choices[i].draw.uniform;
    Norm(step_.hidden + choices[i].row * width, step_.normed + i * width, final_norm_, 1);
  }
  Multiply(step_.normed, output_, 0, output_.rows, count, false, logits_.data<float>());
  for (uint32_t begin = 0, end = 0; begin < count; begin = end) {  // neighbours that draw alike
    const Draw& draw = choices[begin].draw;
    for (end = begin + 1; end < count && choices[end].draw.temperature == draw.temperature &&
                          choices[end].draw.top_p == draw.top_p;) {
      ++end;
    }
    gpu::SampleArgs args;
    args.logits = logits_.data<float>() + size_t{begin} * config_.vocab_size;
    args.uniform = uniform + begin;
    args.tokens = chosen_.data<int32_t>() + begin;
    args.rows = end - begin;
    args.vocab = config_.vocab_size;
    args.temperature = draw.temperature;
    args.top_p = draw.top_p;
    device_.Launch(args);
  }
  KV_RETURN_IF_ERROR(device_.Synchronize());
  std::memcpy(tokens, chosen_.data(), count * sizeof(int32_t));
  return OkStatus();
}

}  // namespace

Result<std::unique_ptr<Model>> LoadDeviceModel(const std::string& directory,
                                               const ModelOptions& options, Device& device) {
  KV_ASSIGN_OR_RETURN(LlamaWeights weights, LoadLlamaWeights(directory));
  auto model = std::make_unique<DeviceModel>(std::move(weights), options, device);
  KV_RETURN_IF_ERROR(model->UploadWeights());
  return std::unique_ptr<Model>(std::move(model));
}

}  // namespace icecache
