// AttendKernel: attend.h's attention on tensor cores, for 16-bit rows. See attend.h for the plan.
#pragma once

#include "kernels/gpu/attend.h"

namespace icecache::gpu {

// E: F16Rows or BF16Rows. REQUIRES: K and V rows 16-byte aligned.
template <typename E, uint32_t kDim>
struct AttendKernel {
  using Args = AttendArgs;
  static constexpr uint32_t kThreads = 128;
  static constexpr uint32_t kWarps = kThreads / kWarpLanes;
  // A page of K and V and the sums are 128 registers per lane at head_dim 128, 256 streams V.
  static constexpr uint32_t kMinBlocks = kDim < 128 ? 3 : 2;
  // Consecutive elements of a row that a lane loads at once.
  static constexpr uint32_t kKeyRun = kDim % 32 == 0 ? 8 : 4;
  static constexpr uint32_t kValueRun = kDim % 64 == 0 ? 8 : kDim % 32 == 0 ? 4 : 2;
  static constexpr uint32_t kKeyChunks = kDim / (4 * kKeyRun);      // 4 lanes share a K row
  static constexpr uint32_t kValueChunks = kDim / (8 * kValueRun);  // 8 lanes share a V row
  static constexpr uint32_t kStepsPerChunk = kKeyRun / 4;           // products of 16 dimensions
  static constexpr uint32_t kSteps = kDim / 16;
  static constexpr uint32_t kTiles = kDim / 8;  // of 8 output columns
  static constexpr uint32_t kQueryBytes = E::kParts * kSteps * kWarpLanes * 16;
  static constexpr uint32_t kPitch = kDim + 2;  // of merged rows; +2 spreads them over banks
  static constexpr uint32_t kMergeBytes = (2 * kWarps + kPitch) * kTaskRows * 4;
  static constexpr uint32_t kSharedBytes =
      kTaskRows * 4 + (kQueryBytes > kMergeBytes ? kQueryBytes : kMergeBytes);

  using KeyRun = Words<kKeyRun / 2>;
  using ValueRun = Words<kValueRun / 2>;

  // What a lane keeps of its warp's running softmax: rows lane / 4 and lane / 4 + 8.
  struct Sum {
    float max[2] = {-INFINITY, -INFINITY};
    float denom[2] = {0, 0};  // over this lane's columns
    float out[kTiles][4] = {};
  };

  // Shared memory: a scale per row, then the query parts as fragments; later the merge.
  template <typename Block>
  KV_GPU static float* Scales(Block& block) {
    return block.template shared<float>();
  }
  template <typename Block>
  KV_GPU static Words<4>* Fragments(Block& block) {
    return block.template shared<Words<4>>(kTaskRows * 4);
  }

  // A power of two per row that brings its largest element to 0.5 .. 1, so that parts of 16 bits
  // neither overflow nor vanish.
  template <typename Block>
  KV_GPU static void ScaleRows(Block& block, const AttendArgs& args, const AttendTask& task) {
    for (uint32_t row = block.warp(); row < kTaskRows; row += kWarps) {
      float largest = 0;
      if (row < task.rows) {
        const float* const q = args.queries + size_t{HeadOfRow(args, task, row)} * kDim;
        for (uint32_t dim = block.lane(); dim < kDim; dim += kWarpLanes) {
          const float x = fabsf(q[dim]);
          largest = largest < x ? x : largest;
        }
      }
      largest = LaneMax(block, largest, kWarpLanes);
      int exponent = 0;
      if (largest > 0 && largest < INFINITY) (void)frexpf(largest, &exponent);
      exponent = exponent > 126 ? 126 : exponent < -126 ? -126 : exponent;
      if (block.lane() == 0) Scales(block)[row] = ldexpf(1.0f, exponent);
    }
  }

