// BatchAttention: a layer step of several sequences side by side. Their questions leave as one
// message per shard, what is here goes to the backend in one call and is computed while the shards
// select, and what has arrived follows as it comes: sequences whose answers are here do not wait
// for those whose are not.
//
// Each sequence has its own context, budget and window. One that fails is left out until the next
// step and its status kept; its row of the output is zero. Owner's thread: the decode thread.
#pragma once

#include <span>
#include <vector>

#include "worker/attention_icecache.h"
#include "worker/model/model.h"
#include "worker/token_loop.h"

namespace icecache {

class BatchAttention final : public StepAttention {
 public:
  // Borrows both.
  BatchAttention(const ModelShape& shape, CacheClient& client, AttentionBackend& backend)
      : shape_(shape), client_(client), backend_(backend) {}

  // Before every step: whose rows they are. Borrowed until the next call. All of this shape and
  // client.
  void Begin(std::span<AttentionIceCache* const> sequences);
  // Of each sequence since Begin.
  std::span<const Status> statuses() const { return statuses_; }

  bool on_device() const override { return backend_.on_device(); }
  Status AttendStep(LayerId layer, std::span<const StepToken> tokens, const float* q,
                    const float* k, const float* v, float* out) override;

  // Time that belongs to no single sequence: attention, and sending in `transfer`. Grows.
  const AttentionStats& shared_stats() const { return stats_; }

 private:
  // Runs fn(i) for the sequences that are well; an error is theirs.
  template <typename Fn>
  void ForEach(const Fn& fn);
  Status StartItems();
  Status CollectAll(LayerId layer);
  Status FinishAll();

  const ModelShape shape_;
  CacheClient& client_;
  AttentionBackend& backend_;
  std::vector<AttentionIceCache*> sequences_;
  std::vector<Status> statuses_;
  std::vector<TokenCall> calls_;
  std::vector<AttentionItem> items_;
  std::vector<AttentionResult> results_;
  AttentionStates none_;  // the result of a sequence that failed
  std::vector<size_t> open_, arrived_;
  AttentionStats stats_;
};

}  // namespace icecache
