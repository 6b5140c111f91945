// BatchLoop: continuous batching. Several sequences decode side by side, each one token a step; they
// join and leave between steps. A sequence's question goes in token by token as its answer comes out,
// so that sequences which are asked and sequences which answer share steps.
//
// What a sequence says does not depend on its company: the same model rows, its own requests, its own
// random numbers. Thread: the decode thread.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "common/clock.h"
#include "worker/batch_attention.h"
#include "worker/model/model.h"
#include "worker/model/sampler.h"

namespace icecache {

struct BatchSequence {
  AttentionIceCache* attention = nullptr;  // borrowed until on_end; Begin was called
  uint32_t position = 0;                   // of the first token fed
  std::vector<int32_t> feed;               // goes in before the first token is chosen; at least one
  SamplerOptions sampling;
  uint32_t max_new_tokens = 0;
  std::vector<int32_t> stop;  // ends it; not reported
  // False: enough. Neither of the two may call the loop.
  std::function<bool(int32_t token)> on_token;
  // Once, at its end: OK, or what befell it. It has left the loop then.
  std::function<void(const Status&)> on_end;
};

struct BatchStats {
  uint64_t steps = 0;
  uint64_t rows = 0;    // tokens fed, over all sequences
  uint64_t chosen = 0;  // tokens chosen
  Duration total{0};
};

class BatchLoop {
 public:
  // Borrows all three.
  BatchLoop(Model& model, CacheClient& client, AttentionBackend& backend);

  // Takes part from the next step on. RESOURCE_EXHAUSTED beyond limits::kSelectsPerBatchMax,
  // INVALID_ARGUMENT without tokens to feed or with bad sampling options.
  Status Join(BatchSequence sequence);
  // One token of every sequence. An error of one sequence goes to its on_end; one of the model or the
  // backend ends all of them and is returned. REQUIRES: size() > 0.
  Status Step();
  // Ends all that are here with `status`.
  void EndAll(const Status& status);

  size_t size() const { return members_.size(); }
  const BatchStats& stats() const { return stats_; }
  const AttentionStats& shared_stats() const { return attention_.shared_stats(); }

 private:
  struct Member {
    BatchSequence sequence;
    Sampler sampler;
    size_t fed = 0;
    uint32_t said = 0;
    int32_t next = 0;  // token to feed once `feed` is through
    bool over = false;
    Status status;
  };
  bool Wants(const Member& member) const;  // to choose a token after this step
  void Take(Member* member, int32_t token);
  void ListRows();
  void EndOver();

  Model& model_;
  BatchAttention attention_;
  std::vector<Member> members_;
  std::vector<StepToken> tokens_;
  std::vector<AttentionIceCache*> rows_;
  std::vector<TokenChoice> choices_;
  std::vector<int32_t> chosen_;
  BatchStats stats_;
};

}  // namespace icecache
