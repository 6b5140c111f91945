#include "cacheserver/select/clusterkv.h"

#include "cacheserver/select/clustered_tokens.h"

namespace icecache {
namespace {

class ClusterKv final : public ClusteredTokens {
 public:
  explicit ClusterKv(const PolicyOptions& options)
      : ClusteredTokens(PolicyKind::kClusterKv, options, {.tokens_per_cluster = 80}) {}

  void Select(const SelectRequest& request, const PagedKv& kv, Selection* out) const override {
    thread_local std::vector<float> logits, cluster_rank, rank, weight;
    if (!Start(request, kv, out)) return;
    ScoreClusters(request, false, &logits);
    RankUnits(request, request.rank, logits, &cluster_rank);
    WeighTokens(request, &weight);
    rank.assign(slots(), 0.0f);
    for (uint32_t p = 0; p < page_count(); ++p)
      for (uint32_t r = 0; r < fill(p); ++r)
        rank[p * limits::kPageTokens + r] = cluster_rank[cluster_of()[p * limits::kPageTokens + r]];
    ChooseTokens(rank, weight, request, kv, out);
  }
};

}  // namespace

std::unique_ptr<SelectionPolicy> MakeClusterKv(const PolicyOptions& options) {
  return std::make_unique<ClusterKv>(options);
}

}  // namespace icecache
