#include "cacheserver/select/selection_policy.h"

#include <algorithm>
#include <array>
#include <string>

#include "cacheserver/select/arkvale.h"
#include "cacheserver/select/cluster_tree.h"
#include "cacheserver/select/cluster_tree_variants.h"
#include "cacheserver/select/clusterkv.h"
#include "cacheserver/select/dci_tree.h"
#include "cacheserver/select/exact.h"
#include "cacheserver/select/exact_page.h"
#include "cacheserver/select/exact_token.h"
#include "cacheserver/select/h2o.h"
#include "cacheserver/select/infllm.h"
#include "cacheserver/select/landmark.h"
#include "cacheserver/select/magicpig.h"
#include "cacheserver/select/mass_oracle.h"
#include "cacheserver/select/omnikv.h"
#include "cacheserver/select/pqcache.h"
#include "cacheserver/select/quest.h"
#include "cacheserver/select/retroinfer.h"
#include "cacheserver/select/sequential.h"
#include "cacheserver/select/shadowkv.h"
#include "cacheserver/select/snapkv.h"
#include "cacheserver/select/squeezed.h"
#include "cacheserver/select/streaming_llm.h"
#include "cacheserver/select/twilight.h"

namespace icecache {
namespace {

using Maker = std::unique_ptr<SelectionPolicy> (*)(const PolicyOptions&);
struct Entry {
  PolicyKind kind;
  std::string_view name;
  Maker make;
  uint32_t head_dim_min = 16;
};
constexpr uint32_t kTreeDim = 32;  // a sketch has 32 dimensions; no public model has smaller heads

std::unique_ptr<SelectionPolicy> MakeDefaultClusterTree(const PolicyOptions& options) {
  return MakeClusterTree(options);
}
std::unique_ptr<SelectionPolicy> MakeDefaultDciTree(const PolicyOptions& options) {
  return MakeDciTree(options);
}

constexpr Entry kPolicies[] = {
    {PolicyKind::kClusterTree, "cluster_tree", MakeDefaultClusterTree, kTreeDim},
    {PolicyKind::kDciTree, "dci_tree", MakeDefaultDciTree},
    {PolicyKind::kExact, "exact", MakeExact},
    {PolicyKind::kSequential, "sequential", MakeSequential},
    {PolicyKind::kExactToken, "exact_token", MakeExactToken},
    {PolicyKind::kExactPage, "exact_page", MakeExactPage},
    {PolicyKind::kMass, "mass", MakeMassOracle},
    {PolicyKind::kStreamingLlm, "streaming_llm", MakeStreamingLlm},
    {PolicyKind::kH2o, "h2o", MakeH2o},
    {PolicyKind::kSnapKv, "snapkv", MakeSnapKv},
    {PolicyKind::kQuest, "quest", MakeQuest},
    {PolicyKind::kArkVale, "arkvale", MakeArkVale},
    {PolicyKind::kPqCache, "pqcache", MakePqCache},
    {PolicyKind::kMagicPig, "magicpig", MakeMagicPig},
    {PolicyKind::kOmniKv, "omnikv", MakeOmniKv},
    {PolicyKind::kInfLlm, "infllm", MakeInfLlm},
    {PolicyKind::kShadowKv, "shadowkv", MakeShadowKv},
    {PolicyKind::kRetroInfer, "retroinfer", MakeRetroInfer},
    {PolicyKind::kClusterKv, "clusterkv", MakeClusterKv},
    {PolicyKind::kSqueezed, "squeezed", MakeSqueezed},
    {PolicyKind::kLandmark, "landmark", MakeLandmark},
    {PolicyKind::kTwilight, "twilight", MakeTwilight},
    {PolicyKind::kRandomPages, "random_pages", MakeRandomPages, kTreeDim},
    {PolicyKind::kSequentialPages, "sequential_pages", MakeSequentialPages, kTreeDim},
    {PolicyKind::kTreeNoResidual, "cluster_tree_no_residual", MakeTreeNoResidual, kTreeDim},
    {PolicyKind::kTreeNoRerank, "cluster_tree_no_rerank", MakeTreeNoRerank, kTreeDim},
};

constexpr auto kKinds = [] {
  std::array<PolicyKind, std::size(kPolicies)> kinds{};
  for (size_t i = 0; i < kinds.size(); ++i) kinds[i] = kPolicies[i].kind;
  return kinds;
}();

const Entry* Find(PolicyKind kind) {
  const auto* entry = std::find_if(std::begin(kPolicies), std::end(kPolicies),
                                   [kind](const Entry& e) { return e.kind == kind; });
  return entry == std::end(kPolicies) ? nullptr : entry;
}

}  // namespace

std::span<const PolicyKind> AllPolicyKinds() { return kKinds; }

std::string_view PolicyKindName(PolicyKind kind) {
  const Entry* entry = Find(kind);
  return entry != nullptr ? entry->name : "?";
}

uint32_t PolicyHeadDimMin(PolicyKind kind) {
  const Entry* entry = Find(kind);
  return entry != nullptr ? entry->head_dim_min : 0;
}

std::string PolicyKindNames() {
  std::string names;
  for (const Entry& entry : kPolicies) {
    if (!names.empty()) names += ", ";
    names += entry.name;
  }
  return names;
}

Result<PolicyKind> ParsePolicyKind(std::string_view name) {
  for (const Entry& entry : kPolicies)
    if (entry.name == name) return entry.kind;
  return InvalidArgument("selection policy '" + std::string(name) +
                         "' is unknown; use one of: " + PolicyKindNames());
}

std::unique_ptr<SelectionPolicy> MakePolicy(PolicyKind kind, const PolicyOptions& options) {
  const Entry* entry = Find(kind);
  KV_CHECK(entry != nullptr && "unknown PolicyKind");
  return entry->make(options);
}

}  // namespace icecache
