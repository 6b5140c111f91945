// Points and bisection: tools of content packing (packing.cc), of no use outside it.
#pragma once

#include <random>
#include <span>
#include <vector>

#include "kernels/byte_points.h"
#include "kernels/memory.h"
#include "kernels/packing.h"

namespace icecache::packing {

using Rng = std::mt19937_64;

// Point i stands for token ids[i] where that means anything.
struct Points {
  uint32_t dim = 0;
  ScratchVector<uint32_t> ids;
  ScratchVector<uint8_t> bytes;
  ScratchVector<float> scale;

  uint32_t count() const { return static_cast<uint32_t>(scale.size()); }
  // Some of them, or all.
  BytePoints table(const uint32_t* rows = nullptr) const {
    return {bytes.data(), scale.data(), dim, rows};
  }
  // Becomes x[count, dim].
  void Encode(std::span<const float> x);
  void Decode(size_t i, float* x) const { DecodePoint(table(), i, x); }
};

// Turns stored rows into points: the metric's leading dimensions, then sketched values.
class Projection {
 public:
  // value_share > 0: values take part, scaled to that share of the keys' variance.
  Projection(const TokenRows& rows, const Basis& basis, float value_share, Rng& rng);
  uint32_t dim() const { return dim_; }
  // Fills points for points->ids.
  void Load(Points* points);

 private:
  void ChooseDims();
  void ChooseValues(float share, Rng& rng);
  void ProjectValue(size_t token, float* out);
  void LoadRow(uint32_t token, float* x);

  const TokenRows& rows_;
  const Basis& basis_;
  std::vector<float> buffer_, point_;
  std::vector<uint32_t> dims_;  // ascending; all of them when nothing is gained by leaving some out
  std::vector<float> factor_, signs_;
  float value_factor_ = 0;
  uint32_t value_dims_ = 0, dim_ = 0;
};

// Lloyd's iterations over points; returns centroids[count, dim], which start at points spread over
// the order. REQUIRES: 1 <= count <= points.count().
ScratchVector<float> TrainCentroids(const Points& points, uint32_t count, Rng& rng);

// Some numbers in groups, one after the other in one piece of memory.
struct Groups {
  std::vector<uint32_t> begin = {0};  // [groups + 1]
  ScratchVector<uint32_t> members;

  size_t size() const { return begin.size() - 1; }
  std::span<uint32_t> operator[](size_t g) {
    return {members.data() + begin[g], members.data() + begin[g + 1]};
  }
  std::span<const uint32_t> operator[](size_t g) const {
    return {members.data() + begin[g], members.data() + begin[g + 1]};
  }
};

// In each of `count` groups those of `numbers` (0, 1, ... when none are given) that belong to it,
// in order: number i belongs to the `each` groups from group_of[i * each] on.
Groups Group(std::span<const uint32_t> group_of, uint32_t count,
             std::span<const uint32_t> numbers = {}, uint32_t each = 1);

// Two-means over some rows of a set of points.
class Bisector {
 public:
  explicit Bisector(const Points& points) : points_(points) {}
  // Reorders rows: one side first, then the other; returns the size of the first, in [1, size).
  // align > 0: both sides but at most one are multiples of it. REQUIRES: rows.size() >= 2, > align.
  uint32_t Divide(std::span<uint32_t> rows, uint32_t align);

 private:
  void FarPoints(std::span<const uint32_t> rows, float* low, float* high);
  uint32_t Means(std::span<const uint32_t> rows, float middle, float* low, float* high);

  const Points& points_;
  std::vector<float> projection_, line_, means_;
  std::vector<uint32_t> side_, order_, spare_;
};

}  // namespace icecache::packing
