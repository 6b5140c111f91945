// y = x W^T for weights as Linear layers store them, with f32 activations and sums.
//
// Few tokens (decode): one warp reads whole weight rows once and multiplies them with all tokens,
// bound by memory: rows * cols * bytes over bandwidth. Many tokens without a library: tiles through
// shared memory, f32 arithmetic; an order of magnitude below tensor cores, exact like the CPU.
#pragma once

#include "kernels/gpu/block.h"

namespace icecache::gpu {

struct GemmArgs {
  const float* x = nullptr;      // [tokens, cols]; 16-byte aligned
  const std::byte* w = nullptr;  // [rows, cols] of w_dtype; 16-byte aligned
  const float* bias = nullptr;   // [rows], or null
  float* y = nullptr;            // [tokens, rows]
  DType w_dtype = DType::kF32;
  uint32_t tokens = 0;
  uint32_t rows = 0;
  uint32_t cols = 0;
  bool add = false;  // to y instead of writing it
};

KV_GPU void StoreProduct(const GemmArgs& args, uint32_t token, uint32_t row, float sum) {
  if (args.bias != nullptr) sum += args.bias[row];
  float& y = args.y[size_t{token} * args.rows + row];
  y = args.add ? y + sum : sum;
}

// kTokens: 1, or up to so many. A warp has kRows weight rows, so that x, which comes from the
// caches, is read a quarter as often when there is much of it.
template <uint32_t kTokens>
struct GemvKernel {
  using Args = GemmArgs;
  static constexpr uint32_t kThreads = 128;
  static constexpr uint32_t kMinBlocks = kTokens == 1 ? 8 : 3;
  static constexpr uint32_t kRows = kTokens == 1 ? 1 : 4;
  static constexpr uint32_t kRowsPerBlock = kRows * kThreads / kWarpLanes;
  static constexpr uint32_t kRun = 8;  // columns that a lane takes at once

  // Columns at .. at + 8 of a weight row. REQUIRES: 16-byte aligned.
  KV_GPU static void LoadRun(const GemmArgs& args, size_t at, float (&w)[kRun]) {
    if (args.w_dtype == DType::kF32) {
      const auto a = Load<Words<4>>(args.w + at * 4);
      const auto b = Load<Words<4>>(args.w + at * 4 + 16);
      memcpy(w, a.w, 16);
      memcpy(w + 4, b.w, 16);
      return;
    }
    const auto words = Load<Words<4>>(args.w + at * 2);
    const bool f16 = args.w_dtype == DType::kF16;
    KV_UNROLL
    for (uint32_t i = 0; i < kRun; ++i) {
      const uint32_t bits = words.w[i / 2] >> (i % 2 * 16) & 0xffff;
      w[i] = f16 ? WidenF16(bits) : WidenBF16(bits);
    }
  }

  KV_GPU static void AddRun(const GemmArgs& args, uint32_t first, uint32_t col,
                            float (&sums)[kRows][kTokens]) {
    float w[kRows][kRun];
    KV_UNROLL
    for (uint32_t r = 0; r < kRows; ++r) {
      if (first + r < args.rows) LoadRun(args, size_t{first + r} * args.cols + col, w[r]);
    }
    KV_UNROLL
    for (uint32_t t = 0; t < kTokens; ++t) {
      if (t >= args.tokens) break;
      float x[kRun];
      const auto* const from =
          reinterpret_cast<const std::byte*>(args.x + size_t{t} * args.cols + col);
      const auto a = Load<Words<4>>(from);
      const auto b = Load<Words<4>>(from + 16);
      memcpy(x, a.w, 16);
      memcpy(x + 4, b.w, 16);
      KV_UNROLL
      for (uint32_t r = 0; r < kRows; ++r) {
        if (first + r < args.rows) {
          KV_UNROLL
          for (uint32_t i = 0; i < kRun; ++i) sums[r][t] += w[r][i] * x[i];
        }
      }
    }
  }

