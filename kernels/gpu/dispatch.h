// KernelCall: everything that can be launched, as data; and which kernel with which grid a call is.
// Both devices launch through Dispatch, so that the choice is tested without a GPU.
#pragma once

#include <variant>

#include "kernels/gpu/assign.h"
#include "kernels/gpu/attend_mma-inl.h"
#include "kernels/gpu/attend_scalar.h"
#include "kernels/gpu/copy_spans.h"
#include "kernels/gpu/gemm.h"
#include "kernels/gpu/layer_ops.h"
#include "kernels/gpu/page_checksum.h"
#include "kernels/gpu/sample.h"
#include "kernels/gpu/state_merge.h"

namespace icecache::gpu {

using KernelCall =
    std::variant<AttendArgs, MergeArgs, MergeHeadsArgs, CopyArgs, VerifyArgs, NormArgs, RopeArgs,
                 SwiGluArgs, ConvertArgs, GemmArgs, SampleArgs, AssignArgs>;

inline constexpr uint32_t kGemvTokensMax = 8;  // more go through tiles, or a library

// A Runner has template <typename Kernel> void Run(GridSize, uint32_t shared_bytes, const Args&).
// Grids without blocks are not launched.

template <typename E, typename Runner>
void DispatchAttend(Runner& runner, GridSize grid, const AttendArgs& args) {
  switch (args.head_dim) {
    case 64:
      return runner.template Run<AttendKernel<E, 64>>(grid, AttendKernel<E, 64>::kSharedBytes,
                                                      args);
    case 80:
      return runner.template Run<AttendKernel<E, 80>>(grid, AttendKernel<E, 80>::kSharedBytes,
                                                      args);
    case 96:
      return runner.template Run<AttendKernel<E, 96>>(grid, AttendKernel<E, 96>::kSharedBytes,
                                                      args);
    case 128:
      return runner.template Run<AttendKernel<E, 128>>(grid, AttendKernel<E, 128>::kSharedBytes,
                                                       args);
    case 256:
      return runner.template Run<AttendKernel<E, 256>>(grid, AttendKernel<E, 256>::kSharedBytes,
                                                       args);
    default:
      return runner.template Run<AttendScalarKernel>(grid, 0, args);
  }
}

template <typename Runner>
void Dispatch(Runner& runner, const AttendArgs& args) {
  const GridSize grid{args.task_count, args.splits};
  if (args.dtype == DType::kF16) return DispatchAttend<F16Rows>(runner, grid, args);
  if (args.dtype == DType::kBF16) return DispatchAttend<BF16Rows>(runner, grid, args);
  runner.template Run<AttendScalarKernel>(grid, 0, args);
}

template <typename Runner>
void Dispatch(Runner& runner, const MergeArgs& args) {
  runner.template Run<MergeKernel>({args.heads, 1}, 0, args);
}

template <typename Runner>
void Dispatch(Runner& runner, const MergeHeadsArgs& args) {
  runner.template Run<MergeHeadsKernel>({args.head_count, 1}, 0, args);
}

template <typename Runner>
void Dispatch(Runner& runner, const CopyArgs& args) {
  runner.template Run<CopyKernel>({args.count, 1}, 0, args);
}

template <typename Runner>
void Dispatch(Runner& runner, const VerifyArgs& args) {
  runner.template Run<VerifyKernel>({args.count, 1}, VerifyKernel::kSharedBytes, args);
}

template <typename Runner>
void Dispatch(Runner& runner, const NormArgs& args) {
  runner.template Run<NormKernel>({args.rows, 1}, NormKernel::kSharedBytes, args);
}

template <typename Runner>
void Dispatch(Runner& runner, const RopeArgs& args) {
  runner.template Run<RopeKernel>({args.tokens, 1}, RopeKernel::kSharedBytes, args);
}

inline uint32_t BlocksFor(uint64_t elements, uint32_t each) {
  return static_cast<uint32_t>((elements + each - 1) / each);
}

template <typename Runner>
void Dispatch(Runner& runner, const SwiGluArgs& args) {
  const uint64_t count = uint64_t{args.tokens} * args.count;
  runner.template Run<SwiGluKernel>({BlocksFor(count, SwiGluKernel::kThreads), 1}, 0, args);
}

template <typename Runner>
void Dispatch(Runner& runner, const ConvertArgs& args) {
  runner.template Run<ConvertKernel>({BlocksFor(args.count, ConvertKernel::kThreads), 1}, 0, args);
}

template <typename Runner>
void Dispatch(Runner& runner, const GemmArgs& args) {
  if (args.tokens == 1) {
    const uint32_t blocks = BlocksFor(args.rows, GemvKernel<1>::kRowsPerBlock);
    return runner.template Run<GemvKernel<1>>({blocks, 1}, 0, args);
  }
  if (args.tokens <= kGemvTokensMax) {
    using Kernel = GemvKernel<kGemvTokensMax>;
    return runner.template Run<Kernel>({BlocksFor(args.rows, Kernel::kRowsPerBlock), 1}, 0, args);
  }
  runner.template Run<GemmTileKernel>(
      {BlocksFor(args.rows, GemmTileKernel::kTile), BlocksFor(args.tokens, GemmTileKernel::kTile)},
      GemmTileKernel::kSharedBytes, args);
}

template <typename Runner>
void Dispatch(Runner& runner, const SampleArgs& args) {
  runner.template Run<SampleKernel>({args.rows, 1}, SampleKernel::kSharedBytes, args);
}

template <typename Runner>
void Dispatch(Runner& runner, const AssignArgs& args) {
  const GridSize grid{args.tile_count, 1};
  if (args.few == 1) {
    return runner.template Run<AssignKernel<1>>(grid, AssignKernel<1>::kSharedBytes, args);
  }
  runner.template Run<AssignKernel<16>>(grid, AssignKernel<16>::kSharedBytes, args);
}

}  // namespace icecache::gpu
