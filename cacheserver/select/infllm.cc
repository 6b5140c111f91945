#include "cacheserver/select/infllm.h"

#include <algorithm>
#include <array>

#include "cacheserver/select/budget_choice.h"
#include "cacheserver/select/observed_attention.h"
#include "kernels/distance.h"

namespace icecache {
namespace {

constexpr uint32_t kBlockPages = 2, kRepresentatives = 4;
constexpr uint32_t kBlockSlots = kBlockPages * limits::kPageTokens;

class InfLlm final : public ObservedTokens {
 public:
  explicit InfLlm(const PolicyOptions& options)
      : ObservedTokens(PolicyKind::kInfLlm, options) {}

  void Select(const SelectRequest& request, const PagedKv& kv, Selection* out) const override {
    thread_local std::vector<float> score;
    if (!Start(request, kv, out)) return;
    score.assign(page_count(), kEmptyMax);
    uint32_t read = 0;
    for (uint32_t first = 0; first < page_count(); first += kBlockPages) {
      const uint32_t end = std::min(page_count(), first + kBlockPages);
      std::array<uint32_t, kRepresentatives> slots;
      const uint32_t count = Represent(kv, first, end, &slots);
      if (count == 0) continue;
      float sum = 0;
      for (uint32_t i = 0; i < count; ++i) sum += LogitSum(request, kv, slots[i]);
      std::fill(score.begin() + first, score.begin() + end,
                SaturatedLogit(sum / static_cast<float>(count)));
      read += count;
    }
    // One row for the group: heads are summed before they compete.
    SelectRequest summed = request;
    summed.local_lse = nullptr;
    ChoosePages({1, page_count(), page_count(), score.data(), score.data()}, summed, kv, out);
    out->tokens_read = std::min(tokens(), out->tokens_read + read);
  }

 private:
  static float LogitSum(const SelectRequest& request, const PagedKv& kv, uint32_t slot) {
    std::array<float, limits::kGroupMax> logits;
    const std::byte* row =
        kv.pages[slot / limits::kPageTokens].k + (slot % limits::kPageTokens) * kv.row_bytes();
    DotRows(request.queries, request.group, row, kv.dtype, 1, kv.head_dim, logits.data(), 1);
    float sum = 0;
    for (uint32_t h = 0; h < request.group; ++h)
      sum += SaturatedLogit(logits[h]) / static_cast<float>(request.group);
    return sum;
  }

  // The slots in memory, of pages [first, end), that speak for the block.
  uint32_t Represent(const PagedKv& kv, uint32_t first, uint32_t end,
                     std::array<uint32_t, kRepresentatives>* out) const {
    std::array<uint32_t, kBlockSlots> slots;
    uint32_t count = 0;
    bool seen = false;
    for (uint32_t p = first; p < end; ++p) {
      for (uint32_t r = 0; kv.pages[p].k != nullptr && r < fill(p); ++r) {
        slots[count++] = p * limits::kPageTokens + r;
        seen = seen || records<float>()[slots[count - 1]] > 0;
      }
    }
    const uint32_t chosen = std::min(count, kRepresentatives);
    if (seen) {
      std::partial_sort(slots.begin(), slots.begin() + chosen, slots.begin() + count,
                        [score = records<float>()](uint32_t a, uint32_t b) {
                          return score[a] != score[b] ? score[a] > score[b] : a < b;
                        });
    }
    for (uint32_t i = 0; i < chosen; ++i) (*out)[i] = slots[seen ? i : i * count / chosen];
    return chosen;
  }
};

}  // namespace

std::unique_ptr<SelectionPolicy> MakeInfLlm(const PolicyOptions& options) {
  return std::make_unique<InfLlm>(options);
}

}  // namespace icecache
