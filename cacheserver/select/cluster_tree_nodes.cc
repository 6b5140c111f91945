// Summaries of pages and supers.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>

#include "cacheserver/select/cluster_tree_internal.h"
#include "kernels/distance.h"

namespace icecache::cluster_tree {

namespace {
constexpr size_t kChunkBytes = 8192;  // small enough for the tail segments of many contexts
constexpr float kEmptyLogCount = -std::numeric_limits<float>::infinity();
}  // namespace

void ChunkedRows::Free::operator()(uint8_t* p) const { std::free(p); }

ChunkedRows::ChunkedRows(size_t row_bytes) : row_bytes_(row_bytes) {
  shift_ = static_cast<size_t>(std::bit_width(std::max<size_t>(1, kChunkBytes / row_bytes)) - 1);
  mask_ = (size_t{1} << shift_) - 1;
}

void ChunkedRows::Resize(size_t row_count) {
  const size_t chunk_count = (row_count + mask_) >> shift_;
  const size_t bytes = ((row_bytes_ << shift_) + 63) / 64 * 64;
  chunks_.reserve(chunk_count);
  if (chunk_count < chunks_.size()) chunks_.resize(chunk_count);
  while (chunks_.size() < chunk_count) {
    auto* memory = static_cast<uint8_t*>(std::aligned_alloc(64, bytes));
    KV_CHECK(memory != nullptr);
    std::memset(memory, 0, bytes);
    chunks_.emplace_back(memory);
  }
  // Rows that went away and come back are new again.
  for (size_t i = row_count_; i < row_count; ++i) std::memset(row(i), 0, row_bytes_);
  row_count_ = row_count;
}

void NodeTable::Resize(uint32_t head_dim, uint32_t block_count_now) {
  const uint32_t before = block_count();
  keys.Resize(block_count_now);
  const size_t slots = size_t{block_count_now} * kBlockRows;
  scale.resize(slots);
  log_count.resize(slots);
  spread.resize(slots);
  square.resize(slots);
  for (uint32_t slot = before * kBlockRows; slot < slots; ++slot) Clear(head_dim, slot);
}

void NodeTable::Clear(uint32_t head_dim, uint32_t slot) {
  ClearBlockRow(head_dim, slot % kBlockRows, keys.row(slot / kBlockRows));
  scale[slot] = spread[slot] = square[slot] = 0;
  log_count[slot] = kEmptyLogCount;
}

size_t Tree::index_bytes() const {
  const auto table = [](const NodeTable& nodes) {
    return nodes.keys.allocated_bytes() + nodes.scale.size() * 4 * sizeof(float);
  };
  return table(leaves) + table(super_nodes) + values.allocated_bytes() +
         sketches.allocated_bytes() + super_values.allocated_bytes() + page_of_slot.size() * 4 +
         super_of_block.size() * 4 + (free_blocks.size() + free_supers.size()) * 4 +
         pages.size() * sizeof(Page) + supers.size() * sizeof(Super) +
         basis.mean.size() * 6 * sizeof(float);
}

void PageRows::Add(const Basis& basis, DType dtype, const std::byte* k, const std::byte* v_row) {
  KV_CHECK(count < kPageRows);
  float* to = z.data() + size_t{count} * dim;
  ToF32(k, dtype, dim, to);
  ToCoordinates(basis, to, to);
  ToF32(v_row, dtype, dim, v.data() + size_t{count} * dim);
  ++count;
}

void PageRows::AddPage(const Basis& basis, DType dtype, const PageView& page, uint32_t mask) {
  const size_t row_bytes = size_t{dim} * DTypeBytes(dtype);
  for (uint32_t r = 0; r < page.fill; ++r) {
    if ((mask >> r) & 1) Add(basis, dtype, page.k + r * row_bytes, page.v + r * row_bytes);
  }
}

void DecodeMean(const NodeTable& nodes, uint32_t dim, uint32_t slot, float* z) {
  int8_t row[limits::kHeadDimMax];
  UnpackBlockRow(nodes.keys.row(slot / kBlockRows), dim, slot % kBlockRows, row);
  for (uint32_t j = 0; j < dim; ++j) z[j] = nodes.scale[slot] * row[j];
}

namespace {

// Stores mean (in place: becomes the mean as quantised) and the numbers of a slot.
void WriteNode(const Basis& basis, uint32_t dim, uint32_t slot, uint32_t count, float* mean,
               NodeTable& nodes) {
  int8_t row[limits::kHeadDimMax];
  const float scale = QuantizeRow(mean, dim, row);
  PackBlockRow(row, dim, slot % kBlockRows, nodes.keys.row(slot / kBlockRows));
  float square[16] = {};
  for (uint32_t j = 0; j < dim; j += 16) {
    for (uint32_t i = 0; i < 16; ++i) {
      const float x = scale * row[j + i];
      mean[j + i] = x;
      square[i] += basis.weight[j + i] * x * x;
    }
  }
  float total = 0;
  for (float s : square) total += s;
  nodes.scale[slot] = scale;
  nodes.square[slot] = total;
  nodes.log_count[slot] = std::log(static_cast<float>(count));
}

void WriteSketch(Tree& tree, uint32_t page, const PageRows& rows, const float* mean,
                 const float* deviation) {
  const Basis& basis = tree.basis;
  const auto dims = static_cast<uint32_t>(basis.sketch_dims.size());
  alignas(64) float deltas[kPageRows * kSketchDimsMax];
  for (uint32_t r = 0; r < rows.count; ++r) {
    const float* z = rows.z.data() + size_t{r} * rows.dim;
    for (uint32_t i = 0; i < dims; ++i) {
      const uint32_t j = basis.sketch_dims[i];
      deltas[size_t{r} * dims + i] = z[j] - mean[j];
    }
  }
  float sketched = 0, all = 0;
  for (uint32_t j = 0; j < rows.dim; ++j) all += basis.weight[j] * deviation[j];
  for (uint32_t j : basis.sketch_dims) sketched += basis.weight[j] * deviation[j];
  tree.pages[page].sketch_scale = PackSketch(deltas, rows.count, dims, tree.sketches.row(page));
  tree.pages[page].rest_spread =
      std::sqrt(std::max(0.0f, all - sketched) / static_cast<float>(rows.count));
}

}  // namespace

void WritePage(Tree& tree, uint32_t page_index, const PageRows& rows) {
  const uint32_t dim = tree.head_dim;
  Page& page = tree.pages[page_index];
  KV_CHECK(rows.count >= 1 && rows.count <= kPageRows && page.slot != kNone);
  float mean[limits::kHeadDimMax], deviation[limits::kHeadDimMax];
  Moments(rows.z.data(), rows.count, dim, mean, deviation);
  page.count = rows.count;
  float spread = 0;
  for (uint32_t j = 0; j < dim; ++j) spread += tree.basis.weight[j] * deviation[j];
  tree.leaves.spread[page.slot] = std::sqrt(spread / static_cast<float>(rows.count));
  WriteNode(tree.basis, dim, page.slot, rows.count, mean, tree.leaves);
  if (tree.basis.sketched()) WriteSketch(tree, page_index, rows, mean, deviation);

  float value[limits::kHeadDimMax];
  Moments(rows.v.data(), rows.count, dim, value, nullptr);
  // Sums of values near the largest float are infinite: means saturate, the rows stay exact.
  for (uint32_t j = 0; j < dim; ++j)
    value[j] = std::clamp(value[j] - tree.basis.value_mean[j], -kValueMax, kValueMax);
  page.value_scale = QuantizeRow(value, dim, tree.values.signed_row(page_index));
}

void WriteSuper(Tree& tree, uint32_t super_index) {
  const uint32_t dim = tree.head_dim;
  Super& super = tree.supers[super_index];
  constexpr uint32_t kPagesMax = kSuperBlocksMax * kBlockRows;
  int8_t keys[kPagesMax][limits::kHeadDimMax];
  const int8_t* key_rows[kPagesMax];
  const int8_t* value_rows[kPagesMax];
  float key_weight[kPagesMax], value_weight[kPagesMax];
  uint32_t n = 0, tokens = 0;
  double moment = 0;  // sum of count * (variance + |mean|^2)
  for (uint32_t b = 0; b < super.block_count; ++b) {
    for (uint32_t lane = 0; lane < kBlockRows; ++lane) {
      const uint32_t slot = super.blocks[b] * kBlockRows + lane;
      if (tree.page_of_slot[slot] == kNone) continue;
      const Page& page = tree.pages[tree.page_of_slot[slot]];
      const auto count = static_cast<float>(page.count);
      UnpackBlockRow(tree.leaves.keys.row(super.blocks[b]), dim, lane, keys[n]);
      key_rows[n] = keys[n];
      value_rows[n] = tree.values.signed_row(tree.page_of_slot[slot]);
      key_weight[n] = count * tree.leaves.scale[slot];
      value_weight[n] = count * page.value_scale;
      moment +=
          count * (tree.leaves.spread[slot] * tree.leaves.spread[slot] + tree.leaves.square[slot]);
      tokens += page.count;
      ++n;
    }
  }
  super.page_count = n;
  super.token_count = tokens;
  if (n == 0) {
    tree.super_nodes.Clear(dim, super_index);
    return;
  }
  float key[limits::kHeadDimMax] = {}, value[limits::kHeadDimMax] = {};
  AddInt8Rows(key_weight, kPagesMax, 1, key_rows, n, dim, key);
  AddInt8Rows(value_weight, kPagesMax, 1, value_rows, n, dim, value);
  const float share = 1.0f / static_cast<float>(tokens);
  for (uint32_t j = 0; j < dim; ++j) key[j] *= share;
  for (uint32_t j = 0; j < dim; ++j) value[j] *= share;
  WriteNode(tree.basis, dim, super_index, tokens, key, tree.super_nodes);
  const double variance = moment / tokens - tree.super_nodes.square[super_index];
  tree.super_nodes.spread[super_index] = static_cast<float>(std::sqrt(std::max(0.0, variance)));
  super.value_scale = QuantizeRow(value, dim, tree.super_values.signed_row(super_index));
}

void FreeSuper(Tree& tree, uint32_t super_index) {
  Super& super = tree.supers[super_index];
  for (uint32_t b = 0; b < super.block_count; ++b) {
    tree.super_of_block[super.blocks[b]] = kNone;
    tree.free_blocks.push_back(super.blocks[b]);
  }
  super = Super();
  tree.super_nodes.Clear(tree.head_dim, super_index);
  tree.free_supers.push_back(super_index);
}

uint32_t AddSuper(Tree& tree) {
  if (!tree.free_supers.empty()) {
    const uint32_t reused = tree.free_supers.back();
    tree.free_supers.pop_back();
    return reused;
  }
  const auto index = static_cast<uint32_t>(tree.supers.size());
  tree.supers.emplace_back();
  tree.super_values.Resize(index + 1);
  tree.super_nodes.Resize(tree.head_dim, index / kBlockRows + 1);
  return index;
}

uint32_t TakeBlock(Tree& tree, uint32_t super_index) {
  Super& super = tree.supers[super_index];
  KV_CHECK(super.block_count < kSuperBlocksMax);
  uint32_t block;
  if (!tree.free_blocks.empty()) {
    block = tree.free_blocks.back();
    tree.free_blocks.pop_back();
  } else {
    block = tree.leaves.block_count();
    tree.leaves.Resize(tree.head_dim, block + 1);
    tree.page_of_slot.resize(size_t{block + 1} * kBlockRows, kNone);
    tree.super_of_block.push_back(kNone);
  }
  tree.super_of_block[block] = super_index;
  super.blocks[super.block_count++] = block;
  return block;
}

uint32_t TakeSlot(Tree& tree, uint32_t super_index, uint32_t page) {
  Super& super = tree.supers[super_index];
  const auto take = [&](uint32_t block) {
    for (uint32_t slot = block * kBlockRows; slot < (block + 1) * kBlockRows; ++slot) {
      if (tree.page_of_slot[slot] != kNone) continue;
      tree.page_of_slot[slot] = page;
      tree.pages[page].slot = slot;
      ++super.page_count;
      return true;
    }
    return false;
  };
  for (uint32_t b = 0; b < super.block_count; ++b) {
    if (take(super.blocks[b])) return tree.pages[page].slot;
  }
  KV_CHECK(take(TakeBlock(tree, super_index)));
  return tree.pages[page].slot;
}

void AddPages(Tree& tree, uint32_t page_count) {
  const size_t pages = tree.pages.size() + page_count;
  tree.pages.resize(pages);
  tree.values.Resize(pages);
  if (tree.basis.sketched()) tree.sketches.Resize(pages);
}

}  // namespace icecache::cluster_tree