  // Fragment a of lane (row, quarter) for a product holds rows `row` and `row` + 8; its registers
  // are the pairs of dimensions that the same lane's run of K holds: d, d + 1 and d + 2, d + 3.
  template <typename Block>
  KV_GPU static void SplitQueries(Block& block, const AttendArgs& args, const AttendTask& task) {
    for (uint32_t at = block.thread(); at < kSteps * kWarpLanes; at += kThreads) {
      const uint32_t lane = at % kWarpLanes;
      const uint32_t step = at / kWarpLanes;
      const uint32_t dim =
          step / kStepsPerChunk * 4 * kKeyRun + lane % 4 * kKeyRun + step % kStepsPerChunk * 4;
      Words<4> parts[E::kParts];
      KV_UNROLL
      for (uint32_t half = 0; half < 2; ++half) {
        const uint32_t row = lane / 4 + 8 * half;
        float q[4] = {};
        if (row < task.rows) {
          const float* const from = args.queries + size_t{HeadOfRow(args, task, row)} * kDim + dim;
          const float scale = 1.0f / Scales(block)[row];
          for (uint32_t i = 0; i < 4; ++i) q[i] = from[i] * scale;
        }
        uint32_t first[E::kParts], second[E::kParts];
        SplitPair<E>(q[0], q[1], first);
        SplitPair<E>(q[2], q[3], second);
        KV_UNROLL
        for (uint32_t p = 0; p < E::kParts; ++p) {
          parts[p].w[half] = first[p];
          parts[p].w[2 + half] = second[p];
        }
      }
      KV_UNROLL
      for (uint32_t p = 0; p < E::kParts; ++p) {
        Fragments(block)[(p * kSteps + step) * kWarpLanes + lane] = parts[p];
      }
    }
  }

  template <typename Block>
  KV_GPU static void LoadKeys(Block& block, const PageView& page, KeyRun (&keys)[2][kKeyChunks]) {
    KV_UNROLL
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t token = half * 8 + block.lane() / 4;
      const std::byte* const row = page.k + (size_t{token} * kDim + block.lane() % 4 * kKeyRun) * 2;
      KV_UNROLL
      for (uint32_t c = 0; c < kKeyChunks; ++c) {
        keys[half][c] = token < page.fill ? Load<KeyRun>(row + c * 8 * kKeyRun) : KeyRun{};
      }
    }
  }

