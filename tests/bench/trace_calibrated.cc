// The RoPE trace. What makes keys look like keys of a trained model, each with its source in
// notes/sparse.md section 4: content lies in slowly rotating pairs; a few pairs carry a large
// constant (and the query points away from it, so queries and keys are in different cones); fast
// pairs carry position only; topics come in segments, token types are Zipf; queries drift, jump,
// and share a topic within their group.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>

#include "kernels/distance.h"
#include "tests/bench/random.h"
#include "tests/bench/trace.h"

namespace icecache {
namespace {

struct HeadClass {
  const char* name;
  float topic, type;  // how much a query follows its topic and its token type
  float noise;        // of the query's content
  double top256;      // mass of the top 256 of 32k tokens, sinks and window excluded
  float sink;         // share of all mass on sinks
};
constexpr HeadClass kClasses[] = {
    {"retrieval", 0.7f, 1.0f, 0.15f, 0.99, 0.50f}, {"sinky", 0.7f, 1.0f, 0.15f, 0.99, 0.88f},
    {"topic", 1.0f, 0.45f, 0.35f, 0.90, 0.55f},    {"broad", 1.0f, 0.5f, 0.6f, 0.65, 0.50f},
    {"diffuse", 0.8f, 0.5f, 1.0f, 0.20, 0.30f},
};

constexpr uint32_t kTopics = 100, kTypes = 3000;
constexpr uint32_t kNewTopics = 40;  // that only extra keys have, with drift
constexpr uint32_t kCalibrationKeys = 32768, kCalibrationGroups = 8, kHistoryGroups = 64;
constexpr float kRopeBase = 5e5f;
constexpr float kLocal = 0.15f;          // share of all mass on the window
constexpr float kAgree = 0.7f;           // heads that share their group's topic
constexpr float kJump = 0.07f;           // chance per step that attention moves to another topic
constexpr float kTypeChange = 0.5f;      // the same for the token type
constexpr float kDrift = 0.35f;          // AR(1) coefficient of a query's content
constexpr float kOwnText = 0.5f;         // with follow: attention that moves goes to an extra key
constexpr float kSharedMeaning = 0.95f;  // with look_seed: correlation of what tokens mean
constexpr float kLayerShift = 0.1f;  // with look_seed: chance that a head looks elsewhere after all

class Generator {
 public:
  Generator(const TraceSpec& spec, const HeadClass& head)
      : spec_(spec),
        head_(head),
        random_(spec.seed),
        own_text_(spec.text_seed),
        own_look_(spec.look_seed),
        text_(spec.text_seed == 0 ? random_ : own_text_),
        look_(spec.look_seed == 0 ? random_ : own_look_),
        half_(spec.dim / 2),
        content_begin_((half_ * 52 + 63) / 64),
        content_(2 * (half_ - content_begin_)),
        spread_(spec.group_spread < 0 ? 1 - kAgree : static_cast<float>(spec.group_spread)),
        steps_(spec.follow ? std::max(1u, spec.extra_keys / spec.query_count) : 1) {}

  Trace Run() {
    trace_ = {.dtype = spec_.dtype,
              .dim = spec_.dim,
              .group = spec_.group,
              .keys = spec_.keys,
              .extra_keys = spec_.extra_keys,
              .query_count = spec_.query_count};
    DrawVocabulary();
    DrawTokens();
    WriteRows();
    DrawQueries();
    Calibrate();
    Finish();
    return std::move(trace_);
  }

 private:
  struct HeadState {
    uint32_t topic = 0, type = 0;
    std::vector<float> content;  // drifting, before sharpness
  };

