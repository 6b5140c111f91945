#include "kernels/point_assigner.h"

#include "kernels/nearest.h"

namespace icecache {
namespace {

class CpuAssigner final : public PointAssigner {
 public:
  Status Load(std::span<const float> x, uint32_t dim) override {
    x_ = x;
    dim_ = dim;
    return OkStatus();
  }
  Status Assign(std::span<const AssignTask> tasks) override {
    for (const AssignTask& task : tasks) {
      const RowTable rows{x_.data(), dim_, task.rows.data()};
      panels_.Assign(task.centroids, task.count, dim_);
      if (task.few == 1) {
        Nearest(panels_, rows, task.rows.size(), task.best, task.score);
      } else {
        NearestFew(panels_, rows, task.rows.size(), task.few, task.best);
      }
    }
    return OkStatus();
  }

 private:
  std::span<const float> x_;
  uint32_t dim_ = 0;
  CentroidPanels panels_;
};

}  // namespace

std::unique_ptr<PointAssigner> MakeCpuAssigner() { return std::make_unique<CpuAssigner>(); }

}  // namespace icecache
