#include "kernels/gpu/assigner_gpu.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/gpu/aligned.h"
#include "kernels/memory.h"

namespace icecache::gpu {
namespace {

// The parts of one piece of memory, one after the other.
class Parts {
 public:
  // The offset of `count` of T.
  template <typename T>
  size_t Add(size_t count) {
    const size_t at = bytes_;
    bytes_ += Aligned(count * sizeof(T));
    return at;
  }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_ = 0;
};

class GpuAssigner final : public PointAssigner {
 public:
  explicit GpuAssigner(Device& device) : device_(device) {}

  Status Load(const BytePoints& points, size_t count) override {
    dim_ = points.dim;
    ScratchVector<float> x(count * dim_);
    for (size_t i = 0; i < count; ++i) DecodePoint(points, i, x.data() + i * dim_);
    const size_t bytes = x.size() * sizeof(float);
    KV_RETURN_IF_ERROR(DeviceMemory::Grow(device_, MemoryKind::kDevice, bytes, &points_));
    device_.Copy(points_.data(), x.data(), bytes);
    return device_.Synchronize();  // before x goes
  }

  Status Assign(std::span<const AssignTask> tasks) override {
    List(tasks);
    if (tiles_.empty()) return OkStatus();
    Parts parts;
    const size_t sets_at = parts.Add<AssignSet>(sets_.size());
    const size_t tiles_at = parts.Add<AssignTile>(tiles_.size());
    const size_t rows_at = parts.Add<uint32_t>(rows_);
    const size_t norms_at = parts.Add<float>(centroids_);
    const size_t centroids_at = parts.Add<float>(centroids_ * dim_);
    Parts results;
    const size_t best_at = results.Add<uint32_t>(best_);
    const size_t score_at = results.Add<float>(rows_);
    const auto grow = [&](MemoryKind kind, const Parts& of, DeviceMemory* memory) {
      return DeviceMemory::Grow(device_, kind, of.bytes(), memory);
    };
    KV_RETURN_IF_ERROR(grow(MemoryKind::kPinned, parts, &host_));
    KV_RETURN_IF_ERROR(grow(MemoryKind::kDevice, parts, &staged_));
    KV_RETURN_IF_ERROR(grow(MemoryKind::kPinned, results, &host_results_));
    KV_RETURN_IF_ERROR(grow(MemoryKind::kDevice, results, &results_));
    std::memcpy(host_.data(sets_at), sets_.data(), sets_.size() * sizeof(AssignSet));
    std::memcpy(host_.data(tiles_at), tiles_.data(), tiles_.size() * sizeof(AssignTile));
    for (size_t t = 0; t < tasks.size(); ++t) {
      const AssignTask& task = tasks[t];
      std::copy(task.rows.begin(), task.rows.end(),
                host_.data<uint32_t>(rows_at) + sets_[t].row_begin);
      const size_t first = sets_[t].centroid_begin;
      std::copy_n(task.centroids, size_t{task.count} * dim_,
                  host_.data<float>(centroids_at) + first * dim_);
      for (uint32_t c = 0; c < task.count; ++c) {
        const float* const x = task.centroids + size_t{c} * dim_;
        float norm = 0;
        for (uint32_t j = 0; j < dim_; ++j) norm += x[j] * x[j];
        host_.data<float>(norms_at)[first + c] = norm / 2;
      }
    }
    device_.Copy(staged_.data(), host_.data(), parts.bytes());
    AssignArgs args;
    args.points = points_.data<float>();
    args.rows = staged_.data<uint32_t>(rows_at);
    args.centroids = staged_.data<float>(centroids_at);
    args.half_norms = staged_.data<float>(norms_at);
    args.sets = staged_.data<AssignSet>(sets_at);
    args.tiles = staged_.data<AssignTile>(tiles_at);
    args.best = results_.data<uint32_t>(best_at);
    args.score = results_.data<float>(score_at);
    args.dim = dim_;
    args.tile_count = static_cast<uint32_t>(tiles_.size());
    args.few = few_;
    device_.Launch(args);
    device_.Copy(host_results_.data(), results_.data(), results.bytes());
    KV_RETURN_IF_ERROR(device_.Synchronize());
    for (size_t t = 0; t < tasks.size(); ++t) {
      const AssignTask& task = tasks[t];
      std::copy_n(host_results_.data<uint32_t>(best_at) + sets_[t].best_begin,
                  task.rows.size() * task.few, task.best);
      if (task.score == nullptr) continue;
      std::copy_n(host_results_.data<float>(score_at) + sets_[t].row_begin, task.rows.size(),
                  task.score);
    }
    return OkStatus();
  }

 private:
  void List(std::span<const AssignTask> tasks) {
    sets_.clear();
    tiles_.clear();
    rows_ = centroids_ = best_ = 0;
    few_ = 1;
    for (const AssignTask& task : tasks) {
      KV_CHECK(task.few >= 1 && task.few <= std::min(task.count, kAssignFewMax));
      KV_CHECK(task.score == nullptr || task.few == 1);
      const auto count = static_cast<uint32_t>(task.rows.size());
      for (uint32_t first = 0; first < count; first += kAssignTileRows) {
        tiles_.push_back({static_cast<uint32_t>(sets_.size()), first});
      }
      sets_.push_back({rows_, count, centroids_, task.count, task.few, best_});
      rows_ += count;
      centroids_ += task.count;
      best_ += count * task.few;
      few_ = std::max(few_, task.few);
    }
  }

  Device& device_;
  uint32_t dim_ = 0;
  DeviceMemory points_;
  DeviceMemory host_, staged_;           // of a batch: pinned, and the same on the device
  DeviceMemory host_results_, results_;  // likewise
  // Of the batch at hand.
  std::vector<AssignSet> sets_;
  std::vector<AssignTile> tiles_;
  uint32_t rows_ = 0, centroids_ = 0, best_ = 0, few_ = 1;
};

}  // namespace

std::unique_ptr<PointAssigner> MakeGpuAssigner(Device& device) {
  return std::make_unique<GpuAssigner>(device);
}

}  // namespace icecache::gpu