  void DrawVocabulary() {
    topics_.resize(size_t{kTopics} * content_);
    types_.resize(size_t{kTypes} * content_);
    topic_values_.resize(size_t{kTopics} * spec_.dim);
    random_.Fill(topics_.data(), topics_.size(), 1.0f);
    random_.Fill(types_.data(), types_.size(), 1.0f);
    ShareVocabulary(&topics_);
    ShareVocabulary(&types_);
    random_.Fill(topic_values_.data(), topic_values_.size(), 1.0f);
    if (spec_.drift > 0) {
      AddTopics(&topics_, content_);
      AddTopics(&topic_values_, spec_.dim);
    }
    constant_.assign(spec_.dim, 0.0f);
    query_constant_.assign(spec_.dim, 0.0f);
    // Three adjacent slow pairs with a large mean; the query's mean stands 110 degrees off.
    const uint32_t first = content_begin_ - std::min(content_begin_, 3u);
    for (uint32_t i = first; i < content_begin_; ++i) {
      const float angle = 6.2831853f * random_.Uniform();
      const float away = angle + 1.92f;
      SetPair(&constant_, i, 6.0f * std::cos(angle), 6.0f * std::sin(angle));
      SetPair(&query_constant_, i, 4.0f * std::cos(away), 4.0f * std::sin(away));
    }
    // Fast pairs: position only.
    for (uint32_t i = 0; i < half_ * 24 / 64; ++i) {
      SetPair(&constant_, i, 0.4f * random_.Normal(), 0.4f * random_.Normal());
      SetPair(&query_constant_, i, 0.4f * random_.Normal(), 0.4f * random_.Normal());
    }
    zipf_.resize(kTypes);
    double sum = 0;
    for (uint32_t w = 0; w < kTypes; ++w) zipf_[w] = sum += 1.0 / (w + 5.0);
    for (double& z : zipf_) z /= sum;
  }

  void AddTopics(std::vector<float>* vectors, uint32_t dim) {
    const size_t old = vectors->size();
    vectors->resize(old + size_t{kNewTopics} * dim);
    random_.Fill(vectors->data() + old, vectors->size() - old, 1.0f);
  }

  // The residual stream makes layers see much the same likenesses; a vocabulary of its own would
  // let each layer find other tokens alike.
  void ShareVocabulary(std::vector<float>* vectors) {
    if (spec_.look_seed == 0) return;
    const float own = std::sqrt(1 - kSharedMeaning * kSharedMeaning);
    for (float& x : *vectors) x = kSharedMeaning * look_.Normal() + own * x;
  }

  void DrawTokens() {
    const uint32_t total = spec_.keys + spec_.extra_keys;
    token_topic_.resize(total);
    token_type_.resize(total);
    uint32_t topic = 0, left = 0;
    for (uint32_t t = 0; t < total; ++t) {
      const bool drifts = spec_.drift > 0 && t >= spec_.keys;
      if (left == 0 || (drifts && t == spec_.keys)) {
        topic = text_.Below(kTopics);
        if (drifts && text_.Chance(static_cast<float>(spec_.drift)))
          topic = kTopics + text_.Below(kNewTopics);
        left = 32 + static_cast<uint32_t>(text_.Exponential(200.0f));
      }
      --left;
      token_topic_[t] = topic;
      const auto at = std::lower_bound(zipf_.begin(), zipf_.end(), text_.Uniform());
      token_type_[t] = static_cast<uint32_t>(std::min<ptrdiff_t>(at - zipf_.begin(), kTypes - 1));
    }
  }

  void WriteRows() {
    const uint32_t dim = spec_.dim, total = spec_.keys + spec_.extra_keys;
    const size_t row_bytes = size_t{dim} * DTypeBytes(spec_.dtype);
    trace_.k.resize(total * row_bytes);
    trace_.v.resize(total * row_bytes);
    std::vector<float> key(dim), value(dim);
    for (uint32_t t = 0; t < total; ++t) {
      const float* topic = topics_.data() + size_t{token_topic_[t]} * content_;
      const float* type = types_.data() + size_t{token_type_[t]} * content_;
      const float* values = topic_values_.data() + size_t{token_topic_[t]} * dim;
      for (uint32_t j = 0; j < dim; ++j) {
        key[j] = constant_[j] + 0.2f * random_.Normal();
        value[j] = std::sqrt(0.5f) * (values[j] + random_.Normal());
      }
      AddContent(&key, [&](uint32_t c) { return topic[c] + type[c]; });
      if (t < 2048)
        trace_.keys_before_rope.insert(trace_.keys_before_rope.end(), key.begin(), key.end());
      Rotate(&key, t);
      FromF32(key.data(), dim, spec_.dtype, trace_.k.data() + t * row_bytes);
      FromF32(value.data(), dim, spec_.dtype, trace_.v.data() + t * row_bytes);
    }
  }