  template <typename Block>
  KV_GPU static void Run(Block& block, const GemmArgs& args) {
    const uint32_t warps = kThreads / kWarpLanes;
    const uint32_t first = (block.x() * warps + block.warp()) * kRows;
    float sums[kRows][kTokens] = {};
    // Rows whose length breaks the alignment of the next one go by single elements.
    const uint32_t run_cols = args.cols % kRun == 0 ? args.cols : 0;
    for (uint32_t col = block.lane() * kRun; col < run_cols; col += kWarpLanes * kRun) {
      AddRun(args, first, col, sums);
    }
    for (uint32_t col = run_cols + block.lane(); col < args.cols; col += kWarpLanes) {
      KV_UNROLL
      for (uint32_t r = 0; r < kRows; ++r) {
        if (first + r >= args.rows) break;
        const float w = LoadElement(args.w, args.w_dtype, size_t{first + r} * args.cols + col);
        KV_UNROLL
        for (uint32_t t = 0; t < kTokens; ++t) {
          if (t < args.tokens) sums[r][t] += w * args.x[size_t{t} * args.cols + col];
        }
      }
    }
    KV_UNROLL
    for (uint32_t r = 0; r < kRows; ++r) {
      KV_UNROLL
      for (uint32_t t = 0; t < kTokens; ++t) {
        const float sum = LaneSum(block, sums[r][t], kWarpLanes);
        if (block.lane() == 0 && first + r < args.rows && t < args.tokens) {
          StoreProduct(args, t, first + r, sum);
        }
      }
    }
  }
};

// Tiles of 64 tokens x 64 weight rows, 16 columns at a time; a thread has 4 x 4 sums.
struct GemmTileKernel {
  using Args = GemmArgs;
  static constexpr uint32_t kThreads = 256;
  static constexpr uint32_t kMinBlocks = 2;
  static constexpr uint32_t kTile = 64;
  static constexpr uint32_t kCols = 16;
  static constexpr uint32_t kPitch = kTile + 1;
  static constexpr uint32_t kSharedBytes = 2 * kCols * kPitch * 4;

  template <typename Block>
  KV_GPU static void Run(Block& block, const GemmArgs& args) {
    float* const xs = block.template shared<float>();  // [kCols, kPitch]
    float* const ws = xs + kCols * kPitch;
    const uint32_t row0 = block.x() * kTile;
    const uint32_t token0 = block.y() * kTile;
    const uint32_t tx = block.thread() % 16;
    const uint32_t ty = block.thread() / 16;
    float sums[4][4] = {};
    for (uint32_t col0 = 0; col0 < args.cols; col0 += kCols) {
      for (uint32_t i = block.thread(); i < kTile * kCols; i += kThreads) {
        const uint32_t line = i / kCols;
        const uint32_t col = col0 + i % kCols;
        const bool in = col < args.cols;
        const bool has_x = in && token0 + line < args.tokens;
        const bool has_w = in && row0 + line < args.rows;
        xs[i % kCols * kPitch + line] =
            has_x ? args.x[size_t{token0 + line} * args.cols + col] : 0.0f;
        ws[i % kCols * kPitch + line] =
            has_w ? LoadElement(args.w, args.w_dtype, size_t{row0 + line} * args.cols + col) : 0.0f;
      }
      block.Sync();
      for (uint32_t c = 0; c < kCols; ++c) {
        float x[4], w[4];
        KV_UNROLL
        for (uint32_t i = 0; i < 4; ++i) {
          x[i] = xs[c * kPitch + ty + 16 * i];
          w[i] = ws[c * kPitch + tx + 16 * i];
        }
        KV_UNROLL
        for (uint32_t i = 0; i < 16; ++i) sums[i / 4][i % 4] += x[i / 4] * w[i % 4];
      }
      block.Sync();
    }
    KV_UNROLL
    for (uint32_t i = 0; i < 16; ++i) {
      const uint32_t token = token0 + ty + 16 * (i / 4);
      const uint32_t row = row0 + tx + 16 * (i % 4);
      if (token < args.tokens && row < args.rows)
        StoreProduct(args, token, row, sums[i / 4][i % 4]);
    }
  }
};

}  // namespace icecache::gpu
