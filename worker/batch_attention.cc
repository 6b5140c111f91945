#include "worker/batch_attention.h"

#include <algorithm>

namespace icecache {

void BatchAttention::Begin(std::span<AttentionIceCache* const> sequences) {
  sequences_.assign(sequences.begin(), sequences.end());
  statuses_.assign(sequences.size(), OkStatus());
}

template <typename Fn>
void BatchAttention::ForEach(const Fn& fn) {
  for (size_t i = 0; i < sequences_.size(); ++i) {
    if (statuses_[i].ok()) statuses_[i] = fn(i);
  }
}

Status BatchAttention::AttendStep(LayerId layer, std::span<const StepToken> tokens, const float* q,
                                  const float* k, const float* v, float* out) {
  KV_CHECK(tokens.size() == sequences_.size());
  const size_t q_row = size_t{shape_.query_heads} * shape_.head_dim;
  const size_t kv_row = size_t{shape_.kv_heads} * shape_.head_dim;
  calls_.clear();
  for (size_t i = 0; i < tokens.size(); ++i) {
    calls_.push_back(
        {tokens[i].position, q + i * q_row, k + i * kv_row, v + i * kv_row, out + i * q_row});
  }
  client_.HoldSelects();
  ForEach([&](size_t i) { return sequences_[i]->Enter(layer, calls_[i]); });
  stats_.transfer += client_.ReleaseSelects();
  items_.clear();
  ForEach([&](size_t i) {
    sequences_[i]->AddLocal(layer, calls_[i], &items_);
    return OkStatus();
  });
  Status status = StartItems();
  if (status.ok()) status = CollectAll(layer);
  const Status finished = FinishAll();  // after an error, too: it ends the step
  if (status.ok()) status = finished;
  KV_RETURN_IF_ERROR(status);
  client_.HoldSelects();
  ForEach([&](size_t i) {
    sequences_[i]->Leave(layer, calls_[i]);
    return OkStatus();
  });
  stats_.transfer += client_.ReleaseSelects();
  return OkStatus();
}

Status BatchAttention::StartItems() {
  const AttentionTimer timer(&stats_.attention);
  return backend_.Start(items_);
}

Status BatchAttention::FinishAll() {
  const AttentionTimer timer(&stats_.attention);
  none_.Reset(shape_.query_heads, shape_.head_dim);
  results_.clear();
  for (size_t i = 0; i < sequences_.size(); ++i) {
    results_.push_back({statuses_[i].ok() ? sequences_[i]->states() : none_.ref(), calls_[i].out});
  }
  return backend_.FinishTo(results_);
}

Status BatchAttention::CollectAll(LayerId layer) {
  open_.clear();
  ForEach([&](size_t i) {
    open_.push_back(i);
    return OkStatus();
  });
  while (!open_.empty()) {
    arrived_.clear();
    std::erase_if(open_, [&](size_t i) {
      if (!sequences_[i]->Arrived()) return false;
      arrived_.push_back(i);
      return true;
    });
    if (arrived_.empty()) {  // the one that asked first is likely to be the next
      arrived_.push_back(open_.front());
      open_.erase(open_.begin());
    }
    items_.clear();
    for (const size_t i : arrived_) {
      statuses_[i] = sequences_[i]->Collect(layer);
      if (statuses_[i].ok()) sequences_[i]->AddSelected(layer, calls_[i], &items_);
    }
    KV_RETURN_IF_ERROR(StartItems());
  }
  return OkStatus();
}

}  // namespace icecache
