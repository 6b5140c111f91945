// DecodeLoop: one sequence, one token at a time, through the model and whatever serves its
// attention. A question's tokens go the same way as generated ones: there is no dense shortcut.
// Thread: the decode thread.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "common/clock.h"
#include "worker/decode_attention.h"
#include "worker/model/model.h"
#include "worker/model/sampler.h"
#include "worker/model/step_attention.h"

namespace icecache {

struct DecodeStats {
  uint64_t tokens = 0;
  Duration total{0};
  AttentionStats attention;
  uint64_t kv_bytes = 0;       // K and V kept by the worker
  uint64_t full_kv_bytes = 0;  // what full KV would take now

  double ms_per_token(Duration part) const {
    return tokens == 0 ? 0
                       : std::chrono::duration<double, std::milli>(part).count() /
                             static_cast<double>(tokens);
  }
  Duration model() const {  // everything but attention
    return total - attention.select_wait - attention.transfer - attention.attention;
  }
  double bytes_per_token() const {
    return tokens == 0 ? 0
                       : static_cast<double>(attention.bytes_moved) / static_cast<double>(tokens);
  }
};

class DecodeLoop {
 public:
  // Borrows both. `pump` runs after every token and may end the loop; empty: nothing to turn.
  DecodeLoop(Model& model, DecodeAttention& attention, std::function<Status()> pump);

  // The next token goes to position `next`. `last_hidden`: of the token before, gives the first
  // logits; empty: Feed comes first.
  void Begin(uint32_t next, std::span<const float> last_hidden = {});

  // Runs one token; Next and Logits are then of the token after it, until the model takes another
  // Step (another loop's, for example).
  Status Feed(int32_t token);
  // The next token. REQUIRES: Feed was called, or Begin with a hidden state.
  Result<int32_t> Next(Sampler& sampler);
  Result<std::span<const float>> Logits();  // likewise

  // Samples up to `count` tokens and feeds each of them back, except the last. Ends early at one of
  // `stop` (not reported) or when on_token says false. REQUIRES: as Next.
  Status Generate(Sampler& sampler, uint32_t count, std::span<const int32_t> stop,
                  const std::function<bool(int32_t)>& on_token);

  uint32_t position() const { return next_; }
  // Since the last ResetStats (which resets the attention's, too).
  DecodeStats stats() const;
  void ResetStats();

 private:
  Model& model_;
  DecodeAttention& attention_;
  const std::function<Status()> pump_;
  uint32_t next_ = 0;
  EachSequence step_;
  bool stepped_ = false;       // what comes next is of the model's last Step, not of Begin
  std::vector<float> logits_;  // of Begin; of a Step when asked for
  uint64_t tokens_ = 0;
  Duration total_{0};
};

}  // namespace icecache
