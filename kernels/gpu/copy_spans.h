// Moves many pieces of memory in one launch: a landing buffer's rows into page frames (scatter), or
// pages from mapped host memory (gather over the bus, without a copy by the CPU).
//
// One block per span. Floor: bytes over the slower of both sides; 8 KiB pages keep four loads of 16
// bytes in flight per thread, which a bus needs.
#pragma once

#include "kernels/gpu/block.h"

namespace icecache::gpu {

struct CopySpan {
  const std::byte* from = nullptr;
  std::byte* to = nullptr;
  uint32_t bytes = 0;
};

struct CopyArgs {
  const CopySpan* spans = nullptr;
  uint32_t count = 0;
};

struct CopyKernel {
  using Args = CopyArgs;
  static constexpr uint32_t kThreads = 128;
  static constexpr uint32_t kMinBlocks = 8;
  static constexpr uint32_t kAhead = 4;

  template <typename T, typename Block>
  KV_GPU static void CopyAs(Block& block, const CopySpan& span) {
    const uint32_t count = span.bytes / static_cast<uint32_t>(sizeof(T));
    for (uint32_t base = block.thread(); base < count; base += kAhead * kThreads) {
      T words[kAhead] = {};
      KV_UNROLL
      for (uint32_t i = 0; i < kAhead; ++i) {
        const uint32_t at = base + i * kThreads;
        if (at < count) words[i] = Load<T>(span.from + size_t{at} * sizeof(T));
      }
      KV_UNROLL
      for (uint32_t i = 0; i < kAhead; ++i) {
        const uint32_t at = base + i * kThreads;
        if (at < count) Store(span.to + size_t{at} * sizeof(T), words[i]);
      }
    }
  }

  template <typename Block>
  KV_GPU static void Run(Block& block, const CopyArgs& args) {
    const CopySpan span = args.spans[block.x()];
    const uintptr_t all =
        reinterpret_cast<uintptr_t>(span.from) | reinterpret_cast<uintptr_t>(span.to) | span.bytes;
    if (all % 16 == 0) {
      CopyAs<Words<4>>(block, span);
    } else if (all % 4 == 0) {
      CopyAs<Words<1>>(block, span);
    } else {
      CopyAs<uint8_t>(block, span);
    }
  }
};

}  // namespace icecache::gpu
