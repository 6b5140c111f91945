// The next token from logits on the device: the token that worker/model/sampler.h would choose for
// the same uniform number, up to rounding of sums of probabilities.
//
// Sampling from the likeliest tokens of a share top_p walks them in descending order. No sort: the
// logit at which a cumulated weight is reached is found bit by bit, 32 sums over the vocabulary,
// twice. One block per row; about 0.3 ms at 128k tokens, a few microseconds for greedy.
#pragma once

#include "kernels/gpu/block.h"

namespace icecache::gpu {

struct SampleArgs {
  const float* logits = nullptr;    // [rows, vocab]
  const double* uniform = nullptr;  // [rows], in [0, 1); not read when temperature is 0
  int32_t* tokens = nullptr;        // [rows]
  uint32_t rows = 0;
  uint32_t vocab = 0;
  double temperature = 0;
  double top_p = 1;
};

struct SampleKernel {
  using Args = SampleArgs;
  static constexpr uint32_t kThreads = 256;
  static constexpr uint32_t kMinBlocks = 1;
  static constexpr uint32_t kSharedBytes = kThreads * 8 + kWarpLanes * 8;

  // One row as the threads see it. Weights below exp(-40) of the top count as none.
  struct Row {
    const float* logits;
    uint32_t vocab;
    double top;  // the largest logit
    double temperature;

    KV_GPU double Weight(float logit) const {
      const double log_weight = (static_cast<double>(logit) - top) / temperature;
      return log_weight >= -40 ? exp(log_weight) : 0.0;  // also no NaN
    }
  };

  // Floats as integers of the same order. Weights of NaNs are 0, so their keys do not matter.
  KV_GPU static uint32_t KeyOf(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
  }
  KV_GPU static float LogitOf(uint32_t key) {
    const uint32_t bits = key >> 31 != 0 ? key & 0x7fffffffu : ~key;
    float x;
    memcpy(&x, &bits, 4);
    return x;
  }

  template <typename Block>
  KV_GPU static double* Scratch(Block& block) {
    return block.template shared<double>(kThreads * 8);
  }

  // The summed weight of all tokens with a key of at least `key`.
  template <typename Block>
  KV_GPU static double Mass(Block& block, const Row& row, uint32_t key) {
    double sum = 0;
    for (uint32_t i = block.thread(); i < row.vocab; i += kThreads) {
      if (KeyOf(row.logits[i]) >= key) sum += row.Weight(row.logits[i]);
    }
    return BlockSum(block, sum, kThreads, Scratch(block));
  }

  // The largest key whose Mass is at least `mass` (kAbove: more than that). The whole row's is.
  template <bool kAbove, typename Block>
  KV_GPU static uint32_t KeyAtMass(Block& block, const Row& row, double mass) {
    uint32_t key = 0;
    for (uint32_t bit = 1u << 31; bit != 0; bit >>= 1) {
      const double here = Mass(block, row, key | bit);
      if (kAbove ? here > mass : here >= mass) key |= bit;
    }
    return key;
  }

  // Lowest id of the largest logit; NaN loses to everything.
  template <typename Block>
  KV_GPU static uint32_t ArgMax(Block& block, const Row& row) {
    float best = -INFINITY;
    uint32_t id = row.vocab;  // none yet
    for (uint32_t i = block.thread(); i < row.vocab; i += kThreads) {
      const float x = row.logits[i];
      if (x == x && (id == row.vocab || x > best)) {
        best = x;
        id = i;
      }
    }
    const auto take = [&](float x, uint32_t other) {
      const bool better = x > best || (x == best && other < id);
      if (other != row.vocab && (id == row.vocab || better)) {
        best = x;
        id = other;
      }
    };
    for (uint32_t mask = kWarpLanes / 2; mask > 0; mask /= 2) {
      const float x = block.ShuffleXor(best, mask);
      take(x, block.ShuffleXor(id, mask));
    }
    auto* const bests = block.template shared<float>();
    auto* const ids = block.template shared<uint32_t>(kWarpLanes * 4);
    if (block.lane() == 0) {
      bests[block.warp()] = best;
      ids[block.warp()] = id;
    }
    block.Sync();
    for (uint32_t w = 0; w < kThreads / kWarpLanes; ++w) take(bests[w], ids[w]);
    block.Sync();
    return id == row.vocab ? row.vocab - 1 : id;  // all NaN: as the CPU's sampler
  }

  // Walks ids in ascending order, weighing each by fn(id), and stores the first at which the walk
  // has passed `left`. Threads own neighbouring ids; the walk's order is the same for any number.
  template <typename Block, typename Fn>
  KV_GPU static void StoreWhereReached(Block& block, const Row& row, double left, const Fn& fn,
                                       int32_t* token) {
    double* const sums = block.template shared<double>();
    const uint32_t each = (row.vocab + kThreads - 1) / kThreads;
    const uint32_t begin = Min(row.vocab, block.thread() * each);
    const uint32_t end = Min(row.vocab, begin + each);
    double own = 0;
    for (uint32_t i = begin; i < end; ++i) own += fn(i);
    sums[block.thread()] = own;
    block.Sync();
    double before = 0;
    uint32_t last = 0;  // thread with weight, for sums that end below `left` by rounding
    for (uint32_t t = 0; t < kThreads; ++t) {
      if (t < block.thread()) before += sums[t];
      if (sums[t] > 0) last = t;
    }
    const bool mine = left >= before && left < before + own;
    const bool fall_back = block.thread() == last && left >= before + own;
    if (!mine && !fall_back) return;
    for (uint32_t i = begin; i < end; ++i) {
      const double weight = fn(i);
      if (weight <= 0) continue;
      *token = static_cast<int32_t>(i);
      before += weight;
      if (left < before) return;
    }
  }

  template <typename Block>
  KV_GPU static void Run(Block& block, const SampleArgs& args) {
    Row row{args.logits + size_t{block.x()} * args.vocab, args.vocab, 0, args.temperature};
    int32_t* const token = args.tokens + block.x();
    const uint32_t best = ArgMax(block, row);
    if (block.thread() == 0) *token = static_cast<int32_t>(best);
    row.top = row.logits[best];
    if (args.temperature == 0 || !(row.top > -INFINITY && row.top < INFINITY)) return;
    block.Sync();  // the answer of thread 0 lies before the one below
    const double total = Mass(block, row, 0);
    const double u = args.uniform[block.x()];
    if (args.top_p >= 1) {
      StoreWhereReached(
          block, row, u * total, [&](uint32_t i) { return row.Weight(row.logits[i]); }, token);
      return;
    }
    // The likeliest tokens whose weights reach the share; of equal ones the first ids.
    const double share = args.top_p * total;
    const uint32_t last = KeyAtMass<false>(block, row, share);
    const double above = Mass(block, row, last + 1);
    const double weight = row.Weight(LogitOf(last));
    const double left = u * (above + ceil((share - above) / weight) * weight);
    const uint32_t key = KeyAtMass<true>(block, row, left);
    const double passed = Mass(block, row, key + 1);
    StoreWhereReached(
        block, row, left - passed,
        [&](uint32_t i) { return KeyOf(row.logits[i]) == key ? row.Weight(row.logits[i]) : 0.0; },
        token);
  }
};

}  // namespace icecache::gpu
