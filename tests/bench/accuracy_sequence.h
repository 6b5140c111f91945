// Runs the turns of one task sample through one way of attending, and measures on the way.
#pragma once

#include <functional>
#include <vector>

#include "kernels/attention.h"
#include "tests/bench/accuracy_attention.h"
#include "tests/bench/tasks/task.h"
#include "worker/decode_loop.h"

namespace icecache {

// Lets another attention answer, and compares its answer with attention over everything whenever it
// is told to. The other one must keep document.kv up to date, as all of them here do.
class MeasuredAttention final : public DecodeAttention {
 public:
  MeasuredAttention(const ReadDocument& document, DecodeAttention& inner, AttentionBackend& backend)
      : document_(document), inner_(inner), backend_(backend) {}

  void Measure(bool on) { on_ = on; }
  // |output - full| / |full| of each (measured step, layer, query head).
  const std::vector<double>& errors() const { return errors_; }

  Status Attend(LayerId layer, TokenPos first, uint32_t tokens, const float* q, const float* k,
                const float* v, float* out) override;
  bool on_device() const override { return false; }  // it reads what `inner` wrote
  const AttentionStats& stats() const override { return inner_.stats(); }
  void ResetStats() override { inner_.ResetStats(); }
  uint64_t kv_bytes() const override { return inner_.kv_bytes(); }

 private:
  const ReadDocument& document_;
  DecodeAttention& inner_;
  AttentionBackend& backend_;
  bool on_ = false;
  AttentionStates states_;
  std::vector<float> full_;
  std::vector<double> errors_;
};

struct SequenceResult {
  std::vector<std::vector<int32_t>> said;  // by turn, in the order they were taken
  std::vector<double> scores;
  std::vector<double> error_by_turn;  // of measured turns
  double micros = 0;                  // CPU of steps that were not measured
  uint64_t steps = 0;                 // how many those were
  uint64_t tokens = 0;                // all steps
};

// `begin` takes the attention back to right after the document; `measure` is told before each step
// whether it will be measured. A turn's last read token is measured, of long samples that of every
// few turns. `full`: what full attention said (Metric::kAgreement), or null.
struct SequenceSpec {
  const TaskSample* sample = nullptr;
  uint32_t document_tokens = 0;
  const std::vector<std::vector<int32_t>>* full = nullptr;
  std::function<void()> begin;
  std::function<void(bool)> measure;
};
Result<SequenceResult> RunSequence(DecodeLoop& loop, const MeasuredAttention& attention,
                                   const Tokenizer& tokenizer, const SequenceSpec& spec);

}  // namespace icecache
