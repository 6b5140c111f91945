// Nearest-centroid assignment as a matrix product, exact but for the rounding of f32. Packing has
// its own on bytes (byte_points.h).
//
// argmin |x - c|^2 = argmax x.c - |c|^2 / 2: centroids are packed in panels of 16 columns, a few
// rows meet a panel or two in registers, and the best column is kept on the way, so that no score
// need be stored. Runs near the peak of one core's fused multiply-adds for dim >= 32.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace icecache {

// Centroids ready for the functions below. Assign keeps the memory.
class CentroidPanels {
 public:
  // centroids[count, dim]; count >= 1.
  void Assign(const float* centroids, uint32_t count, uint32_t dim);

  uint32_t count() const { return count_; }
  uint32_t dim() const { return dim_; }
  const float* data() const { return data_.data(); }

 private:
  uint32_t count_ = 0, dim_ = 0;
  std::vector<float> data_;  // [panels][dim + 1][16]: -|c|^2 / 2 first, then the dimensions
};

// Rows of a table: row r is at base + stride * (ids == nullptr ? r : ids[r]).
struct RowTable {
  const float* base = nullptr;
  size_t stride = 0;
  const uint32_t* ids = nullptr;
};

// best[r] = index of the centroid nearest to row r (the lowest of equals), for r in [0, row_count).
// score[r] = x.c - |c|^2 / 2 of it, when score is not null.
void Nearest(const CentroidPanels& panels, const RowTable& rows, size_t row_count, uint32_t* best,
             float* score);

// sums[into[r], dim] += row r. dim is a multiple of 16.
void AddRowsByIndex(const RowTable& rows, size_t row_count, uint32_t dim, const uint32_t* into,
                    float* sums);

}  // namespace icecache
