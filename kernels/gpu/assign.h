// Nearest centroids as a product of matrices: points against the centroids of their task, with the
// best few kept on the way. PointAssigner's kernel (assigner_gpu.h).
//
// A block takes up to 128 points of one task, a point per thread; 32 centroids at a time meet them,
// 16 dimensions at a time through shared memory, and a thread's 32 sums stay in registers. 32
// multiply-adds per 4 bytes of a point, which is read once per 32 centroids.
#pragma once

#include "kernels/gpu/block.h"

namespace icecache::gpu {

struct AssignSet {
  uint32_t row_begin = 0;  // of rows, and of score
  uint32_t row_count = 0;
  uint32_t centroid_begin = 0;  // of centroids and half_norms
  uint32_t centroid_count = 0;
  uint32_t few = 1;
  uint32_t best_begin = 0;  // of best
};

// What a block does: up to kAssignTileRows points of a set.
struct AssignTile {
  uint32_t set = 0;
  uint32_t first = 0;
};

struct AssignArgs {
  const float* points = nullptr;      // [points, dim]
  const uint32_t* rows = nullptr;     // of the points
  const float* centroids = nullptr;   // [centroids, dim]
  const float* half_norms = nullptr;  // |c|^2 / 2
  const AssignSet* sets = nullptr;
  const AssignTile* tiles = nullptr;
  uint32_t* best = nullptr;
  float* score = nullptr;  // of sets with few == 1
  uint32_t dim = 0;        // a multiple of 16
  uint32_t tile_count = 0;
  uint32_t few = 1;  // the largest of a set
};
inline constexpr uint32_t kAssignTileRows = 128;

// kFew: room for that many nearest.
template <uint32_t kFew>
struct AssignKernel {
  using Args = AssignArgs;
  static constexpr uint32_t kThreads = kAssignTileRows;
  static constexpr uint32_t kMinBlocks = 4;
  static constexpr uint32_t kCentroids = 32;
  static constexpr uint32_t kDims = 16;
  static constexpr uint32_t kSharedBytes = kCentroids * kDims * 4;

  // Keeps the best of `few`, best first. Centroids come in ascending order, so that a later equal
  // one goes behind.
  KV_GPU static void Keep(float score, uint32_t centroid, uint32_t few, float (&scores)[kFew],
                          uint32_t (&best)[kFew]) {
    bool moved = false;  // what was moved goes before its equals
    KV_UNROLL
    for (uint32_t i = 0; i < kFew; ++i) {
      moved |= score > scores[i];
      if (i >= few || !moved) continue;
      const float s = scores[i];
      const uint32_t c = best[i];
      scores[i] = score;
      best[i] = centroid;
      score = s;
      centroid = c;
    }
  }

  template <typename Block>
  KV_GPU static void Run(Block& block, const AssignArgs& args) {
    float* const shared = block.template shared<float>();  // [kDims, kCentroids]
    const AssignTile tile = args.tiles[block.x()];
    const AssignSet set = args.sets[tile.set];
    const uint32_t row = tile.first + block.thread();
    const bool here = row < set.row_count;
    const float* const x =
        args.points + size_t{args.rows[set.row_begin + (here ? row : tile.first)]} * args.dim;
    float scores[kFew];
    uint32_t best[kFew];
    KV_UNROLL
    for (uint32_t i = 0; i < kFew; ++i) {
      scores[i] = -INFINITY;
      best[i] = 0;
    }
    for (uint32_t base = 0; base < set.centroid_count; base += kCentroids) {
      float sums[kCentroids] = {};
      for (uint32_t dim = 0; dim < args.dim; dim += kDims) {
        block.Sync();  // everybody is done with the last ones
        for (uint32_t i = block.thread(); i < kCentroids * kDims; i += kThreads) {
          const uint32_t centroid = base + i / kDims;
          shared[i % kDims * kCentroids + i / kDims] =
              centroid < set.centroid_count
                  ? args.centroids[size_t{set.centroid_begin + centroid} * args.dim + dim +
                                   i % kDims]
                  : 0.0f;
        }
        block.Sync();
        KV_UNROLL
        for (uint32_t j = 0; j < kDims; j += 4) {
          const auto four = Load<Words<4>>(x + dim + j);
          float xs[4];
          std::memcpy(xs, &four, sizeof(xs));
          KV_UNROLL
          for (uint32_t i = 0; i < 4; ++i) {
            KV_UNROLL
            for (uint32_t c = 0; c < kCentroids; ++c) {
              sums[c] += xs[i] * shared[(j + i) * kCentroids + c];
            }
          }
        }
      }
      KV_UNROLL
      for (uint32_t c = 0; c < kCentroids; ++c) {
        const uint32_t centroid = base + c;
        if (centroid >= set.centroid_count) continue;
        Keep(sums[c] - args.half_norms[set.centroid_begin + centroid], centroid, set.few, scores,
             best);
      }
    }
    if (!here) return;
    KV_UNROLL
    for (uint32_t i = 0; i < kFew; ++i) {
      if (i < set.few) args.best[set.best_begin + row * set.few + i] = best[i];
    }
    if (set.few == 1) args.score[set.row_begin + row] = scores[0];
  }
};

}  // namespace icecache::gpu