  // Fragment b of a lane holds tokens 2t, 2t + 1, 2t + 8, 2t + 9 with t = lane % 4.
  template <typename Block>
  KV_GPU static void LoadValues(Block& block, const PageView& page, uint32_t chunk,
                                ValueRun (&values)[4]) {
    KV_UNROLL
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t token = block.lane() % 4 * 2 + i % 2 + i / 2 * 8;
      const size_t at = size_t{token} * kDim + (chunk * 8 + block.lane() / 4) * kValueRun;
      values[i] = token < page.fill ? Load<ValueRun>(page.v + at * 2) : ValueRun{};
    }
  }

  // scores[half][i]: row lane / 4 (i < 2) or + 8, token half * 8 + lane % 4 * 2 + i % 2.
  template <typename Block>
  KV_GPU static void Score(Block& block, const KeyRun (&keys)[2][kKeyChunks],
                           float (&scores)[2][4]) {
    KV_UNROLL
    for (uint32_t step = 0; step < kSteps; ++step) {
      const uint32_t chunk = step / kStepsPerChunk;
      const uint32_t word = step % kStepsPerChunk * 2;
      float product[2][4] = {};
      // Small parts first, and one product's sum at a time: tensor cores truncate their sums, so
      // the long sum over the steps is made in f32 proper.
      KV_UNROLL
      for (uint32_t p = E::kParts; p-- > 0;) {
        const Words<4> a = Fragments(block)[(p * kSteps + step) * kWarpLanes + block.lane()];
        KV_UNROLL
        for (uint32_t half = 0; half < 2; ++half) {
          const uint32_t b[2] = {keys[half][chunk].w[word], keys[half][chunk].w[word + 1]};
          block.template Mma<E::kBf16>(product[half], a.w, b);
        }
      }
      KV_UNROLL
      for (uint32_t i = 0; i < 8; ++i) scores[i / 4][i % 4] += product[i / 4][i % 4];
    }
  }

  // Scores become weights relative to the new maxima; keep[2] is what old sums shrink by.
  template <typename Block>
  KV_GPU static void Weigh(Block& block, const AttendArgs& args, const AttendTask& task,
                           uint32_t page, uint32_t fill, float (&scores)[2][4], Sum* sum,
                           float (&keep)[2]) {
    KV_UNROLL
    for (uint32_t r = 0; r < 2; ++r) {
      const uint32_t row = block.lane() / 4 + 8 * r;
      const float scale = Scales(block)[row];
      float max = sum->max[r];
      KV_UNROLL
      for (uint32_t i = 0; i < 4; ++i) {
        float& score = scores[i / 2][2 * r + i % 2];
        const uint32_t token = i / 2 * 8 + block.lane() % 4 * 2 + i % 2;
        const bool seen = token < fill && Visible(args, task, row, page, token);
        score = seen ? Saturated(score * scale) : -INFINITY;
        max = max < score ? score : max;
      }
      max = LaneMax(block, max, 4);
      const float base = max > -INFINITY ? max : 0.0f;
      keep[r] = Shrink(sum->max[r], base);
      sum->max[r] = max;
      sum->denom[r] *= keep[r];
      KV_UNROLL
      for (uint32_t i = 0; i < 4; ++i) {
        float& score = scores[i / 2][2 * r + i % 2];
        score = expf(score - base);
        sum->denom[r] += score;
      }
    }
  }

  template <typename Block>
  KV_GPU static void AddValues(Block& block, const uint32_t (&weights)[E::kParts][4],
                               const ValueRun (&values)[4], uint32_t chunk, const float (&keep)[2],
                               Sum* sum) {
    KV_UNROLL
    for (uint32_t j = 0; j < kValueRun; ++j) {
      const uint32_t b[2] = {PairHalves(values[0].w[j / 2], values[1].w[j / 2], j % 2),
                             PairHalves(values[2].w[j / 2], values[3].w[j / 2], j % 2)};
      float product[4] = {};
      KV_UNROLL
      for (uint32_t p = E::kParts; p-- > 0;) {
        block.template Mma<E::kBf16>(product, weights[p], b);
      }
      float(&out)[4] = sum->out[chunk * kValueRun + j];
      KV_UNROLL
      for (uint32_t i = 0; i < 4; ++i) out[i] = out[i] * keep[i / 2] + product[i];
    }
  }

  template <typename Block>
  KV_GPU static void AddPage(Block& block, const AttendArgs& args, const AttendTask& task,
                             uint32_t at, const PageView& page, Sum* sum) {
    KeyRun keys[2][kKeyChunks];
    LoadKeys(block, page, keys);
    // Values are asked for before they are needed, as long as there are registers for it.
    constexpr bool kAhead = kDim <= 128;
    ValueRun values[kAhead ? kValueChunks : 1][4];
    if constexpr (kAhead) {
      KV_UNROLL
      for (uint32_t c = 0; c < kValueChunks; ++c) LoadValues(block, page, c, values[c]);
    }
    float scores[2][4] = {};
    Score(block, keys, scores);
    float keep[2];
    Weigh(block, args, task, at, page.fill, scores, sum, keep);
    // A product's result lies in its lanes just as the next one wants its left side.
    uint32_t weights[E::kParts][4];
    KV_UNROLL
    for (uint32_t i = 0; i < 4; ++i) {
      uint32_t parts[E::kParts];
      SplitPair<E>(scores[i / 2][i % 2 * 2], scores[i / 2][i % 2 * 2 + 1], parts);
      KV_UNROLL
      for (uint32_t p = 0; p < E::kParts; ++p) weights[p][i] = parts[p];
    }
    KV_UNROLL
    for (uint32_t c = 0; c < kValueChunks; ++c) {
      if constexpr (!kAhead) LoadValues(block, page, c, values[0]);
      AddValues(block, weights, values[kAhead ? c : 0], c, keep, sum);
    }
  }

  // The warps' sums become one, in shared memory: [rows] of out at kPitch, after max and denom.
  template <typename Block>
  KV_GPU static void MergeWarps(Block& block, const Sum& sum) {
    float* const maxes = block.template shared<float>(kTaskRows * 4);  // [kWarps, kTaskRows]
    float* const denoms = maxes + kWarps * kTaskRows;
    float* const out = denoms + kWarps * kTaskRows;
    block.Sync();  // nobody reads the fragments any more
    float denom[2], scale[2];
    KV_UNROLL
    for (uint32_t r = 0; r < 2; ++r) {
      const uint32_t row = block.lane() / 4 + 8 * r;
      denom[r] = LaneSum(block, sum.denom[r], 4);
      if (block.lane() % 4 == 0) {
        maxes[block.warp() * kTaskRows + row] = sum.max[r];
        denoms[block.warp() * kTaskRows + row] = denom[r];
      }
    }
    block.Sync();
    KV_UNROLL
    for (uint32_t r = 0; r < 2; ++r) {
      float top = -INFINITY;
      for (uint32_t w = 0; w < kWarps; ++w) {
        const float max = maxes[w * kTaskRows + block.lane() / 4 + 8 * r];
        top = top < max ? max : top;
      }
      scale[r] = Shrink(sum.max[r], top);
    }
    for (uint32_t w = 0; w < kWarps; ++w) {
      if (block.warp() == w) {
        KV_UNROLL
        for (uint32_t tile = 0; tile < kTiles; ++tile) {
          KV_UNROLL
          for (uint32_t i = 0; i < 4; ++i) {
            const uint32_t dim = tile / kValueRun * 8 * kValueRun +
                                 (block.lane() % 4 * 2 + i % 2) * kValueRun + tile % kValueRun;
            float& to = out[(block.lane() / 4 + i / 2 * 8) * kPitch + dim];
            to = (w == 0 ? 0.0f : to) + scale[i / 2] * sum.out[tile][i];
          }
        }
      }
      block.Sync();
    }
  }

  template <typename Block>
  KV_GPU static void StoreStates(Block& block, const AttendArgs& args, const AttendTask& task) {
    const float* const maxes = block.template shared<float>(kTaskRows * 4);
    const float* const denoms = maxes + kWarps * kTaskRows;
    const float* const from = denoms + kWarps * kTaskRows;
    float* const max = args.states + block.y() * (size_t{args.heads} * (kDim + 2));
    float* const denom = max + args.heads;
    float* const out = denom + args.heads;
    for (uint32_t row = block.warp(); row < task.rows; row += kWarps) {
      const uint32_t head = HeadOfRow(args, task, row);
      float top = -INFINITY;
      for (uint32_t w = 0; w < kWarps; ++w) {
        top = top < maxes[w * kTaskRows + row] ? maxes[w * kTaskRows + row] : top;
      }
      float total = 0;
      for (uint32_t w = 0; w < kWarps; ++w) {
        total += Shrink(maxes[w * kTaskRows + row], top) * denoms[w * kTaskRows + row];
      }
      const bool there = args.add && denom[head] > 0;
      const float old = there ? denom[head] : 0.0f;
      const StateSlot slot = MergeSlot(there ? max[head] : -INFINITY, old, top, total);
      for (uint32_t dim = block.lane(); dim < kDim; dim += kWarpLanes) {
        float& to = out[size_t{head} * kDim + dim];
        to = (there ? slot.keep * to : 0.0f) + slot.scale * from[row * kPitch + dim];
      }
      block.SyncWarp();  // all lanes have read the old state
      if (block.lane() == 0) {
        max[head] = slot.max;
        denom[head] = slot.keep * old + slot.scale * total;
      }
    }
  }

  template <typename Block>
  KV_GPU static void Run(Block& block, const AttendArgs& args) {
    const AttendTask task = args.tasks[block.x()];
    const PageShare share = ShareOf(task, block.y(), args.splits);
    ScaleRows(block, args, task);
    block.Sync();
    SplitQueries(block, args, task);
    block.Sync();
    Sum sum;
    for (uint32_t at = share.begin + block.warp(); at < share.end; at += kWarps) {
      const PageView page = args.pages[at];
      if (page.fill > 0) AddPage(block, args, task, at, page, &sum);
    }
    MergeWarps(block, sum);
    StoreStates(block, args, task);
  }
};

}  // namespace icecache::gpu
