// Merges partial attention of many terms in one pass: shares of one page list, window, residuals.
#pragma once

#include "kernels/gpu/attend.h"

namespace icecache::gpu {

inline constexpr uint32_t kMergeTermsMax = 4;

// `count` AttentionStates of all heads, one after the other.
struct MergeTerm {
  const float* states = nullptr;
  uint32_t count = 0;
};

// Head by head the same lists of states.
struct MergeArgs {
  MergeTerm terms[kMergeTermsMax];
  uint32_t term_count = 0;
  uint32_t heads = 0;
  uint32_t head_dim = 0;
  float* state = nullptr;   // AttentionStates of the merge; null: not wanted. May be a term.
  float* result = nullptr;  // [heads, head_dim], out / denom, 0 without tokens; null: not wanted
};

// Head `head` of AttentionStates of `heads` heads.
struct HeadTerm {
  const float* states = nullptr;
  uint32_t heads = 0;
  uint32_t head = 0;
};

// A head's terms within a list, and where out / denom of their merge goes.
struct MergedHead {
  uint32_t term_begin = 0;
  uint32_t term_end = 0;
  float* result = nullptr;  // [head_dim]
};

// Every head has a list of its own: a step's windows, pages and residuals.
struct MergeHeadsArgs {
  const MergedHead* heads = nullptr;
  const HeadTerm* terms = nullptr;
  uint32_t head_count = 0;
  uint32_t head_dim = 0;
};

// Where the merge of one head goes; null: not wanted.
struct MergeTarget {
  float* max = nullptr;
  float* denom = nullptr;
  float* out = nullptr;
  float* result = nullptr;
};

// All threads of a block merge one head. for_each(fn) calls fn(max, denom, row) for every term.
template <uint32_t kThreads, typename Block, typename ForEach>
KV_GPU void MergeHead(Block& block, uint32_t head_dim, const ForEach& for_each,
                      const MergeTarget& to) {
  float top = -INFINITY;
  for_each([&](float max, float denom, const float*) {
    if (denom > 0 && top < max) top = max;
  });
  float sum = 0;
  for_each([&](float max, float denom, const float*) {
    if (denom > 0) sum += expf(max - top) * denom;
  });
  const float norm = sum > 0 ? 1.0f / sum : 0.0f;
  for (uint32_t dim = block.thread(); dim < head_dim; dim += kThreads) {
    float out = 0;
    for_each([&](float max, float denom, const float* row) {
      if (denom > 0) out += expf(max - top) * row[dim];
    });
    if (to.out != nullptr) to.out[dim] = out;
    if (to.result != nullptr) to.result[dim] = norm * out;
  }
  if (to.max == nullptr) return;
  block.Sync();  // everybody has read what may be overwritten: the target may be a term
  if (block.thread() == 0) {
    *to.max = top;
    *to.denom = sum;
  }
}

// One block per head.
struct MergeKernel {
  using Args = MergeArgs;
  static constexpr uint32_t kThreads = 128;
  static constexpr uint32_t kMinBlocks = 4;

  template <typename Block>
  KV_GPU static void Run(Block& block, const MergeArgs& args) {
    const uint32_t head = block.x();
    const size_t row = size_t{head} * args.head_dim;
    const size_t rows = 2 * size_t{args.heads};
    MergeTarget to;
    if (args.state != nullptr) {
      to.max = args.state + head;
      to.denom = args.state + args.heads + head;
      to.out = args.state + rows + row;
    }
    if (args.result != nullptr) to.result = args.result + row;
    const auto for_each = [&](const auto& fn) {
      const size_t floats = size_t{args.heads} * (args.head_dim + 2);
      for (uint32_t t = 0; t < args.term_count; ++t) {
        for (uint32_t i = 0; i < args.terms[t].count; ++i) {
          const float* const state = args.terms[t].states + i * floats;
          fn(state[head], state[args.heads + head], state + rows + row);
        }
      }
    };
    MergeHead<kThreads>(block, args.head_dim, for_each, to);
  }
};

struct MergeHeadsKernel {
  using Args = MergeHeadsArgs;
  static constexpr uint32_t kThreads = 128;
  static constexpr uint32_t kMinBlocks = 4;

  template <typename Block>
  KV_GPU static void Run(Block& block, const MergeHeadsArgs& args) {
    const MergedHead head = args.heads[block.x()];
    MergeTarget to;
    to.result = head.result;
    const auto for_each = [&](const auto& fn) {
      for (uint32_t t = head.term_begin; t < head.term_end; ++t) {
        const HeadTerm term = args.terms[t];
        fn(term.states[term.head], term.states[term.heads + term.head],
           term.states + 2 * size_t{term.heads} + size_t{term.head} * args.head_dim);
      }
    };
    MergeHead<kThreads>(block, args.head_dim, for_each, to);
  }
};

}  // namespace icecache::gpu
