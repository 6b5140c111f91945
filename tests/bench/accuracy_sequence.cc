#include "tests/bench/accuracy_sequence.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "tests/bench/measure.h"
#include "worker/token_loop.h"

namespace icecache {
namespace {

constexpr size_t kMeasuredTurns = 64;  // of one sample

class Sequence {
 public:
  Sequence(DecodeLoop& loop, const MeasuredAttention& attention, const Tokenizer& tokenizer,
           const SequenceSpec& spec)
      : loop_(loop), attention_(attention), tokenizer_(tokenizer), spec_(spec) {}

  Result<SequenceResult> Run();

 private:
  Status Feed(int32_t token, bool measured);
  Status Take(const TaskTurn& turn, bool measured);
  void ScoreSaid(const TaskTurn& turn);

  DecodeLoop& loop_;
  const MeasuredAttention& attention_;
  const Tokenizer& tokenizer_;
  const SequenceSpec& spec_;
  SequenceResult result_;
};

Status Sequence::Feed(int32_t token, bool measured) {
  spec_.measure(measured);
  const double begin = ThreadCpuMicros();
  KV_RETURN_IF_ERROR(loop_.Feed(token));
  ++result_.tokens;
  if (measured) return OkStatus();
  result_.micros += ThreadCpuMicros() - begin;
  ++result_.steps;
  return OkStatus();
}

// Reads the turn and says up to new_tokens tokens, of which the last is not read again.
Status Sequence::Take(const TaskTurn& turn, bool measured) {
  const size_t before = attention_.errors().size();
  for (size_t i = 0; i < turn.tokens.size(); ++i)
    KV_RETURN_IF_ERROR(Feed(turn.tokens[i], measured && i + 1 == turn.tokens.size()));
  if (measured) {
    const auto begin = attention_.errors().begin() + static_cast<ptrdiff_t>(before);
    result_.error_by_turn.push_back(Mean(std::vector<double>(begin, attention_.errors().end())));
  }
  Sampler greedy{SamplerOptions{}};
  std::vector<int32_t>& said = result_.said.emplace_back();
  const std::vector<int32_t>& stop = spec_.sample->stop;
  while (said.size() < turn.new_tokens) {
    KV_ASSIGN_OR_RETURN(const int32_t token, loop_.Next(greedy));
    if (std::find(stop.begin(), stop.end(), token) != stop.end()) break;
    said.push_back(token);
    if (said.size() < turn.new_tokens) KV_RETURN_IF_ERROR(Feed(token, false));
  }
  return OkStatus();
}

void Sequence::ScoreSaid(const TaskTurn& turn) {
  const std::vector<int32_t>& said = result_.said.back();
  if (spec_.sample->metric != Metric::kAgreement) {
    result_.scores.push_back(ScoreTurn(*spec_.sample, turn, tokenizer_.Decode(said, true), said));
  } else {
    const size_t i = result_.said.size() - 1;
    result_.scores.push_back(spec_.full == nullptr || (*spec_.full)[i] == said ? 1 : 0);
  }
}

Result<SequenceResult> Sequence::Run() {
  const TaskSample& sample = *spec_.sample;
  const size_t count = sample.turns.size(), stride = (count + kMeasuredTurns - 1) / kMeasuredTurns;
  // Where the right answers lead, and where the given ones do.
  size_t right = 0, taken = 0;
  const auto follow = [&](size_t from, const std::vector<int32_t>& answer) {
    const auto next = answer.empty() ? sample.next.end() : sample.next.find(answer.front());
    return next == sample.next.end() ? (from + 1) % count : next->second;
  };
  for (size_t i = 0; i < count; ++i) {
    if (i == 0 || !sample.chained) {
      spec_.begin();
      loop_.Begin(spec_.document_tokens);
    } else if (sample.feed_answers && !result_.said.back().empty()) {
      KV_RETURN_IF_ERROR(Feed(result_.said.back().back(), false));
    }
    KV_RETURN_IF_ERROR(Take(sample.turns[taken], i % stride == 0));
    ScoreSaid(sample.turns[right]);
    taken = follow(taken, result_.said.back());
    right = follow(right, sample.turns[right].answer_tokens);
  }
  return std::move(result_);
}

}  // namespace

Status MeasuredAttention::Attend(LayerId layer, TokenPos first, uint32_t tokens, const float* q,
                                 const float* k, const float* v, float* out) {
  KV_RETURN_IF_ERROR(inner_.Attend(layer, first, tokens, q, k, v, out));
  if (!on_) return OkStatus();
  const ModelShape& shape = document_.shape;
  return ForEachToken(shape, first, tokens, q, k, v, out, [&](const TokenCall& call) -> Status {
    states_.Reset(shape.query_heads, shape.head_dim);
    for (uint16_t h = 0; h < shape.kv_heads; ++h) {
      backend_.AttendRows(call.queries(shape, h), document_.kv->rows(layer, KvHeadId(h)),
                          GroupStates(shape, states_, h));
    }
    full_.resize(size_t{shape.query_heads} * shape.head_dim);
    FinishStates(states_.ref(), full_.data());
    for (uint32_t h = 0; h < shape.query_heads; ++h) {
      double difference = 0, norm = 0;
      for (uint32_t j = 0; j < shape.head_dim; ++j) {
        const size_t at = size_t{h} * shape.head_dim + j;
        difference += (call.out[at] - full_[at]) * (call.out[at] - full_[at]);
        norm += full_[at] * full_[at];
      }
      errors_.push_back(norm > 0 ? std::sqrt(difference / norm) : 0);
    }
    return OkStatus();
  });
}

Result<SequenceResult> RunSequence(DecodeLoop& loop, const MeasuredAttention& attention,
                                   const Tokenizer& tokenizer, const SequenceSpec& spec) {
  KV_CHECK(!spec.sample->turns.empty());
  return Sequence(loop, attention, tokenizer, spec).Run();
}

}  // namespace icecache
