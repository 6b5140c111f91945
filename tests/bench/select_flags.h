// The flags of icecache-bench select.
#pragma once

#include <string>

#include "cacheserver/select/cluster_tree.h"
#include "common/config.h"

namespace icecache {

// As given; the help texts are with AddTo.
struct SelectFlags {
  uint32_t keys = 32768, dim = 128, group = 4, budget_pages = 12, threads = 1, read_cap = 1024,
           queries = 32, repeats = 5, near = 0, builds = 0;
  uint64_t seed = 1;
  double insert_fraction = 0, group_spread = -1, min_mass = 0;
  std::string policy = "cluster_tree", trace = "clustered", dtype = "f16", rank = "mass_sum";
  std::string layout = "auto", sketch = "auto", proposed = "none";
  bool energy = true, json = false, dci_improved = false, profile = false;

  void AddTo(ConfigParser* parser);
  Result<ClusterTreeOptions> TreeOptions() const;
  Result<GroupRank> Rank() const;
  uint32_t Builds() const;
};

}  // namespace icecache
