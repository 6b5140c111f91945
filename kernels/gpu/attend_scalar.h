// AttendScalarKernel: attend.h's attention without tensor cores.
#pragma once

#include "kernels/gpu/attend.h"

namespace icecache::gpu {

// Any dtype and head_dim up to 256: one warp per query row, a lane per 32nd dimension, f32 sums.
// For f32 rows, and for head_dims that AttendKernel (attend_mma-inl.h) is not compiled for. Reads K
// and V once per query row.
struct AttendScalarKernel {
  using Args = AttendArgs;
  static constexpr uint32_t kThreads = 128;
  static constexpr uint32_t kMinBlocks = 4;
  static constexpr uint32_t kPerLane = limits::kHeadDimMax / kWarpLanes;

  // Running softmax of one row over one split's pages.
  struct Sum {
    float max = -INFINITY;
    float denom = 0;
    float out[kPerLane] = {};
  };

  template <typename Block>
  KV_GPU static void AddToken(Block& block, const AttendArgs& args, const PageView& page,
                              uint32_t token, const float (&q)[kPerLane], Sum* sum) {
    float logit = 0;
    KV_UNROLL
    for (uint32_t i = 0; i < kPerLane; ++i) {
      const uint32_t dim = block.lane() + i * kWarpLanes;
      if (dim < args.head_dim) {
        logit += q[i] * LoadElement(page.k, args.dtype, size_t{token} * args.head_dim + dim);
      }
    }
    logit = Saturated(LaneSum(block, logit, kWarpLanes));
    const float max = sum->max < logit ? logit : sum->max;
    const float keep = Shrink(sum->max, max);
    const float weight = expf(logit - max);
    sum->max = max;
    sum->denom = sum->denom * keep + weight;
    KV_UNROLL
    for (uint32_t i = 0; i < kPerLane; ++i) {
      const uint32_t dim = block.lane() + i * kWarpLanes;
      if (dim < args.head_dim) {
        const size_t at = size_t{token} * args.head_dim + dim;
        sum->out[i] = sum->out[i] * keep + weight * LoadElement(page.v, args.dtype, at);
      }
    }
  }

  template <typename Block>
  KV_GPU static void StoreRow(Block& block, const AttendArgs& args, uint32_t head, const Sum& sum) {
    float* const max = args.states + block.y() * (size_t{args.heads} * (args.head_dim + 2));
    float* const denom = max + args.heads;
    float* const out = denom + args.heads + size_t{head} * args.head_dim;
    const bool there = args.add && denom[head] > 0;
    const StateSlot slot =
        MergeSlot(there ? max[head] : -INFINITY, there ? denom[head] : 0.0f, sum.max, sum.denom);
    const float total = (there ? slot.keep * denom[head] : 0.0f) + slot.scale * sum.denom;
    KV_UNROLL
    for (uint32_t i = 0; i < kPerLane; ++i) {
      const uint32_t dim = block.lane() + i * kWarpLanes;
      if (dim < args.head_dim) {
        out[dim] = (there ? slot.keep * out[dim] : 0.0f) + slot.scale * sum.out[i];
      }
    }
    block.SyncWarp();  // all lanes have read the old state
    if (block.lane() == 0) {
      max[head] = slot.max;
      denom[head] = total;
    }
  }

  template <typename Block>
  KV_GPU static void Run(Block& block, const AttendArgs& args) {
    const AttendTask task = args.tasks[block.x()];
    const PageShare share = ShareOf(task, block.y(), args.splits);
    for (uint32_t row = block.warp(); row < task.rows; row += kThreads / kWarpLanes) {
      const uint32_t head = HeadOfRow(args, task, row);
      float q[kPerLane];
      KV_UNROLL
      for (uint32_t i = 0; i < kPerLane; ++i) {
        const uint32_t dim = block.lane() + i * kWarpLanes;
        q[i] = dim < args.head_dim ? args.queries[size_t{head} * args.head_dim + dim] : 0.0f;
      }
      Sum sum;
      for (uint32_t at = share.begin; at < share.end; ++at) {
        const PageView page = args.pages[at];
        for (uint32_t token = 0; token < page.fill; ++token) {
          if (!Visible(args, task, row, at, token)) break;
          AddToken(block, args, page, token, q, &sum);
        }
      }
      StoreRow(block, args, head, sum);
    }
  }
};

}  // namespace icecache::gpu
