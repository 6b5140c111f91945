#include "cacheserver/select/cluster_tree_variants.h"

#include <utility>

#include "cacheserver/select/cluster_tree.h"

namespace icecache {
namespace {

// A ClusterTree that is asked for less. Its image is a ClusterTree's: the structure is the same.
class AskedForLess final : public SelectionPolicy {
 public:
  AskedForLess(std::unique_ptr<SelectionPolicy> tree, bool residual, bool reread)
      : tree_(std::move(tree)), residual_(residual), reread_(reread) {}

  Result<PageLayout> Build(const TokenRows& rows, const BuildHints& hints) override {
    return tree_->Build(rows, hints);
  }
  Result<InsertPlan> Insert(const TokenRows& row, const PagedKv& pages) override {
    return tree_->Insert(row, pages);
  }
  void Select(const SelectRequest& request, const PagedKv& pages, Selection* out) const override {
    SelectRequest less = request;
    less.residual = less.residual && residual_;
    if (!reread_) less.read_cap = 0;
    tree_->Select(less, pages, out);
  }
  Status Retain(std::span<const uint16_t> keep_masks, const PagedKv& pages) override {
    return tree_->Retain(keep_masks, pages);
  }
  void Save(std::string* image) const override { tree_->Save(image); }
  Status Restore(std::string_view image) override { return tree_->Restore(image); }
  Status Validate(const PagedKv& pages) const override { return tree_->Validate(pages); }
  void VisitCounters(const CounterVisitor& visit) const override { tree_->VisitCounters(visit); }

 private:
  const std::unique_ptr<SelectionPolicy> tree_;
  const bool residual_, reread_;
};

}  // namespace

std::unique_ptr<SelectionPolicy> MakeRandomPages(const PolicyOptions& options) {
  return MakeClusterTree(options, {.layout = ClusterTreeOptions::Layout::kRandom});
}

std::unique_ptr<SelectionPolicy> MakeSequentialPages(const PolicyOptions& options) {
  return MakeClusterTree(options, {.layout = ClusterTreeOptions::Layout::kSequential});
}

std::unique_ptr<SelectionPolicy> MakeTreeNoResidual(const PolicyOptions& options) {
  return std::make_unique<AskedForLess>(MakeClusterTree(options), false, true);
}

std::unique_ptr<SelectionPolicy> MakeTreeNoRerank(const PolicyOptions& options) {
  return std::make_unique<AskedForLess>(MakeClusterTree(options), true, false);
}

}  // namespace icecache
