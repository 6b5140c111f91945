#include "worker/model/prefill_attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/distance.h"
#include "worker/model/compute_threads.h"
#include "worker/model/gemm.h"

namespace icecache {
namespace {

// 256 rows x 256 keys of scores are 256 KiB: they stay in a core's L2 between the two products.
constexpr uint32_t kTileRows = 256;  // query rows of a tile: tokens x query heads of one kv head
constexpr uint32_t kTileKeys = 256;

struct Tile {
  std::vector<float> q;       // [rows, head_dim]
  std::vector<float> scores;  // [rows, kTileKeys]
  std::vector<float> out;     // [rows, head_dim]
  std::vector<float> max;     // [rows]
  std::vector<float> denom;   // [rows]
};

class BlockRunner {
 public:
  BlockRunner(const ModelShape& shape, const CausalBlock& block, ComputeThreads& threads)
      : shape_(shape),
        block_(block),
        tile_tokens_(std::max(1u, kTileRows / shape.group())),
        tile_count_((block.tokens + tile_tokens_ - 1) / tile_tokens_),
        threads_(threads),
        tiles_(threads.count()) {}

  Status Run(const ProgressFn& progress) {
    std::atomic<uint64_t> done = 0;
    std::atomic<bool> stop = false;
    uint64_t reported = 0;
    const uint64_t total = uint64_t{tile_count_} * shape_.kv_heads;
    threads_.For(static_cast<uint32_t>(total), [&](uint32_t index, uint32_t thread) {
      if (stop) return;
      // Last queries first: they see the most keys, and small tiles fill the end evenly.
      RunTile(index % shape_.kv_heads, tile_count_ - 1 - index / shape_.kv_heads, tiles_[thread]);
      const uint64_t now = ++done;
      if (thread != 0 || !progress || now == total) return;
      reported = now;
      if (!progress(now, total)) stop = true;
    });
    if (!stop && progress && reported < total && !progress(total, total)) stop = true;
    return stop ? Cancelled("prefill attention: stopped by its caller") : OkStatus();
  }

 private:
  void RunTile(uint32_t kv_head, uint32_t tile_index, Tile& tile);
  void LoadQueries(uint32_t kv_head, uint32_t first, uint32_t tokens, Tile& tile);
  void AddKeys(uint32_t kv_head, uint32_t first, uint32_t tokens, uint32_t key_begin,
               uint32_t key_count, Tile& tile);
  void Store(uint32_t kv_head, uint32_t first, uint32_t tokens, const Tile& tile);

  const ModelShape& shape_;
  const CausalBlock& block_;
  const uint32_t tile_tokens_;
  const uint32_t tile_count_;
  ComputeThreads& threads_;
  std::vector<Tile> tiles_;  // one per thread
};

void BlockRunner::RunTile(uint32_t kv_head, uint32_t tile_index, Tile& tile) {
  const uint32_t first = tile_index * tile_tokens_;
  const uint32_t tokens = std::min(tile_tokens_, block_.tokens - first);
  LoadQueries(kv_head, first, tokens, tile);
  const uint32_t key_end = block_.past + first + tokens;
  for (uint32_t key = 0; key < key_end; key += kTileKeys) {
    AddKeys(kv_head, first, tokens, key, std::min(kTileKeys, key_end - key), tile);
  }
  Store(kv_head, first, tokens, tile);
}

void BlockRunner::LoadQueries(uint32_t kv_head, uint32_t first, uint32_t tokens, Tile& tile) {
  const size_t group_floats = size_t{shape_.group()} * shape_.head_dim;
  const size_t token_floats = size_t{shape_.query_heads} * shape_.head_dim;
  const size_t rows = size_t{tokens} * shape_.group();
  tile.q.resize(rows * shape_.head_dim);
  tile.scores.resize(rows * kTileKeys);
  tile.out.assign(rows * shape_.head_dim, 0.0f);
  tile.max.assign(rows, -std::numeric_limits<float>::infinity());
  tile.denom.assign(rows, 0.0f);
  for (uint32_t t = 0; t < tokens; ++t) {
    std::memcpy(tile.q.data() + t * group_floats,
                block_.q + (first + t) * token_floats + kv_head * group_floats,
                group_floats * sizeof(float));
  }
}

void BlockRunner::AddKeys(uint32_t kv_head, uint32_t first, uint32_t tokens, uint32_t key_begin,
                          uint32_t key_count, Tile& tile) {
  const uint32_t head_dim = shape_.head_dim;
  const uint32_t rows = tokens * shape_.group();
  const size_t key_floats = size_t{shape_.kv_heads} * head_dim;
  const size_t offset = key_begin * key_floats + size_t{kv_head} * head_dim;
  MultiplyTransposed(rows, key_count, head_dim, tile.q.data(), head_dim, block_.k + offset,
                     key_floats, tile.scores.data(), kTileKeys);
  for (uint32_t row = 0; row < rows; ++row) {
    float* scores = tile.scores.data() + size_t{row} * kTileKeys;
    const uint32_t visible_end = block_.past + first + row / shape_.group() + 1;
    const uint32_t visible =
        visible_end <= key_begin ? 0 : std::min(key_count, visible_end - key_begin);
    std::fill(scores + visible, scores + key_count, 0.0f);  // weights of what lies in the future
    if (visible == 0) continue;
    const float max = std::max(tile.max[row], MaxOf(scores, visible));
    if (max > tile.max[row] && tile.denom[row] > 0) {
      const float shrink = std::exp(tile.max[row] - max);
      tile.denom[row] *= shrink;
      float* out = tile.out.data() + size_t{row} * head_dim;
      for (uint32_t d = 0; d < head_dim; ++d) out[d] *= shrink;
    }
    tile.max[row] = max;
    tile.denom[row] += ExpShifted(scores, visible, max, scores);
  }
  MultiplyAdd(rows, head_dim, key_count, tile.scores.data(), kTileKeys, block_.v + offset,
              key_floats, tile.out.data(), head_dim);
}

void BlockRunner::Store(uint32_t kv_head, uint32_t first, uint32_t tokens, const Tile& tile) {
  const uint32_t group = shape_.group();
  const uint32_t head_dim = shape_.head_dim;
  for (uint32_t t = 0; t < tokens; ++t) {
    float* out =
        block_.out + (size_t{first + t} * shape_.query_heads + size_t{kv_head} * group) * head_dim;
    for (uint32_t g = 0; g < group; ++g) {
      const size_t row = size_t{t} * group + g;
      const float scale = 1.0f / tile.denom[row];
      for (uint32_t d = 0; d < head_dim; ++d) {
        out[size_t{g} * head_dim + d] = tile.out[row * head_dim + d] * scale;
      }
    }
  }
}

}  // namespace

Status CausalAttention(const ModelShape& shape, const CausalBlock& block, uint32_t threads,
                       const ProgressFn& progress) {
  KV_RETURN_IF_ERROR(shape.Validate());
  if (uint64_t{block.past} + block.tokens > limits::kContextTokensMax) {
    return InvalidArgument(
        "prefill attention: " + std::to_string(uint64_t{block.past} + block.tokens) +
        " tokens, expected at most " + std::to_string(limits::kContextTokensMax));
  }
  if (block.tokens == 0) return OkStatus();
  ComputeThreads crew(threads);
  return BlockRunner(shape, block, crew).Run(progress);
}

}  // namespace icecache
