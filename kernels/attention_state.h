// AttentionState: partial attention as a value that merges.
//
// For one query head and a set of tokens T with logits s_t = q . k_t (queries arrive scaled by
// 1/sqrt(head_dim)): max = max s_t, denom = sum exp(s_t - max), out = sum exp(s_t - max) v_t.
// The merge is associative and commutative with the empty state as identity, so sinks, window,
// resident pages, fetched pages, attention done at the server and the estimate of everything that
// was not fetched are terms of one sum. (Online softmax; FlashAttention, FlashInfer's merge.)
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

namespace icecache {

// Borrowed states of `heads` query heads, structure of arrays: max[heads], denom[heads],
// out[heads, head_dim]. Copy freely; owns nothing.
struct AttentionStateRef {
  uint32_t heads = 0;
  uint32_t head_dim = 0;
  float* max = nullptr;
  float* denom = nullptr;
  float* out = nullptr;

  float* row(uint32_t head) const { return out + size_t{head} * head_dim; }
};

// Owning states in one allocation of heads * (head_dim + 2) floats: all max, all denom, all rows of
// out. The flat array is also the wire form.
class AttentionStates {
 public:
  AttentionStates() = default;
  AttentionStates(uint32_t heads, uint32_t head_dim) { Reset(heads, head_dim); }

  // Sets the shape and makes every state empty (max = -inf, denom = 0, out = 0). Reuses memory.
  void Reset(uint32_t heads, uint32_t head_dim);
  AttentionStateRef ref() {
    return {heads_, head_dim_, data_.data(), data_.data() + heads_,
            data_.data() + 2 * size_t{heads_}};
  }
  uint32_t heads() const { return heads_; }
  uint32_t head_dim() const { return head_dim_; }
  std::span<const float> flat() const { return data_; }
  std::span<float> flat() { return data_; }
  static size_t FlatFloats(uint32_t heads, uint32_t head_dim) {
    return size_t{heads} * (head_dim + 2);
  }

 private:
  uint32_t heads_ = 0;
  uint32_t head_dim_ = 0;
  std::vector<float> data_;
};

inline constexpr float kEmptyMax = -std::numeric_limits<float>::infinity();

// into += from, head by head. REQUIRES: equal shapes. Empty states on either side are fine.
void MergeStates(const AttentionStateRef& from, const AttentionStateRef& into);

// into += one term of weight exp(logit) * mass with value row v[head_dim]: a token (mass 1) or a
// centroid that stands for `mass` tokens.
void MergeTerm(float logit, float mass, const float* v, const AttentionStateRef& into,
               uint32_t head);

// out / denom into result[heads, head_dim]; an empty state gives zeros.
void FinishStates(const AttentionStateRef& state, float* result);

// log of the softmax denominator (max + log denom); -inf when empty.
float LogSumExp(const AttentionStateRef& state, uint32_t head);

}  // namespace icecache
