// Merges partial attention of many terms in one pass: shares of one page list, window, residuals.
#pragma once

#include "kernels/gpu/attend.h"

namespace icecache::gpu {

inline constexpr uint32_t kMergeTermsMax = 4;
inline constexpr uint32_t kMergeStatesMax = 256;  // over all terms

// `count` AttentionStates of all heads, one after the other.
struct MergeTerm {
  const float* states = nullptr;
  uint32_t count = 0;
};

struct MergeArgs {
  MergeTerm terms[kMergeTermsMax];
  uint32_t term_count = 0;
  uint32_t heads = 0;
  uint32_t head_dim = 0;
  float* state = nullptr;   // AttentionStates of the merge; null: not wanted. May be a term.
  float* result = nullptr;  // [heads, head_dim], out / denom, 0 without tokens; null: not wanted
};

// One block per head.
struct MergeKernel {
  using Args = MergeArgs;
  static constexpr uint32_t kThreads = 128;
  static constexpr uint32_t kMinBlocks = 4;
  static constexpr uint32_t kSharedBytes = kMergeStatesMax * 4;

  template <typename Fn>
  KV_GPU static void ForEachState(const MergeArgs& args, const Fn& fn) {
    const size_t floats = size_t{args.heads} * (args.head_dim + 2);
    uint32_t index = 0;
    for (uint32_t t = 0; t < args.term_count; ++t) {
      for (uint32_t i = 0; i < args.terms[t].count; ++i) {
        fn(args.terms[t].states + i * floats, index++);
      }
    }
  }

  template <typename Block>
  KV_GPU static void Run(Block& block, const MergeArgs& args) {
    const uint32_t head = block.x();
    float* const scales = block.template shared<float>();
    float top = -INFINITY;
    ForEachState(args, [&](const float* state, uint32_t) {
      const float max = state[args.heads + head] > 0 ? state[head] : -INFINITY;
      top = top < max ? max : top;
    });
    float denom = 0;
    ForEachState(args, [&](const float* state, uint32_t index) {
      const float own = state[args.heads + head];
      const float scale = own > 0 ? expf(state[head] - top) : 0.0f;
      denom += scale * own;
      if (block.thread() == 0) scales[index] = scale;
    });
    block.Sync();  // also: everybody has read what may be overwritten below
    if (args.state != nullptr && block.thread() == 0) {
      args.state[head] = top;
      args.state[args.heads + head] = denom;
    }
    const float norm = denom > 0 ? 1.0f / denom : 0.0f;
    for (uint32_t dim = block.thread(); dim < args.head_dim; dim += kThreads) {
      const size_t at = size_t{head} * args.head_dim + dim;
      float sum = 0;
      ForEachState(args, [&](const float* state, uint32_t index) {
        if (scales[index] > 0) sum += scales[index] * state[2 * size_t{args.heads} + at];
      });
      if (args.state != nullptr) args.state[2 * size_t{args.heads} + at] = sum;
      if (args.result != nullptr) args.result[at] = norm * sum;
    }
  }
};

}  // namespace icecache::gpu
