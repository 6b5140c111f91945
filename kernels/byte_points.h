// Points as bytes, and the products packing consists of: which centroids are nearest to which
// points, projections on a line, sums.
//
// x_j = scale * (byte_j - 128) with scale = max|x| / 127 of the point. Keys inside a page differ by
// far more than that rounding, and a byte takes a quarter of the memory, and of the time to
// multiply, of a float: the table of 131,072 points of 128 dimensions takes 17 MB, near a
// third-level cache.
//
// argmin |x - c|^2 = argmax x.c - |c|^2 / 2: centroids are rounded to seven bits and packed in
// panels of 16 columns; a few points meet a panel or two in registers. Products are integers, the
// same on every instruction set; what is computed from them has one order everywhere.
// dim is a multiple of 16 throughout. Any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace icecache {

inline constexpr uint32_t kNearestFewMax = 16;

// Some points of a table: the r-th is point (ids == nullptr ? r : ids[r]).
struct BytePoints {
  const uint8_t* bytes = nullptr;  // [points, dim]
  const float* scale = nullptr;    // [points]
  uint32_t dim = 0;
  const uint32_t* ids = nullptr;

  size_t index(size_t r) const { return ids == nullptr ? r : size_t{ids[r]}; }
  const uint8_t* row(size_t r) const { return bytes + index(r) * dim; }
};

// Writes x[dim], finite, as bytes[dim] and returns the scale.
float EncodePoint(const float* x, uint32_t dim, uint8_t* bytes);
// x[dim] = point r.
void DecodePoint(const BytePoints& points, size_t r, float* x);

// Centroids ready for the functions below. Assign keeps the memory.
class BytePanels {
 public:
  static constexpr uint32_t kColumns = 16;
  struct Columns {
    int32_t start[kColumns];  // of a product with bytes that are 128 too large
    float scale[kColumns];
    float
        bias[kColumns];  // -|c|^2 / 2 of the rounded centroid; the lowest float where there is none
  };
  // centroids[count, dim]; count >= 1.
  void Assign(const float* centroids, uint32_t count, uint32_t dim);

  uint32_t count() const { return count_; }
  uint32_t dim() const { return dim_; }
  uint32_t panel_count() const { return static_cast<uint32_t>(columns_.size()); }
  const int8_t* panel(uint32_t i) const { return bytes_.data() + size_t{i} * kColumns * dim_; }
  const Columns& columns(uint32_t i) const { return columns_[i]; }

 private:
  uint32_t count_ = 0, dim_ = 0;
  std::vector<int8_t> bytes_;  // [panels][dim / 4][16][4]
  std::vector<Columns> columns_;
};

// best[r] = index of the centroid nearest to point r (the lowest of equals), for r in [0, count).
// score[r] = x.c - |c|^2 / 2 of it, when score is not null.
void Nearest(const BytePanels& panels, const BytePoints& points, size_t count, uint32_t* best,
             float* score);

// The `few` nearest centroids of each point, nearest first, the lowest of equals before the others:
// best[r * few + i]. REQUIRES: 1 <= few <= min(panels.count(), kNearestFewMax).
void NearestFew(const BytePanels& panels, const BytePoints& points, size_t count, uint32_t few,
                uint32_t* best);

// out[r] = line[dim] . point r.
void ProjectPoints(const float* line, const BytePoints& points, size_t count, float* out);

// sums[into[r], dim] += point r; all into the first when into is null.
void AddPointsByIndex(const BytePoints& points, size_t count, const uint32_t* into, float* sums);

}  // namespace icecache
