// Nearest-centroid assignment as a matrix product, for building the index.
//
// argmin |x - c|^2 = argmax x.c - |c|^2 / 2: centroids are packed in panels of 16 columns, six rows
// meet a panel in registers, and the best column is kept on the way, so that no score is ever
// stored. Runs near the peak of one core's fused multiply-adds for dim >= 32.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace icecache {

// Centroids ready for Nearest. Assign keeps the memory.
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

// best[r] = index of the centroid nearest to rows[r, dim] (the lowest of equals), for r in [0,
// row_count). score[r] = x.c - |c|^2 / 2 of it, when score is not null.
void Nearest(const CentroidPanels& panels, const float* rows, size_t row_stride, size_t row_count,
             uint32_t* best, float* score);

}  // namespace icecache