  // Attention moves to what some earlier token is about; old topics return as often as they occur.
  void Step(HeadState* state, const HeadState* leader, bool jump, uint32_t tokens) {
    const uint32_t seen = LookBack(tokens);
    if (leader != nullptr) {
      state->topic = leader->topic;
      if (look_.Chance(0.6f)) {
        state->type = leader->type;
      } else {
        state->type = TypeWithin(state->topic, seen, tokens);
      }
    } else {
      if (jump) state->topic = token_topic_[seen];
      if (jump || look_.Chance(Over(kTypeChange)))
        state->type = TypeWithin(state->topic, seen, tokens);
    }
    if (leader != nullptr && spec_.look_seed != 0 && random_.Chance(kLayerShift)) {
      state->type = TypeWithin(state->topic, random_.Below(tokens), tokens);
    }
    const float* topic = topics_.data() + size_t{state->topic} * content_;
    const float* type = types_.data() + size_t{state->type} * content_;
    const bool fresh = state->content.empty();
    state->content.resize(content_, 0.0f);
    const float kept = steps_ == 1 ? kDrift : std::pow(kDrift, static_cast<float>(steps_));
    for (uint32_t c = 0; c < content_; ++c) {
      const float target =
          head_.topic * topic[c] + head_.type * type[c] + head_.noise * random_.Normal();
      state->content[c] = fresh ? target : kept * state->content[c] + (1 - kept) * target;
    }
  }

  // Where attention that moves goes to.
  uint32_t LookBack(uint32_t tokens) {
    if (tokens > spec_.keys && look_.Chance(kOwnText))
      return spec_.keys + look_.Below(tokens - spec_.keys);
    return look_.Below(tokens);
  }

  // The chance of something within the steps between two queries, from that of one step.
  float Over(float chance) const {
    return steps_ == 1 ? chance : 1 - std::pow(1 - chance, static_cast<float>(steps_));
  }

  // The keys that there are when group g, of history and queries, is asked; and its position.
  uint32_t TokensAt(uint32_t g) const {
    if (!spec_.follow || g < kHistoryGroups) return spec_.keys;
    const uint64_t asked = g - kHistoryGroups + 1;
    return spec_.keys + static_cast<uint32_t>(asked * spec_.extra_keys / spec_.query_count);
  }
  uint32_t PositionAt(uint32_t g) const {
    if (!spec_.follow) return spec_.keys + g;
    return g < kHistoryGroups ? spec_.keys - std::min(spec_.keys, kHistoryGroups - g) : TokensAt(g);
  }

  // The type of a token of `topic` at or after `from` (cyclically): what can be retrieved exists.
  uint32_t TypeWithin(uint32_t topic, uint32_t from, uint32_t tokens) {
    for (uint32_t i = 0; i < tokens; ++i) {
      const uint32_t t = (from + i) % tokens;
      if (token_topic_[t] == topic) return token_type_[t];
    }
    return token_type_[from];
  }

