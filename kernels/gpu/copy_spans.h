// Moves many pieces of memory in one launch: a landing buffer's rows into page frames (scatter), or
// pages from mapped host memory (gather over the bus, without a copy by the CPU). A piece that is a
// page's int8 code is decoded on the way (kernels/int8_rows.h), to the bits that the CPU would
// write.
//
// One block per span. Floor: bytes over the slower of both sides; 8 KiB pages keep four loads of 16
// bytes in flight per thread, which a bus needs. Codes are read byte by byte, since their parts are
// aligned to 2: neighbouring threads read neighbouring bytes.
#pragma once

#include "common/limits.h"
#include "kernels/int8_layout.h"

namespace icecache::gpu {

struct CopySpan {
  const std::byte* from = nullptr;
  std::byte* to = nullptr;
  uint32_t bytes = 0;
  // rows > 0: `from` is an int8 code that has passed CheckInt8Rows; `to` is a page's frame, K rows
  // and then, kPageTokens rows on, V rows. Both aligned to 4.
  uint8_t rows = 0;
  DType dtype = DType::kF16;
  uint16_t dim = 0;
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
  KV_GPU static void DecodeRows(Block& block, const CopySpan& span) {
    const Int8Parts<const std::byte> none(span.from, span.dtype, span.rows, span.dim, 0);
    const uint32_t k_outliers = Load<uint8_t>(none.counts);
    const uint32_t outliers = k_outliers + Load<uint8_t>(none.counts + 1);
    const Int8Parts<const std::byte> code(span.from, span.dtype, span.rows, span.dim, outliers);
    const uint32_t row_bytes = span.dim * (span.dtype == DType::kF32 ? 4u : 2u);
    std::byte* const v = span.to + size_t{limits::kPageTokens} * row_bytes;
    const float largest = LargestOf(span.dtype);
    for (uint32_t i = block.thread(); i < uint32_t{span.rows} * span.dim; i += kThreads) {
      const uint32_t row = i / span.dim, channel = i % span.dim;
      const auto half_of = [&span](const std::byte* array, uint32_t index) {
        return 0.5f * LoadElement(array, span.dtype, index);
      };
      StoreElement(span.to, span.dtype, i,
                   DecodeInt8(half_of(code.k_min, channel), half_of(code.k_step, channel),
                              Load<uint8_t>(code.k_codes + i), largest));
      StoreElement(v, span.dtype, i,
                   DecodeInt8(half_of(code.v_min, row), half_of(code.v_step, row),
                              Load<uint8_t>(code.v_codes + i), largest));
    }
    block.Sync();  // then the outliers' channels, over what was decoded there
    const uint32_t halves = row_bytes / span.dim / 2;  // their elements are aligned to 2
    for (uint32_t i = block.thread(); i < outliers * span.rows * halves; i += kThreads) {
      const uint32_t element = i / halves, row = element % span.rows, outlier = element / span.rows;
      const uint32_t channel = Load<uint8_t>(code.channels + outlier);
      std::byte* const to = (outlier < k_outliers ? span.to : v) + size_t{row} * row_bytes;
      Store(to + 2 * (channel * halves + i % halves), Load<uint16_t>(code.columns + 2 * i));
    }
  }

  template <typename Block>
  KV_GPU static void Run(Block& block, const CopyArgs& args) {
    const CopySpan span = args.spans[block.x()];
    const uintptr_t all =
        reinterpret_cast<uintptr_t>(span.from) | reinterpret_cast<uintptr_t>(span.to) | span.bytes;
    if (span.rows > 0) {
      DecodeRows(block, span);
    } else if (all % 16 == 0) {
      CopyAs<Words<4>>(block, span);
    } else if (all % 4 == 0) {
      CopyAs<Words<1>>(block, span);
    } else {
      CopyAs<uint8_t>(block, span);
    }
  }
};

}  // namespace icecache::gpu
