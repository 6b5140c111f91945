// The small parts of a transformer layer, in f32: RMSNorm, RoPE, SwiGLU, rows of a bias, and rows
// rounded to 16 bits. Formulas and order of rounding are those of worker/model/llama_model.cc.
#pragma once

#include "kernels/gpu/block.h"

namespace icecache::gpu {

// y[row] = x[row] / rms(x[row]) * weight. Rows may lie apart; y may be x.
struct NormArgs {
  const float* x = nullptr;
  float* y = nullptr;
  const float* weight = nullptr;  // [count]
  uint32_t rows = 0;              // row r is part r % parts of group r / parts
  uint32_t count = 0;             // elements of a row
  uint32_t parts = 1;             // rows of a group, one after the other (heads of a token)
  uint32_t x_stride = 0;          // floats between groups
  uint32_t y_stride = 0;
  float eps = 0;
};

// One block per row.
struct NormKernel {
  using Args = NormArgs;
  static constexpr uint32_t kThreads = 256;
  static constexpr uint32_t kMinBlocks = 4;
  static constexpr uint32_t kSharedBytes = kWarpLanes * 4;

  template <typename Block>
  KV_GPU static void Run(Block& block, const NormArgs& args) {
    const uint32_t group = block.x() / args.parts;
    const size_t part = size_t{block.x() % args.parts} * args.count;
    const float* const x = args.x + size_t{group} * args.x_stride + part;
    float* const y = args.y + size_t{group} * args.y_stride + part;
    float sum = 0;
    for (uint32_t i = block.thread(); i < args.count; i += kThreads) sum += x[i] * x[i];
    sum = BlockSum(block, sum, kThreads, block.template shared<float>());
    const float scale = 1.0f / sqrtf(sum / static_cast<float>(args.count) + args.eps);
    for (uint32_t i = block.thread(); i < args.count; i += kThreads) {
      y[i] = x[i] * scale * args.weight[i];
    }
  }
};

// Turns q and k of each token by its position, in place, and multiplies q by `q_scale`. Angles in
// double: at position 100,000 an f32 angle is off by 0.004. Every RoPE scaling is in `frequencies`
// and `factor` (worker/model/rope.h).
struct RopeArgs {
  float* q = nullptr;                   // [tokens, query_heads, head_dim]
  float* k = nullptr;                   // [tokens, kv_heads, head_dim]
  const double* frequencies = nullptr;  // [head_dim / 2]
  const uint32_t* positions = nullptr;  // [tokens]
  uint32_t tokens = 0;
  uint32_t query_heads = 0;
  uint32_t kv_heads = 0;
  uint32_t head_dim = 0;
  float q_scale = 1;
  double factor = 1;  // of cosines and sines
};

// One block per token.
struct RopeKernel {
  using Args = RopeArgs;
  static constexpr uint32_t kThreads = 256;
  static constexpr uint32_t kMinBlocks = 4;
  static constexpr uint32_t kSharedBytes = limits::kHeadDimMax * 4;  // cosines, then sines

  template <typename Block>
  KV_GPU static void Run(Block& block, const RopeArgs& args) {
    const uint32_t half = args.head_dim / 2;
    float* const cosines = block.template shared<float>();
    float* const sines = cosines + half;
    for (uint32_t pair = block.thread(); pair < half; pair += kThreads) {
      const double angle = double{1} * args.positions[block.x()] * args.frequencies[pair];
      cosines[pair] = static_cast<float>(cos(angle) * args.factor);
      sines[pair] = static_cast<float>(sin(angle) * args.factor);
    }
    block.Sync();
    const uint32_t heads = args.query_heads + args.kv_heads;
    for (uint32_t i = block.thread(); i < heads * half; i += kThreads) {
      const uint32_t head = i / half;
      const uint32_t pair = i % half;
      const bool is_q = head < args.query_heads;
      const size_t row = is_q ? size_t{block.x()} * args.query_heads + head
                              : size_t{block.x()} * args.kv_heads + head - args.query_heads;
      float* const x = (is_q ? args.q : args.k) + row * args.head_dim;
      const float scale = is_q ? args.q_scale : 1.0f;
      const float a = x[pair] * scale;
      const float b = x[pair + half] * scale;
      x[pair] = a * cosines[pair] - b * sines[pair];
      x[pair + half] = b * cosines[pair] + a * sines[pair];
    }
  }
};

// y[t] = silu(gate[t]) * up[t] with rows gate and up of `count` one after the other in x[t].
struct SwiGluArgs {
  const float* x = nullptr;  // [tokens, 2 * count]
  float* y = nullptr;        // [tokens, count]
  uint32_t tokens = 0;
  uint32_t count = 0;
};

// A thread per element.
struct SwiGluKernel {
  using Args = SwiGluArgs;
  static constexpr uint32_t kThreads = 256;
  static constexpr uint32_t kMinBlocks = 4;

  template <typename Block>
  KV_GPU static void Run(Block& block, const SwiGluArgs& args) {
    const size_t at = size_t{block.x()} * kThreads + block.thread();
    if (at >= size_t{args.tokens} * args.count) return;
    const size_t token = at / args.count;
    const float* const row = args.x + token * 2 * args.count + at % args.count;
    const float gate = row[0];
    const float small = expf(-fabsf(gate));  // cannot overflow
    const float sigmoid = (gate >= 0 ? 1.0f : small) / (1.0f + small);
    args.y[at] = gate * sigmoid * row[args.count];
  }
};

// to[i] = from[i % period] in `dtype`: f32 rows rounded for a library's matrix product, or a bias
// laid out for its sum to be added to.
struct ConvertArgs {
  const float* from = nullptr;
  std::byte* to = nullptr;
  DType dtype = DType::kF32;
  uint64_t count = 0;
  uint64_t period = 0;
};

// A thread per element.
struct ConvertKernel {
  using Args = ConvertArgs;
  static constexpr uint32_t kThreads = 256;
  static constexpr uint32_t kMinBlocks = 4;

  template <typename Block>
  KV_GPU static void Run(Block& block, const ConvertArgs& args) {
    const size_t at = size_t{block.x()} * kThreads + block.thread();
    if (at < args.count) StoreElement(args.to, args.dtype, at, args.from[at % args.period]);
  }
};

}  // namespace icecache::gpu
