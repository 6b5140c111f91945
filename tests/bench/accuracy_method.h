// What is compared: full KV, the per-head top-k oracle, and every SelectionPolicy with the ways to
// ask and build it.
//
// A method is written NAME[/OPTION]...: full, top_k, or a policy's name. Options of every policy:
//   strict         nothing beyond the returned pages is read exactly (read_cap=0)
//   read_cap=N     tokens read exactly beyond the pages, for the residual (1024)
//   plain          no residual: what is in no returned page is left out
//   mass=X         only as many pages as reach this share of the mass
//   rank=R         mass_sum, mass_max or max_token
//   recluster=N    rebuild a slice after so many tokens were added; 0: never (1024)
//   energy=E       what a rebuild is told of queries: recent ones, as a server does, or those
//                  before the build, or nothing (recent | build | none)
//   seed=N         of the index
//   reuse=N        layers share the selection (and the layout) of the last whose number N divides
//   dense=N        the first N layers attend to everything, as in the paper's runs (0)
// and of cluster_tree and dci_tree the fields of their options by name, such as
// cluster_tree/rerank_pages_max=48 or dci_tree/level1_ratio=0.03; dci_tree/reference: as the reference.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "cacheserver/select/cluster_tree.h"
#include "cacheserver/select/dci_tree.h"
#include "cacheserver/select/selection_policy.h"

namespace icecache {

struct AccuracyMethod {
  enum class Kind { kFull, kTopK, kPolicy };
  enum class Energy { kRecent, kBuild, kNone };

  std::string name;  // as written
  Kind kind = Kind::kPolicy;
  PolicyKind policy = PolicyKind::kClusterTree;
  uint32_t read_cap = 1024;
  bool residual = true;
  float min_mass = 0;
  GroupRank rank = GroupRank::kMassSum;
  uint32_t recluster = 1024;
  Energy energy = Energy::kRecent;
  uint32_t reuse = 1;
  uint32_t dense = 0;
  uint64_t seed = 1;
  bool custom = false;  // index options other than the defaults
  ClusterTreeOptions tree;
  DciTreeOptions dci;

  // Whether a layer behind the dense ones chooses for itself.
  bool leads(LayerId layer) const { return (layer.value - dense) % reuse == 0; }
  std::unique_ptr<SelectionPolicy> Make(DType dtype, uint32_t head_dim) const;
};

// INVALID_ARGUMENT naming the part that is not understood and what would be.
Result<AccuracyMethod> ParseAccuracyMethod(const std::string& text);

}  // namespace icecache
