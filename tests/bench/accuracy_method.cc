#include "tests/bench/accuracy_method.h"

#include <charconv>
#include <functional>
#include <map>

namespace icecache {
namespace {

using Setter = std::function<Status(const std::string& value)>;

template <typename T>
Setter Number(T* field) {
  return [field](const std::string& value) -> Status {
    T number{};
    const auto end = value.data() + value.size();
    const auto read = std::from_chars(value.data(), end, number);
    if (read.ec != std::errc() || read.ptr != end || !(number >= T{}))
      return InvalidArgument("'" + value + "' is no number from 0 on");
    *field = number;
    return OkStatus();
  };
}

template <typename T>
Setter Choice(T* field, std::map<std::string, T> choices) {
  return [field, choices = std::move(choices)](const std::string& value) -> Status {
    const auto found = choices.find(value);
    if (found != choices.end()) {
      *field = found->second;
      return OkStatus();
    }
    std::string names;
    for (const auto& [name, unused] : choices) names += (names.empty() ? "" : ", ") + name;
    return InvalidArgument("'" + value + "': expected " + names);
  };
}

std::map<std::string, Setter> CommonOptions(AccuracyMethod* m) {
  const auto flag = [](std::function<void()> set) {
    return [set = std::move(set)](const std::string& value) {
      if (!value.empty()) return InvalidArgument("takes no value");
      set();
      return OkStatus();
    };
  };
  return {{"strict", flag([m] { m->read_cap = 0; })},
          {"plain", flag([m] { m->residual = false; })},
          {"read_cap", Number(&m->read_cap)},
          {"mass", Number(&m->min_mass)},
          {"recluster", Number(&m->recluster)},
          {"energy", Choice<AccuracyMethod::Energy>(&m->energy,
                                                    {{"recent", AccuracyMethod::Energy::kRecent},
                                                     {"build", AccuracyMethod::Energy::kBuild},
                                                     {"none", AccuracyMethod::Energy::kNone}})},
          {"reuse", Number(&m->reuse)},
          {"dense", Number(&m->dense)},
          {"seed", Number(&m->seed)},
          {"rank", Choice<GroupRank>(&m->rank, {{"mass_sum", GroupRank::kMassSum},
                                                {"mass_max", GroupRank::kMassMax},
                                                {"max_token", GroupRank::kMaxToken}})}};
}

std::map<std::string, Setter> TreeOptions(ClusterTreeOptions* tree) {
  using Layout = ClusterTreeOptions::Layout;
  using Sketch = ClusterTreeOptions::Sketch;
  return {{"rerank_pages_min", Number(&tree->rerank_pages_min)},
          {"rerank_pages_max", Number(&tree->rerank_pages_max)},
          {"rerank_pages_sketch", Number(&tree->rerank_pages_sketch)},
          {"scan_pages", Number(&tree->scan_pages)},
          {"sketch_pages", Number(&tree->sketch_pages)},
          {"token_threshold", Number(&tree->token_threshold)},
          {"insert_slack", Number(&tree->insert_slack)},
          {"layout", Choice<Layout>(&tree->layout, {{"auto", Layout::kAuto},
                                                    {"content", Layout::kContent},
                                                    {"sequential", Layout::kSequential},
                                                    {"content_value", Layout::kContentValue},
                                                    {"random", Layout::kRandom}})},
          {"sketch",
           Choice<Sketch>(&tree->sketch,
                          {{"auto", Sketch::kAuto}, {"on", Sketch::kOn}, {"off", Sketch::kOff}})}};
}

std::map<std::string, Setter> DciOptions(DciTreeOptions* dci) {
  return {{"level1_ratio", Number(&dci->level1_ratio)},
          {"upper_ratio", Number(&dci->upper_ratio)},
          {"search_ratio", Number(&dci->search_ratio)},
          {"retrieve_share", Number(&dci->retrieve_share)},
          {"field_of_view_min", Number(&dci->field_of_view_min)},
          {"build_field_of_view", Number(&dci->build_field_of_view)},
          {"insert_field_of_view", Number(&dci->insert_field_of_view)},
          {"anchor_interval", Number(&dci->anchor_interval)},
          {"improved", [dci](const std::string&) {
             *dci = DciTreeOptions::Improved();
             return OkStatus();
           }}};
}

Status Apply(const std::string& option, AccuracyMethod* method) {
  const size_t equals = option.find('=');
  const std::string key = option.substr(0, equals);
  const std::string value = equals == std::string::npos ? "" : option.substr(equals + 1);
  std::map<std::string, Setter> known = CommonOptions(method);
  std::map<std::string, Setter> own;
  if (method->policy == PolicyKind::kClusterTree) own = TreeOptions(&method->tree);
  if (method->policy == PolicyKind::kDciTree) own = DciOptions(&method->dci);
  method->custom |= own.contains(key);
  known.merge(own);
  const auto found = known.find(key);
  if (found != known.end()) return found->second(value).WithContext(key);
  std::string names;
  for (const auto& [name, unused] : known) names += (names.empty() ? "" : ", ") + name;
  return InvalidArgument("option '" + key + "': expected one of " + names);
}

}  // namespace

std::unique_ptr<SelectionPolicy> AccuracyMethod::Make(DType dtype, uint32_t head_dim) const {
  const PolicyOptions options{dtype, head_dim, seed};
  if (custom && policy == PolicyKind::kClusterTree) return MakeClusterTree(options, tree);
  if (custom && policy == PolicyKind::kDciTree) return MakeDciTree(options, dci);
  return MakePolicy(policy, options);
}

Result<AccuracyMethod> ParseAccuracyMethod(const std::string& text) {
  AccuracyMethod method;
  method.name = text;
  const size_t slash = text.find('/');
  const std::string base = text.substr(0, slash);
  if (base == "full" || base == "top_k") {
    method.kind = base == "full" ? AccuracyMethod::Kind::kFull : AccuracyMethod::Kind::kTopK;
    if (slash != std::string::npos) return InvalidArgument("'" + base + "' takes no options");
    return method;
  }
  const Result<PolicyKind> kind = ParsePolicyKind(base);
  if (!kind.ok()) {
    return InvalidArgument(kind.status().message() +
                           "; or full (no sparsity), top_k (best tokens of each head)");
  }
  method.policy = *kind;
  for (size_t at = slash; at != std::string::npos;) {
    const size_t next = text.find('/', at + 1);
    const std::string option =
        text.substr(at + 1, next == std::string::npos ? next : next - at - 1);
    KV_RETURN_IF_ERROR(Apply(option, &method).WithContext("method '" + text + "'"));
    at = next;
  }
  if (method.reuse == 0) return InvalidArgument("method '" + text + "': reuse starts at 1");
  return method;
}

}  // namespace icecache
