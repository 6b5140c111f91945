// Paged attention on a GPU: bodies and arguments. Decode, batches of ragged decodes and causal
// prefill are the same kernel over different tables.
//
// A task is up to 16 query rows over one list of pages: the query heads of one kv head for one
// sequence, or those of several neighbouring tokens in prefill. A block is one task (or one share
// of its pages, see `splits`); its four warps take pages in turn, each with its own running softmax
// (FlashAttention-2 inside a warp, FlashDecoding across blocks), and are merged at the end.
//
// Tensor cores multiply 16-bit numbers, but queries and weights are f32. They are split into parts
// whose sum has 22 (f16) or 24 (bf16) bits, which costs two or three products instead of one and
// makes results equal those of the CPU. Decoding is bound by memory: one page of 8 KiB takes about
// 540 cycles of an H100 SM's share of its bandwidth, and the products of three parts about 190.
//
// K and V go from memory to the registers in which the tensor cores want them, without shared
// memory: a dot product may take its dimensions in any order, and so may output columns, so each
// lane loads runs of up to 16 consecutive bytes (whole sectors for the warp) and queries are
// arranged to fit.
#pragma once

#include "kernels/gpu/block.h"
#include "kernels/paged_kv.h"

namespace icecache::gpu {

inline constexpr uint32_t kTaskRows = 16;
inline constexpr uint32_t kAllVisible = UINT32_MAX;

struct AttendTask {
  uint32_t head = 0;        // of row 0, among all heads of the queries
  uint32_t rows = 0;        // 1..kTaskRows; row r is head + r / group * query_heads + r % group
  uint32_t page_begin = 0;  // of the list, in pages
  uint32_t page_end = 0;
  // Keys that the rows of the task's first token see, counting 16 per page; those of each later
  // token see one more. kAllVisible: all that the pages hold.
  uint32_t visible = kAllVisible;
};

// All pointers are readable by the device: its own memory, or mapped host memory.
struct AttendArgs {
  const float* queries = nullptr;  // [heads, head_dim], scaled; 16-byte aligned
  const PageView* pages = nullptr;
  const AttendTask* tasks = nullptr;
  float* states = nullptr;  // [splits] x AttentionStates of `heads`: max, denom, out
  DType dtype = DType::kF16;
  uint32_t task_count = 0;
  uint32_t heads = 0;        // of queries and states
  uint32_t group = 0;        // query heads per kv head
  uint32_t query_heads = 0;  // per token
  uint32_t head_dim = 0;
  uint32_t splits = 1;  // blocks per task
  bool add = false;     // to what states holds; else states is overwritten. REQUIRES: splits == 1
};

KV_GPU uint32_t HeadOfRow(const AttendArgs& args, const AttendTask& task, uint32_t row) {
  return task.head + row / args.group * args.query_heads + row % args.group;
}

// The pages of a task that are block y's.
struct PageShare {
  uint32_t begin, end;
};
KV_GPU PageShare ShareOf(const AttendTask& task, uint32_t split, uint32_t splits) {
  const uint32_t count = task.page_end - task.page_begin;
  const uint32_t each = (count + splits - 1) / splits;
  const uint32_t begin = task.page_begin + Min(count, split * each);
  return {begin, Min(task.page_end, begin + each)};
}

KV_GPU bool Visible(const AttendArgs& args, const AttendTask& task, uint32_t row, uint32_t page,
                    uint32_t token) {
  return task.visible == kAllVisible ||
         (page - task.page_begin) * limits::kPageTokens + token < task.visible + row / args.group;
}

// Logits beyond a quarter of the largest float saturate, NaN (inf - inf) at the lower end.
KV_GPU float Saturated(float logit) {
  constexpr float kLargest = 8.5070587e37f;
  if (!(logit > -kLargest)) return -kLargest;
  return logit < kLargest ? logit : kLargest;
}

// exp(from - to) of running maxima; 0 for an empty sum, whatever `to` is.
KV_GPU float Shrink(float from, float to) { return from > -INFINITY ? expf(from - to) : 0.0f; }

// The merge of two states: the maximum of both, and the factors of what is there and what comes.
struct StateSlot {
  float max, keep, scale;
};
KV_GPU StateSlot MergeSlot(float old_max, float old_denom, float max, float denom) {
  if (denom == 0.0f) return {old_max, 1.0f, 0.0f};
  if (old_denom == 0.0f) return {max, 0.0f, 1.0f};
  const float top = old_max < max ? max : old_max;
  return {top, expf(old_max - top), expf(max - top)};
}

// Stored elements as the tensor cores take them, and how many of them add up to a float.
struct F16Rows {
  static constexpr bool kBf16 = false;
  static constexpr uint32_t kParts = 2;
  KV_GPU static uint32_t Round(float x) { return RoundF16(x); }
  KV_GPU static float Widen(uint32_t bits) { return WidenF16(bits); }
};
struct BF16Rows {
  static constexpr bool kBf16 = true;
  static constexpr uint32_t kParts = 3;
  KV_GPU static uint32_t Round(float x) { return RoundBF16(x); }
  KV_GPU static float Widen(uint32_t bits) { return WidenBF16(bits); }
};

// Two floats as parts of 16 bits each, the first in the low half; part 0 is the largest.
template <typename E>
KV_GPU void SplitPair(float x, float y, uint32_t (&parts)[E::kParts]) {
  KV_UNROLL
  for (uint32_t p = 0; p < E::kParts; ++p) {
    const uint32_t low = E::Round(x);
    const uint32_t high = E::Round(y);
    parts[p] = low | (high << 16);
    x -= E::Widen(low);
    y -= E::Widen(high);
  }
}

// The same half of two words: column j of two neighbouring rows.
KV_GPU uint32_t PairHalves(uint32_t first, uint32_t second, uint32_t half) {
#if defined(__CUDACC__)
  return __byte_perm(first, second, half == 0 ? 0x5410 : 0x7632);
#else
  return half == 0 ? (first & 0xffff) | (second << 16) : (first >> 16) | (second & 0xffff0000);
#endif
}

}  // namespace icecache::gpu
