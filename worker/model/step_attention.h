// EachSequence: a step's attention one sequence after the other, each through its own
// LayerAttention. For a single sequence (DecodeLoop), and for methods that gain nothing from
// company.
#pragma once

#include <span>
#include <vector>

#include "worker/model/model.h"

namespace icecache {

class EachSequence final : public StepAttention {
 public:
  // Borrows; sequence i is row i of every step. The first error ends the step. `on_device`: of all
  // sequences.
  EachSequence(const ModelShape& shape, std::vector<LayerAttention*> sequences, bool on_device)
      : shape_(shape), on_device_(on_device), sequences_(std::move(sequences)) {}

  bool on_device() const override { return on_device_; }

  Status AttendStep(LayerId layer, std::span<const StepToken> tokens, const float* q,
                    const float* k, const float* v, float* out) override {
    KV_CHECK(tokens.size() == sequences_.size());
    const size_t q_row = size_t{shape_.query_heads} * shape_.head_dim;
    const size_t kv_row = size_t{shape_.kv_heads} * shape_.head_dim;
    for (size_t i = 0; i < tokens.size(); ++i) {
      KV_RETURN_IF_ERROR(sequences_[i]->Attend(layer, tokens[i].position, 1, q + i * q_row,
                                               k + i * kv_row, v + i * kv_row, out + i * q_row));
    }
    return OkStatus();
  }

 private:
  const ModelShape shape_;
  const bool on_device_;
  const std::vector<LayerAttention*> sequences_;
};

}  // namespace icecache
