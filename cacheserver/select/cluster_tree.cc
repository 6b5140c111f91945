#include "cacheserver/select/cluster_tree.h"

#include <utility>

#include "cacheserver/select/cluster_tree_internal.h"

namespace icecache {
namespace {

class ClusterTree final : public SelectionPolicy {
 public:
  ClusterTree(const PolicyOptions& options, const ClusterTreeOptions& tree_options)
      : options_(options), tree_options_(tree_options), tree_(options.head_dim) {
    KV_CHECK(options.head_dim >= 32 && options.head_dim <= limits::kHeadDimMax &&
             options.head_dim % 16 == 0);
  }

  Result<PageLayout> Build(const TokenRows& rows, const BuildHints& hints) override {
    return cluster_tree::Build(rows, hints, tree_options_, options_.seed, &tree_);
  }
  Result<InsertPlan> Insert(const TokenRows& row, const PagedKv& pages) override {
    return cluster_tree::Insert(row, pages, tree_options_, &tree_);
  }
  void Select(const SelectRequest& request, const PagedKv& pages, Selection* out) const override {
    cluster_tree::Select(tree_, tree_options_, request, pages, out);
  }
  Status Retain(std::span<const uint16_t> keep_masks, const PagedKv& pages) override {
    return cluster_tree::Retain(keep_masks, pages, &tree_);
  }
  void Save(std::string* image) const override { cluster_tree::Save(tree_, options_, image); }
  Status Restore(std::string_view image) override {
    return cluster_tree::Restore(image, options_, &tree_);
  }
  Status Validate(const PagedKv& pages) const override {
    return cluster_tree::Validate(tree_, options_, pages);
  }

  void VisitCounters(const CounterVisitor& visit) const override {
    const auto pages = static_cast<double>(tree_.page_count());
    visit("pages", pages);
    visit("tokens", static_cast<double>(tree_.tokens));
    visit("index_bytes", static_cast<double>(tree_.index_bytes()));
    visit("supers", static_cast<double>(tree_.super_count() - tree_.free_supers.size()));
    visit("page_fill",
          pages > 0 ? static_cast<double>(tree_.tokens) / (pages * limits::kPageTokens) : 0.0);
    visit("sketched", tree_.basis.sketched() ? 1.0 : 0.0);
    visit("page_spread_built", tree_.basis.page_spread);
    double moment = 0;  // pages get less pure as a slice grows: when it is time to cluster anew
    for (const cluster_tree::Page& page : tree_.pages) {
      moment +=
          double{tree_.leaves.spread[page.slot]} * tree_.leaves.spread[page.slot] * page.count;
    }
    visit("page_spread", tree_.tokens > 0 ? moment / static_cast<double>(tree_.tokens) : 0.0);
  }

 private:
  const PolicyOptions options_;
  const ClusterTreeOptions tree_options_;
  cluster_tree::Tree tree_;  // owner's thread while it grows, shared once sealed
};

}  // namespace

std::unique_ptr<SelectionPolicy> MakeClusterTree(const PolicyOptions& options,
                                                 const ClusterTreeOptions& tree_options) {
  return std::make_unique<ClusterTree>(options, tree_options);
}

}  // namespace icecache
