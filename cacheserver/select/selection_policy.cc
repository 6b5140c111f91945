#include "cacheserver/select/selection_policy.h"

#include <array>
#include <string>

#include "cacheserver/select/cluster_tree.h"
#include "cacheserver/select/dci_tree.h"
#include "cacheserver/select/exact.h"
#include "cacheserver/select/sequential.h"

namespace icecache {
namespace {
constexpr std::array kKinds = {PolicyKind::kClusterTree, PolicyKind::kDciTree, PolicyKind::kExact,
                               PolicyKind::kSequential};
}

std::string_view PolicyKindName(PolicyKind kind) {
  switch (kind) {
    case PolicyKind::kClusterTree:
      return "cluster_tree";
    case PolicyKind::kDciTree:
      return "dci_tree";
    case PolicyKind::kExact:
      return "exact";
    case PolicyKind::kSequential:
      return "sequential";
  }
  return "?";
}

Result<PolicyKind> ParsePolicyKind(std::string_view name) {
  std::string names;
  for (const PolicyKind kind : kKinds) {
    if (PolicyKindName(kind) == name) return kind;
    if (!names.empty()) names += ", ";
    names += PolicyKindName(kind);
  }
  return InvalidArgument("selection policy '" + std::string(name) +
                         "' is unknown; use one of: " + names);
}

std::unique_ptr<SelectionPolicy> MakePolicy(PolicyKind kind, const PolicyOptions& options) {
  switch (kind) {
    case PolicyKind::kClusterTree:
      return MakeClusterTree(options);
    case PolicyKind::kDciTree:
      return MakeDciTree(options);
    case PolicyKind::kExact:
      return MakeExact(options);
    case PolicyKind::kSequential:
      return MakeSequential(options);
  }
  KV_CHECK(false && "unknown PolicyKind");
  return nullptr;
}

}  // namespace icecache
