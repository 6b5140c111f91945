#include "worker/decode_loop.h"

#include <gtest/gtest.h>

#include "worker/attention_full.h"
#include "worker/attention_icecache.h"
#include "worker/prefill.h"
#include "worker/test_model.h"
#include "worker/test_served.h"

namespace icecache {
namespace {

using test::RandomModel;
using test::RandomTokens;

std::vector<int32_t> GenerateGreedily(DecodeLoop& loop, uint32_t count) {
  std::vector<int32_t> said;
  Sampler greedy{SamplerOptions{}};
  const Status status = loop.Generate(greedy, count, {}, [&](int32_t token) {
    said.push_back(token);
    return true;
  });
  EXPECT_TRUE(status.ok()) << status.ToString();
  return said;
}

TEST(Prefill, EqualsFeedingTokenByToken) {
  RandomModel model(3);
  const std::vector<int32_t> tokens = RandomTokens(model.rng(), 700);
  const auto backend = MakeCpuAttention();
  LocalKv prefilled(model.shape()), fed(model.shape());
  int pumps = 0;
  uint64_t last_done = 0;
  PrefillOptions options;
  options.threads = 2;
  options.pump = [&] {
    ++pumps;
    return OkStatus();
  };
  options.progress = [&](uint64_t done, uint64_t total) {
    EXPECT_GT(done, last_done);
    EXPECT_EQ(total, 2100u);
    last_done = done;
  };
  const auto hidden = Prefill(model, tokens, options, [&](FinishedLayer layer) -> Status {
    EXPECT_EQ(layer.query_energy.size(), 32u);
    prefilled.Append(layer.layer, *layer.rows);
    return OkStatus();
  });
  ASSERT_TRUE(hidden.ok()) << hidden.status().ToString();
  EXPECT_EQ(last_done, 2100u);
  EXPECT_GT(pumps, 3);

  AttentionFull full(model.shape(), fed, *backend);
  DecodeLoop loop(model, full, {});
  loop.Begin(0);
  for (const int32_t token : tokens) ASSERT_TRUE(loop.Feed(token).ok());
  DecodeLoop from_prefill(model, full, {});
  from_prefill.Begin(700, *hidden);
  const auto logits = loop.Logits(), prefill_logits = from_prefill.Logits();
  ASSERT_TRUE(logits.ok() && prefill_logits.ok());
  for (uint32_t i = 0; i < model.vocab_size(); ++i) {
    EXPECT_NEAR((*prefill_logits)[i], (*logits)[i], 2e-3) << i;
  }
  for (uint16_t l = 0; l < 3; ++l) {
    const TokenRows a = prefilled.rows(LayerId(l), KvHeadId(1));
    const TokenRows b = fed.rows(LayerId(l), KvHeadId(1));
    ASSERT_EQ(a.count, b.count);
    std::vector<float> x(size_t{a.count} * 16), y(x.size());
    ToF32(a.k, a.dtype, x.size(), x.data());
    ToF32(b.k, b.dtype, y.size(), y.data());
    for (size_t i = 0; i < x.size(); ++i) ASSERT_NEAR(x[i], y[i], 5e-3) << "layer " << l;
  }
}

TEST(Prefill, QueryEnergyIsTheMeanSquareOfTheLastQueries) {
  RandomModel model(4);
  const std::vector<int32_t> tokens = RandomTokens(model.rng(), 10);
  // With one layer's queries known from the first layer's input, compute them again by hand.
  class Recorder final : public LayerAttention {
   public:
    Status Attend(LayerId layer, TokenPos, uint32_t count, const float* query, const float*,
                  const float*, float* out) override {
      if (layer.value == 0) q.assign(query, query + size_t{count} * 4 * 16);
      std::fill_n(out, size_t{count} * 4 * 16, 0.0f);
      return OkStatus();
    }
    std::vector<float> q;
  } recorder;
  std::vector<float> hidden(10 * model.hidden_size());
  ASSERT_TRUE(model.Embed(tokens, hidden.data()).ok());
  ASSERT_TRUE(model.Layer(LayerId(0), TokenPos(0), 10, hidden.data(), recorder).ok());
  std::vector<float> energy;
  ASSERT_TRUE(Prefill(model, tokens, {}, [&](FinishedLayer layer) -> Status {
                if (layer.layer.value == 0) energy = layer.query_energy;
                return OkStatus();
              }).ok());
  for (uint32_t head = 0; head < 2; ++head) {
    for (uint32_t d = 0; d < 16; ++d) {
      double sum = 0;
      for (uint32_t t = 0; t < 10; ++t) {
        for (uint32_t g = 0; g < 2; ++g) {
          const double x = recorder.q[(t * 4 + head * 2 + g) * 16 + d];
          sum += x * x;
        }
      }
      EXPECT_NEAR(energy[head * 16 + d], sum / 20, 1e-4 * (1 + sum));
    }
  }
}

TEST(Prefill, StopsWhenAskedTo) {
  RandomModel model(5);
  PrefillOptions options;
  options.pump = [] { return Cancelled("interrupted"); };
  const auto hidden = Prefill(model, RandomTokens(model.rng(), 300), options,
                              [](const FinishedLayer&) { return OkStatus(); });
  EXPECT_EQ(hidden.status().code(), StatusCode::kCancelled);
  EXPECT_EQ(Prefill(model, {}, {}, {}).status().code(), StatusCode::kInvalidArgument);
}

// The whole path of a worker against shards in the same process: prefill, upload, question,
// generation.
std::vector<int32_t> GenerateServed(RandomModel& model, const std::vector<int32_t>& document,
                                    const std::vector<int32_t>& question, uint32_t budget,
                                    uint32_t count, AttentionStats* stats) {
  test::ServedDocument served(model.shape(), 4, 8, static_cast<uint32_t>(document.size()), 0, 2, 1);
  const auto hidden = served.PrefillFrom(model, document);
  EXPECT_TRUE(hidden.ok());
  const auto backend = MakeCpuAttention();
  IceCacheOptions options;
  options.budget = {budget, 4, 8};
  AttentionIceCache attention(model.shape(), *served.client, *backend, options);
  attention.Begin(served.handle, served.window_state, served.grant.context.segments);
  DecodeLoop loop(model, attention, [&] { return served.client->Health(); });
  loop.Begin(static_cast<uint32_t>(document.size()), *hidden);
  for (const int32_t token : question) EXPECT_TRUE(loop.Feed(token).ok());
  const std::vector<int32_t> said = GenerateGreedily(loop, count);
  *stats = loop.stats().attention;
  EXPECT_EQ(loop.stats().tokens, question.size() + count - 1);
  return said;
}

TEST(DecodeLoop, IcecacheWithUnlimitedBudgetSaysWhatFullKvSays) {
  for (const size_t length : {3u, 10u, 15u, 400u}) {
    SCOPED_TRACE(length);
    RandomModel model(length);
    const std::vector<int32_t> document = RandomTokens(model.rng(), length);
    const std::vector<int32_t> question = RandomTokens(model.rng(), 5);
    LocalKv kv(model.shape());
    const auto hidden = Prefill(model, document, {}, [&](FinishedLayer layer) -> Status {
      kv.Append(layer.layer, *layer.rows);
      return OkStatus();
    });
    ASSERT_TRUE(hidden.ok());
    const auto backend = MakeCpuAttention();
    AttentionFull full(model.shape(), kv, *backend);
    DecodeLoop loop(model, full, {});
    loop.Begin(static_cast<uint32_t>(length), *hidden);
    for (const int32_t token : question) ASSERT_TRUE(loop.Feed(token).ok());
    const std::vector<int32_t> expected = GenerateGreedily(loop, 60);

    AttentionStats stats;
    EXPECT_EQ(GenerateServed(model, document, question, 1000000, 60, &stats), expected);
    EXPECT_EQ(stats.degraded_steps, 0u);
    AttentionStats small;
    EXPECT_EQ(GenerateServed(model, document, question, 44, 60, &small), expected)
        << "the test's server computes the residual exactly";
    EXPECT_LT(small.tokens_per_head(), 45);
  }
}

TEST(DecodeLoop, StopsAtAStopTokenAndWhenThePumpSaysSo) {
  RandomModel model(9);
  LocalKv kv(model.shape());
  const auto backend = MakeCpuAttention();
  AttentionFull full(model.shape(), kv, *backend);
  int left = 1000;
  DecodeLoop loop(model, full,
                  [&] { return --left > 0 ? OkStatus() : Unavailable("server gone"); });
  loop.Begin(0);
  ASSERT_TRUE(loop.Feed(1).ok());
  const std::vector<int32_t> said = GenerateGreedily(loop, 30);
  ASSERT_EQ(said.size(), 30u);

  kv.Truncate(0);
  loop.Begin(0);
  ASSERT_TRUE(loop.Feed(1).ok());
  const int32_t stop[] = {said[4]};
  std::vector<int32_t> shorter;
  Sampler greedy{SamplerOptions{}};
  ASSERT_TRUE(loop.Generate(greedy, 30, stop,
                            [&](int32_t t) {
                              shorter.push_back(t);
                              return true;
                            })
                  .ok());
  const auto first = std::find(said.begin(), said.end(), said[4]);
  EXPECT_EQ(shorter, std::vector<int32_t>(said.begin(), first));

  left = 3;
  kv.Truncate(0);
  loop.Begin(0);
  ASSERT_TRUE(loop.Feed(1).ok());
  EXPECT_EQ(loop.Generate(greedy, 30, {}, [](int32_t) { return true; }).code(),
            StatusCode::kUnavailable);
}

}  // namespace
}  // namespace icecache
