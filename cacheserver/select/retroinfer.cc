#include "cacheserver/select/retroinfer.h"

#include <algorithm>
#include <cmath>

#include "cacheserver/select/clustered_tokens.h"

namespace icecache {
namespace {

constexpr float kEstimated = 0.232f;  // of the clusters

class RetroInfer final : public ClusteredTokens {
 public:
  explicit RetroInfer(const PolicyOptions& options)
      : ClusteredTokens(
            PolicyKind::kRetroInfer, options,
            {.tokens_per_cluster = 16, .segment_tokens = 8192, .centred = true, .values = true}) {}

  void Select(const SelectRequest& request, const PagedKv& kv, Selection* out) const override {
    thread_local Scratch s;
    if (!Start(request, kv, out)) return;
    ScoreClusters(request, false, &s.logits);
    RankUnits(request, request.rank, s.logits, &s.cluster_rank);
    TopPages(s.cluster_rank, cluster_count(), &s.order);
    WeighTokens(request, &s.weight);
    s.retrieved.assign(cluster_count(), 0);
    const size_t taken = Retrieve(request, &s);
    s.rank.assign(slots(), -1.0f);
    for (uint32_t p = 0; p < page_count(); ++p) {
      for (uint32_t r = 0; r < fill(p); ++r) {
        const uint32_t slot = p * limits::kPageTokens + r;
        if (s.retrieved[cluster_of()[slot]] != 0) s.rank[slot] = s.cluster_rank[cluster_of()[slot]];
      }
    }
    SelectRequest all = request;  // the zones are the cut
    if (request.residual) all.min_mass = 0;
    ChooseTokens(s.rank, s.weight, all, kv, out);
    if (request.residual) Estimate(request, taken, &s, out->residual.ref());
  }

 private:
  struct Scratch {
    std::vector<float> logits, cluster_rank, rank, weight;
    std::vector<uint32_t> order;
    std::vector<uint8_t> retrieved;
  };

  // Marks the clusters that fit, best first; returns how many. One that is larger than the budget
  // is cut if it is the best. min_mass ends the zone early.
  size_t Retrieve(const SelectRequest& request, Scratch* s) const {
    float left = static_cast<float>(request.max_pages * limits::kPageTokens);
    float total = 0, mass = 0;
    for (const float rank : s->cluster_rank) total += rank;
    size_t taken = 0;
    for (const uint32_t c : s->order) {
      if (sizes()[c] > left && taken > 0) break;
      if (left <= 0) break;
      left -= sizes()[c];
      s->retrieved[c] = 1;
      ++taken;
      mass += s->cluster_rank[c];
      if (request.min_mass > 0 && mass >= request.min_mass * total) break;
    }
    return taken;
  }

  void Estimate(const SelectRequest& request, size_t taken, Scratch* s,
                const AttentionStateRef& residual) const {
    const size_t zone =
        static_cast<size_t>(std::ceil(kEstimated * static_cast<float>(cluster_count())));
    const size_t end = std::min(s->order.size(), taken + zone);
    for (size_t i = taken; i < end; ++i) {
      const uint32_t c = s->order[i];
      if (sizes()[c] == 0) continue;
      for (uint32_t h = 0; h < request.group; ++h)
        MergeTerm(s->logits[size_t{h} * cluster_count() + c], sizes()[c], value(c), residual, h);
    }
  }
};

}  // namespace

std::unique_ptr<SelectionPolicy> MakeRetroInfer(const PolicyOptions& options) {
  return std::make_unique<RetroInfer>(options);
}

}  // namespace icecache