  // Queries as a constant part and a content part, so that sharpness can be set afterwards.
  void DrawQueries() {
    const uint32_t dim = spec_.dim, groups = kHistoryGroups + spec_.query_count;
    base_.assign(size_t{groups} * spec_.group * dim, 0.0f);
    direction_ = base_;
    HeadState leader;
    std::vector<HeadState> heads(spec_.group);
    std::vector<bool> alone(spec_.group);
    for (uint32_t h = 0; h < spec_.group; ++h) alone[h] = look_.Chance(spread_);
    std::vector<float> row(dim);
    for (uint32_t g = 0; g < groups; ++g) {
      const bool jump = g == 0 || look_.Chance(Over(kJump));
      const uint32_t tokens = TokensAt(g);
      Step(&leader, nullptr, jump, tokens);
      if (jump)
        for (uint32_t h = 0; h < spec_.group; ++h) alone[h] = look_.Chance(spread_);
      for (uint32_t h = 0; h < spec_.group; ++h) {
        Step(&heads[h], alone[h] ? nullptr : &leader, jump, tokens);
        const size_t at = (size_t{g} * spec_.group + h) * dim;
        const uint32_t position = PositionAt(g);
        row = query_constant_;
        for (float& x : row) x += 0.2f * random_.Normal();
        Rotate(&row, position);
        std::copy(row.begin(), row.end(), base_.begin() + static_cast<ptrdiff_t>(at));
        std::fill(row.begin(), row.end(), 0.0f);
        AddContent(&row, [&](uint32_t c) { return heads[h].content[c]; });
        Rotate(&row, position);
        std::copy(row.begin(), row.end(), direction_.begin() + static_cast<ptrdiff_t>(at));
        if (g >= kHistoryGroups) query_topic_.push_back(heads[h].topic);
      }
    }
    const float scale = 1 / std::sqrt(static_cast<float>(dim));
    for (float& x : base_) x *= scale;
    for (float& x : direction_) x *= scale;
  }

  // Sharpness by bisection: the class's mass of the top 256 on at most 32k tokens.
  void Calibrate() {
    const uint32_t total = TokensAt(kHistoryGroups + spec_.query_count - 1);
    const uint32_t n = std::min(total, kCalibrationKeys);
    const TokenRows keys = trace_.Rows(spec_.follow ? total - n : 0, n);
    const uint32_t groups = std::min(kCalibrationGroups, spec_.query_count);
    const uint32_t stride = std::max(1u, spec_.query_count / groups);
    const uint32_t rows = groups * spec_.group;
    std::vector<float> constant(size_t{rows} * n), content(constant.size()), x(n);
    for (uint32_t g = 0; g < groups; ++g) {
      const size_t at = size_t{kHistoryGroups + g * stride} * spec_.group * spec_.dim;
      const size_t out = size_t{g} * spec_.group * n;
      DotRows(base_.data() + at, spec_.group, keys.k, spec_.dtype, n, spec_.dim,
              constant.data() + out, n);
      DotRows(direction_.data() + at, spec_.group, keys.k, spec_.dtype, n, spec_.dim,
              content.data() + out, n);
    }
    const uint32_t top = std::min(256u, n);
    const auto mass = [&](double sharp) {
      double sum = 0;
      for (uint32_t r = 0; r < rows; ++r) {
        for (uint32_t t = 0; t < n; ++t)
          x[t] =
              constant[size_t{r} * n + t] + static_cast<float>(sharp) * content[size_t{r} * n + t];
        const double all = ExpShifted(x.data(), n, MaxOf(x.data(), n), x.data());
        std::nth_element(x.begin(), x.begin() + top - 1, x.end(), std::greater<>());
        sum += std::accumulate(x.begin(), x.begin() + top, 0.0) / all / rows;
      }
      return sum;
    };
    double low = 0.02, high = 30;
    for (int i = 0; i < 16; ++i) {
      const double middle = std::sqrt(low * high);
      (mass(middle) < head_.top256 ? low : high) = middle;
    }
    trace_.sharpness = std::sqrt(low * high);
  }

