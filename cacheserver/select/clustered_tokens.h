// ClusteredTokens: what RetroInfer, ClusterKV and SqueezedAttention share: tokens belong to
// clusters of like keys, a query meets the centroids, whole clusters are chosen.
//
// Clusters are k-means in cosine space, as all three papers have it; centroids kept are plain means
// of the raw keys. Pages stay in order of arrival, so a cluster is a list of slots, not of pages.
// Between builds a new token joins the nearest cluster (largest cosine), whose mean moves along;
// the service clusters again after every 1,024 tokens. shared() is [mean
// key][centroids][sizes][values].
#pragma once

#include <vector>

#include "cacheserver/select/arrival_policy.h"
#include "cacheserver/select/budget_choice.h"

namespace icecache {

struct ClusteringOptions {
  uint32_t tokens_per_cluster = 16;
  uint32_t segment_tokens = 0;  // clusters form inside segments of so many tokens; 0: one segment
  uint32_t passes = 10;         // of k-means, the last over all segments' centroids
  bool centred = false;         // directions are seen from the mean key
  bool values = false;          // keep the mean value of each cluster
};

class ClusteredTokens : public ArrivalPolicy {
 protected:
  ClusteredTokens(PolicyKind kind, const PolicyOptions& options, const ClusteringOptions& how);

  uint32_t cluster_count() const;
  const float* centroids() const { return shared().data() + options().head_dim; }
  const float* sizes() const { return centroids() + size_t{cluster_count()} * options().head_dim; }
  const float* value(uint32_t cluster) const {
    return sizes() + cluster_count() + size_t{cluster} * options().head_dim;
  }
  // By slot; of holes it means nothing.
  const uint32_t* cluster_of() const { return records<uint32_t>(); }

  // logits[group][clusters] = q . centroid, plus log(size) if asked; -inf for a cluster without
  // tokens.
  void ScoreClusters(const SelectRequest& request, bool by_size, std::vector<float>* logits) const;
  // weight[slot] = the cluster's estimated softmax weight, shared out evenly among its tokens.
  void WeighTokens(const SelectRequest& request, std::vector<float>* weight) const;

 private:
  void Learn(const TokenRows& rows, const BuildHints& hints) final;
  void Encode(const TokenRows& rows, const BuildHints& hints, uint8_t* cells) final;
  void Kept(const PagedKv& kept) final;
  std::string Wrong() const final;

  float* mutable_centroid(uint32_t c) {
    return const_cast<float*>(centroids()) + size_t{c} * options().head_dim;
  }
  void Reset(uint32_t clusters);
  void Join(uint32_t cluster, const float* key, const float* value);
  uint32_t NearestCluster(const float* key) const;

  const ClusteringOptions how_;
  std::vector<uint32_t> assigned_;  // between Learn and Encode of a build
};

}  // namespace icecache
