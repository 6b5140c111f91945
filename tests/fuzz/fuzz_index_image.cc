// Saved indexes. Input: one byte for the policy, then the image. What Restore accepts must answer a
// query and save to something it accepts again.
#include <cmath>

#include "cacheserver/select/selection_policy.h"
#include "tests/fuzz/fuzz_target.h"

namespace icecache::fuzz {
namespace {

const PolicyOptions kOptions{.dtype = DType::kF32, .head_dim = 32};

void Query(const SelectionPolicy& policy, const PagedKv& pages) {
  std::vector<float> query(32, 0.25f);
  Selection selection;
  policy.Select({.queries = query.data(), .group = 1, .max_pages = 4, .read_cap = 64}, pages,
                &selection);
  if (selection.pages.size() > 4) Broken("never more pages than asked for");
}

std::vector<std::string> Images() {
  std::vector<float> rows(200 * 32);
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = std::sin(static_cast<float>(i * i % 1013));
  const auto* bytes = reinterpret_cast<const std::byte*>(rows.data());
  std::vector<std::string> seeds;
  for (size_t kind = 0; kind < AllPolicyKinds().size(); ++kind) {
    for (const uint32_t count : {0u, 5u, 200u}) {
      auto policy = MakePolicy(AllPolicyKinds()[kind], kOptions);
      if (!policy->Build({DType::kF32, 32, count, bytes, bytes}, {}).ok())
        Broken("finite rows build");
      std::string image(1, static_cast<char>(kind));
      policy->Save(&image);
      seeds.push_back(std::move(image));
    }
  }
  return seeds;
}

void CheckImage(PolicyKind kind, const std::string& image) {
  auto policy = MakePolicy(kind, kOptions);
  if (!policy->Restore(image).ok()) return;
  double pages = 0;
  policy->VisitCounters([&](std::string_view name, double value) {
    if (name == "pages") pages = value;
  });
  // All pages cold: only the structure itself is used.
  const std::vector<PageView> views(static_cast<size_t>(pages), PageView{nullptr, nullptr, 1});
  const PagedKv kv{DType::kF32, 32, static_cast<uint32_t>(views.size()), views.data()};
  Query(*policy, kv);
  std::string saved;
  policy->Save(&saved);
  if (!MakePolicy(kind, kOptions)->Restore(saved).ok()) Broken("a saved image restores");
}

void CheckInput(const std::string& input) {
  if (input.empty()) return;
  const PolicyKind kind =
      AllPolicyKinds()[static_cast<uint8_t>(input[0]) % AllPolicyKinds().size()];
  CheckImage(kind, input.substr(1));
}

}  // namespace

std::vector<Target> Targets() { return {{"image", Images(), CheckInput}}; }

}  // namespace icecache::fuzz