  void Finish() {
    const uint32_t dim = spec_.dim, heads = spec_.group;
    for (size_t i = 0; i < base_.size(); ++i)
      base_[i] += static_cast<float>(trace_.sharpness) * direction_[i];
    const size_t history = size_t{kHistoryGroups} * heads * dim;
    trace_.energy.assign(dim, 0.0f);
    for (size_t i = 0; i < history; ++i)
      trace_.energy[i % dim] += base_[i] * base_[i] / static_cast<float>(kHistoryGroups * heads);
    trace_.queries.assign(base_.begin() + static_cast<ptrdiff_t>(history), base_.end());
    const auto seen = static_cast<ptrdiff_t>(history / 2);  // the last 32 groups
    trace_.history.assign(base_.begin() + seen, base_.begin() + 2 * seen);
    for (uint32_t q = 0; spec_.follow && q < spec_.query_count; ++q)
      trace_.asked_after.push_back(TokensAt(kHistoryGroups + q));
    if (!spec_.local) return;
    // Sinks have no value; the window is about the query's topic. Their logits follow from the
    // masses wanted.
    const size_t rows = size_t{spec_.query_count} * heads;
    trace_.local_lse.resize(rows);
    trace_.local_out.resize(rows * dim);
    std::vector<float> scores(size_t{heads} * (spec_.keys + spec_.extra_keys));
    for (uint32_t q = 0; q < spec_.query_count; ++q) {
      const uint32_t tokens = TokensAt(kHistoryGroups + q);
      DotRows(trace_.Query(q), heads, trace_.k.data(), spec_.dtype, tokens, dim, scores.data(),
              tokens);
      for (uint32_t h = 0; h < heads; ++h) {
        float* x = scores.data() + size_t{h} * tokens;
        const float max = MaxOf(x, tokens);
        const float lse = max + std::log(ExpShifted(x, tokens, max, x));
        const size_t at = size_t{q} * heads + h;
        const float local = kLocal * (1 - head_.sink);
        const float outside = head_.sink + local;
        trace_.local_lse[at] = lse + std::log(outside / (1 - outside));
        const float* values = topic_values_.data() + size_t{query_topic_[at]} * dim;
        for (uint32_t j = 0; j < dim; ++j) {
          const float mean = std::sqrt(0.5f) * (values[j] + 0.3f * random_.Normal());
          trace_.local_out[at * dim + j] = mean * local / outside;
        }
      }
    }
  }

  // RoPE pairs are (i, i + half), as in the models served.
  void SetPair(std::vector<float>* row, uint32_t i, float x, float y) const {
    (*row)[i] = x;
    (*row)[i + half_] = y;
  }
  template <typename F>
  void AddContent(std::vector<float>* row, F&& at) const {
    for (uint32_t c = 0; c < content_ / 2; ++c) {
      (*row)[content_begin_ + c] += at(2 * c);
      (*row)[content_begin_ + c + half_] += at(2 * c + 1);
    }
  }
  void Rotate(std::vector<float>* row, uint32_t position) {
    if (frequency_.empty())
      for (uint32_t i = 0; i < half_; ++i)
        frequency_.push_back(
            std::pow(kRopeBase, -static_cast<float>(i) / static_cast<float>(half_)));
    for (uint32_t i = 0; i < half_; ++i) {
      const float angle = static_cast<float>(position) * frequency_[i];
      const float c = std::cos(angle), s = std::sin(angle), x = (*row)[i], y = (*row)[i + half_];
      SetPair(row, i, c * x - s * y, s * x + c * y);
    }
  }

  const TraceSpec& spec_;
  const HeadClass head_;
  TraceRandom random_, own_text_, own_look_;
  TraceRandom& text_;  // what the tokens are
  TraceRandom& look_;  // what the queries are after
  const uint32_t half_, content_begin_, content_;
  const float spread_;
  const uint32_t steps_;  // of decoding from one query to the next
  Trace trace_;
  std::vector<float> topics_, types_, topic_values_, constant_, query_constant_, frequency_;
  std::vector<double> zipf_;
  std::vector<uint32_t> token_topic_, token_type_, query_topic_;
  std::vector<float> base_, direction_;  // [history + queries, group, dim]
};

}  // namespace

Result<Trace> MakeCalibratedTrace(const TraceSpec& spec, const std::string& head_class) {
  std::string names;
  for (const HeadClass& head : kClasses) {
    if (head_class == head.name) return Generator(spec, head).Run();
    names += names.empty() ? head.name : std::string(", ") + head.name;
  }
  return InvalidArgument("head class '" + head_class + "' is unknown; use calibrated: and one of " +
                         names);
}

}  // namespace icecache
