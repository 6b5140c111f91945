// The ways to attend, against attention in float64 over the tokens that each of them should see.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <set>

#include "kernels/gpu/attention_gpu.h"
#include "kernels/gpu/device_frames.h"
#include "kernels/gpu/page_intake.h"
#include "worker/attention_exact.h"
#include "worker/attention_full.h"
#include "worker/attention_icecache.h"
#include "worker/attention_sink_window.h"
#include "worker/prefetch.h"
#include "worker/test_served.h"

namespace icecache {
namespace {

using test::AttendReference;
using test::MaxDifference;
using test::Sequence;
using test::ServedDocument;
using test::SmallShape;

constexpr double kTolerance = 2e-5;  // f32 sums against float64, values of a few units

std::vector<uint32_t> Range(uint32_t begin, uint32_t end) {
  std::vector<uint32_t> tokens(end - begin);
  std::iota(tokens.begin(), tokens.end(), begin);
  return tokens;
}

// One decode step of `token` at its place in the sequence.
std::vector<float> Step(LayerAttention& attention, const Sequence& s, LayerId layer, uint32_t token,
                        const std::vector<float>& q) {
  std::vector<float> out(q.size());
  const Status status =
      attention.Attend(layer, TokenPos(token), 1, q.data(), s.k.data() + token * s.row(),
                       s.v.data() + token * s.row(), out.data());
  EXPECT_TRUE(status.ok()) << status.ToString();
  return out;
}

class LocalMethods : public ::testing::TestWithParam<DType> {
 protected:
  LocalMethods()
      : shape_(SmallShape(1, 2, 3, 32, GetParam())),
        rng_(31),
        sequence_(shape_, rng_, 160),
        backend_(MakeCpuAttention()) {}
  std::vector<float> Query() {
    return test::RandomFloats(rng_, size_t{shape_.query_heads} * shape_.head_dim, 0.5f);
  }
  LayerRows Document(uint32_t tokens) {
    LayerRows rows(shape_, TokenPos(0), tokens);
    std::vector<float> k = sequence_.k, v = sequence_.v;
    rows.RoundAndStore(0, tokens, k.data(), v.data());
    return rows;
  }
  void Expect(const std::vector<float>& out, const std::vector<float>& q, uint32_t head,
              const std::vector<uint32_t>& tokens) {
    EXPECT_LT(MaxDifference(out.data() + head * shape_.head_dim,
                            AttendReference(sequence_, head, q.data(), tokens)),
              kTolerance);
  }

  const ModelShape shape_;
  std::mt19937_64 rng_;
  const Sequence sequence_;
  const std::unique_ptr<AttentionBackend> backend_;
};

INSTANTIATE_TEST_SUITE_P(DTypes, LocalMethods,
                         ::testing::Values(DType::kF32, DType::kF16, DType::kBF16),
                         [](const auto& i) { return std::string(DTypeName(i.param)); });

TEST_P(LocalMethods, FullKvSeesEveryTokenUpToItsOwn) {
  LocalKv kv(shape_);
  kv.Append(LayerId(0), Document(100));
  AttentionFull full(shape_, kv, *backend_);
  for (uint32_t t = 100; t < 110; ++t) {
    const std::vector<float> q = Query();
    const std::vector<float> out = Step(full, sequence_, LayerId(0), t, q);
    for (uint32_t h = 0; h < shape_.query_heads; ++h) Expect(out, q, h, Range(0, t + 1));
  }
  EXPECT_EQ(full.kv_bytes(), uint64_t{110} * shape_.token_bytes());
  EXPECT_DOUBLE_EQ(full.stats().tokens_per_head(), 105.5);
  kv.Truncate(100);
  EXPECT_EQ(kv.tokens(LayerId(0)), 100u);
}

TEST_P(LocalMethods, ABlockOfTokensIsCausal) {
  LocalKv kv(shape_);
  kv.Append(LayerId(0), Document(100));
  AttentionFull full(shape_, kv, *backend_);
  const size_t q_row = size_t{shape_.query_heads} * shape_.head_dim;
  const std::vector<float> q = test::RandomFloats(rng_, 4 * q_row, 0.5f);
  std::vector<float> out(4 * q_row);
  ASSERT_TRUE(full.Attend(LayerId(0), TokenPos(100), 4, q.data(),
                          sequence_.k.data() + 100 * sequence_.row(),
                          sequence_.v.data() + 100 * sequence_.row(), out.data())
                  .ok());
  for (uint32_t t = 0; t < 4; ++t) {
    const std::vector<float> one_q(q.begin() + static_cast<ptrdiff_t>(t * q_row),
                                   q.begin() + static_cast<ptrdiff_t>((t + 1) * q_row));
    const std::vector<float> one(out.begin() + static_cast<ptrdiff_t>(t * q_row),
                                 out.begin() + static_cast<ptrdiff_t>((t + 1) * q_row));
    for (uint32_t h = 0; h < shape_.query_heads; ++h) Expect(one, one_q, h, Range(0, 101 + t));
  }
}

TEST_P(LocalMethods, ExactSeesTheTokensWithTheLargestLogits) {
  LocalKv kv(shape_);
  kv.Append(LayerId(0), Document(150));
  const SparseBudget budget{40, 4, 8};
  AttentionExact exact(shape_, kv, *backend_, budget);
  const std::vector<float> q = Query();
  const std::vector<float> out = Step(exact, sequence_, LayerId(0), 150, q);
  for (uint32_t h = 0; h < shape_.query_heads; ++h) {
    std::vector<uint32_t> middle = Range(4, 151 - 8);
    const auto logit = [&](uint32_t t) {
      double sum = 0;
      for (uint32_t d = 0; d < 32; ++d) {
        sum += double{q[h * 32 + d]} * sequence_.k[t * sequence_.row() + (h / 3) * 32 + d];
      }
      return sum;
    };
    std::sort(middle.begin(), middle.end(),
              [&](uint32_t a, uint32_t b) { return logit(a) > logit(b); });
    middle.resize(28);
    for (const uint32_t t : Range(0, 4)) middle.push_back(t);
    for (const uint32_t t : Range(143, 151)) middle.push_back(t);
    Expect(out, q, h, middle);
  }
  EXPECT_DOUBLE_EQ(exact.stats().tokens_per_head(), 40);
}

TEST_P(LocalMethods, ExactWithABudgetForAllIsFullAttention) {
  LocalKv kv(shape_);
  kv.Append(LayerId(0), Document(150));
  AttentionExact exact(shape_, kv, *backend_, {1000, 4, 8});
  const std::vector<float> q = Query();
  const std::vector<float> out = Step(exact, sequence_, LayerId(0), 150, q);
  for (uint32_t h = 0; h < shape_.query_heads; ++h) Expect(out, q, h, Range(0, 151));
  EXPECT_DOUBLE_EQ(exact.stats().tokens_per_head(), 151);
}

TEST_P(LocalMethods, SinkWindowSeesNothingElse) {
  SinkWindow window(shape_, 4, 8);
  window.LoadDocument(LayerId(0), Document(100));
  AttentionSinkWindow attention(shape_, *backend_);
  attention.Begin(window);
  for (uint32_t t = 100; t < 120; ++t) {
    const std::vector<float> q = Query();
    const std::vector<float> out = Step(attention, sequence_, LayerId(0), t, q);
    std::vector<uint32_t> tokens = Range(0, 4);
    for (const uint32_t recent : Range(t + 1 - 8, t + 1)) tokens.push_back(recent);
    for (uint32_t h = 0; h < shape_.query_heads; ++h) Expect(out, q, h, tokens);
  }
  EXPECT_DOUBLE_EQ(attention.stats().tokens_per_head(), 12);
}

class ServedMethod : public ::testing::Test {
 protected:
  static constexpr uint32_t kTokens = 300, kSinks = 4, kWindow = 8;
  ServedMethod()
      : served_(SmallShape(2, 2, 2, 16), kSinks, kWindow, kTokens, 80, 2, 5),
        rng_(77),
        backend_(MakeCpuAttention()) {
    EXPECT_TRUE(served_.Upload().ok());
  }
  std::unique_ptr<AttentionIceCache> Make(uint32_t budget, bool residual = true) {
    IceCacheOptions options;
    options.budget = {budget, kSinks, kWindow};
    options.residual = residual;
    options.select_deadline = std::chrono::milliseconds(300);
    options.frames = frames_.get();
    options.intake = intake_.get();
    auto attention =
        std::make_unique<AttentionIceCache>(served_.shape, *served_.client, *backend_, options);
    attention->Begin(served_.handle, served_.window_state, served_.grant.context.segments);
    return attention;
  }
  std::vector<float> Query() {
    return test::RandomFloats(rng_, size_t{served_.shape.query_heads} * 16, 0.5f);
  }
  // Largest difference to full attention of one step in every layer.
  double StepError(AttentionIceCache& attention, uint32_t token) {
    double worst = 0;
    for (uint16_t l = 0; l < served_.shape.layers; ++l) {
      const std::vector<float> q = Query();
      const std::vector<float> out = Step(attention, served_.layers[l], LayerId(l), token, q);
      if (device_ != nullptr) {
        EXPECT_TRUE(device_->Synchronize().ok());  // it is written by then
      }
      for (uint32_t h = 0; h < served_.shape.query_heads; ++h) {
        worst = std::max(worst, MaxDifference(out.data() + h * 16,
                                              AttendReference(served_.layers[l], h, q.data(),
                                                              Range(0, token + 1))));
      }
    }
    return worst;
  }

  ServedDocument served_;
  std::mt19937_64 rng_;
  // Of a device, where a test has one.
  std::unique_ptr<gpu::Device> device_;
  std::unique_ptr<gpu::DeviceFrames> frames_;
  std::unique_ptr<gpu::PageIntake> intake_;
  std::unique_ptr<AttentionBackend> backend_;
};

// What becomes of pages, in frames of the host's and in frames of a device's, which verifies them.
class ServedPages : public ServedMethod, public ::testing::WithParamInterface<bool> {
 protected:
  void SetUp() override {
    if (!GetParam()) return;
    if (gpu::kEmulatorIsSlow) GTEST_SKIP() << "kernels are not emulated under ThreadSanitizer";
    device_ = gpu::MakeEmulatedDevice({});
    frames_ = std::make_unique<gpu::DeviceFrames>(*device_);
    intake_ = gpu::PageIntake::Make(*device_).value();
    backend_ = gpu::MakeGpuAttention(*device_, frames_.get());
  }
};

INSTANTIATE_TEST_SUITE_P(Frames, ServedPages, ::testing::Bool(),
                         [](const auto& i) { return i.param ? "Device" : "Host"; });

TEST_P(ServedPages, ADamagedPageIsFetchedAgainAndNothingIsLost) {
  auto attention = Make(100);
  const uint32_t steps = GetParam() ? 4 : 40;  // the emulator takes its time
  for (uint32_t t = kTokens; t < kTokens + steps; ++t) {
    served_.shards[t % 2]->corrupt_pages = 1;
    EXPECT_LT(StepError(*attention, t), kTolerance);
  }
  EXPECT_GT(attention->stats().bad_pages, steps / 4);
  EXPECT_EQ(attention->stats().degraded_steps, 0u);
}

TEST_P(ServedPages, APageThatStaysDamagedIsLeftOutAndCounted) {
  auto attention = Make(100);
  served_.shards[0]->corrupt_pages = 1;
  served_.shards[0]->corrupt_refetches = 1;
  const double error = StepError(*attention, kTokens);
  EXPECT_GT(error, kTolerance);  // its tokens are missing
  EXPECT_LT(error, 5);           // and its damaged bytes are not attended to
  EXPECT_EQ(attention->stats().degraded_steps, 1u);
  EXPECT_EQ(attention->stats().bad_pages, 2u);
  EXPECT_LT(StepError(*attention, kTokens + 1), kTolerance);
}

TEST_P(ServedPages, APositionOutsideTheIndexIsNotBelieved) {
  auto attention = Make(60);
  served_.shards[0]->wrong_positions = 1;
  EXPECT_LT(StepError(*attention, kTokens), kTolerance);
  EXPECT_GT(attention->stats().bad_pages, 0u);
}

TEST_P(ServedPages, APageNamedTwiceIsAttendedOnce) {
  auto attention = Make(100);
  StepError(*attention, kTokens);
  served_.shards[0]->repeat_pages = 1;
  StepError(*attention, kTokens + 1);
  EXPECT_GT(attention->stats().bad_pages, 0u);
  EXPECT_LT(StepError(*attention, kTokens + 2), kTolerance);
}

TEST_F(ServedMethod, EveryTokenCountsOnceWhateverTheBudget) {
  for (const uint32_t budget : {12u, 30u, 100u, 100000u}) {
    SCOPED_TRACE(budget);
    ServedDocument fresh(SmallShape(2, 2, 2, 16), kSinks, kWindow, kTokens, 80, 2, budget);
    ASSERT_TRUE(fresh.Upload().ok());
    IceCacheOptions options;
    options.budget = {budget, kSinks, kWindow};
    AttentionIceCache attention(fresh.shape, *fresh.client, *backend_, options);
    attention.Begin(fresh.handle, fresh.window_state, fresh.grant.context.segments);
    // With the exact residual of the test's server, any budget gives full attention: tokens of the
    // document, of the window, and those that left it a step or long ago.
    for (uint32_t t = kTokens; t < kTokens + 80; ++t) {
      for (uint16_t l = 0; l < fresh.shape.layers; ++l) {
        const std::vector<float> q = Query();
        const std::vector<float> out = Step(attention, fresh.layers[l], LayerId(l), t, q);
        for (uint32_t h = 0; h < fresh.shape.query_heads; ++h) {
          ASSERT_LT(MaxDifference(out.data() + h * 16,
                                  AttendReference(fresh.layers[l], h, q.data(), Range(0, t + 1))),
                    kTolerance)
              << "token " << t << " layer " << l << " head " << h;
        }
      }
    }
    EXPECT_EQ(attention.stats().degraded_steps, 0u);
    EXPECT_EQ(attention.stats().bad_pages, 0u);
  }
}

TEST_F(ServedMethod, ResidentPagesAreNotSentAgain) {
  auto attention = Make(100000);
  StepError(*attention, kTokens);
  int sent = 0;
  for (auto& shard : served_.shards) sent += std::exchange(shard->rows_sent, 0);
  EXPECT_EQ(sent, 2 * 2 * (300 - 12));  // layers, heads, everything between sinks and window
  for (uint32_t t = kTokens + 1; t < kTokens + 20; ++t) StepError(*attention, t);
  sent = 0;
  for (auto& shard : served_.shards) sent += shard->rows_sent;
  EXPECT_EQ(sent,
            2 * 2 * 19);  // each token that left the window travels back once, in a grown page
  EXPECT_GT(attention->stats().hit_rate(), 0.8);
}

TEST_F(ServedMethod, ASilentShardDegradesTheStepAndLosesNoToken) {
  auto attention = Make(100);
  for (uint32_t t = kTokens; t < kTokens + 12; ++t) EXPECT_LT(StepError(*attention, t), kTolerance);
  served_.shards[0]->silent_selects = 1;
  const double error = StepError(*attention, kTokens + 12);
  EXPECT_GT(error, kTolerance);
  EXPECT_EQ(attention->stats().degraded_steps, 1u);
  for (uint32_t t = kTokens + 13; t < kTokens + 40; ++t) {
    EXPECT_LT(StepError(*attention, t), kTolerance) << t;
  }
  EXPECT_EQ(attention->stats().degraded_steps, 1u);
}

TEST_F(ServedMethod, ALostServerIsUnavailable) {
  auto attention = Make(100);
  StepError(*attention, kTokens);
  served_.shards[1]->Die();
  const std::vector<float> q = Query();
  std::vector<float> out(q.size());
  const Sequence& s = served_.layers[0];
  const Status status = attention->Attend(LayerId(0), TokenPos(kTokens + 1), 1, q.data(),
                                          s.k.data() + (kTokens + 1) * s.row(),
                                          s.v.data() + (kTokens + 1) * s.row(), out.data());
  EXPECT_EQ(status.code(), StatusCode::kUnavailable) << status.ToString();
}

TEST_F(ServedMethod, TokensAttendedAreSinksWindowAndPages) {
  auto attention = Make(4 + 8 + 5 * 16);
  StepError(*attention, kTokens);
  EXPECT_DOUBLE_EQ(attention->stats().tokens_per_head(), 4 + 8 + 5 * 16);
  EXPECT_GT(attention->stats().bytes_moved, 0u);
  auto none = Make(12);
  StepError(*none, kTokens);
  EXPECT_DOUBLE_EQ(none->stats().tokens_per_head(), 12);
}

// The test's server answers exactly, so whatever a step's pages and residual were asked with, a
// step is right when the residual's queries are those of the step.
TEST_F(ServedMethod, AskingAheadGivesTheSameAnswerToTheSameQuestion) {
  IceCacheOptions options;
  options.budget = {60, kSinks, kWindow};
  options.prefetch = true;
  options.prefetch_cosine = 0.99f;
  AttentionIceCache attention(served_.shape, *served_.client, *backend_, options);
  attention.Begin(served_.handle, served_.window_state, served_.grant.context.segments);
  const std::vector<float> q = Query();
  for (uint32_t t = kTokens; t < kTokens + 30; ++t) {
    for (uint16_t l = 0; l < served_.shape.layers; ++l) {
      const std::vector<float> out = Step(attention, served_.layers[l], LayerId(l), t, q);
      for (uint32_t h = 0; h < served_.shape.query_heads; ++h) {
        ASSERT_LT(MaxDifference(out.data() + h * 16,
                                AttendReference(served_.layers[l], h, q.data(), Range(0, t + 1))),
                  kTolerance)
            << t;
      }
    }
  }
  EXPECT_EQ(attention.stats().asked_ahead, 29u * 2 * 2);
  EXPECT_EQ(attention.stats().asked_again, 0u);
  EXPECT_EQ(attention.stats().degraded_steps, 0u);
}

TEST_F(ServedMethod, HeadsWhoseQueriesMovedAreAskedAgainAndOnlyThose) {
  IceCacheOptions options;
  options.budget = {60, kSinks, kWindow};
  options.prefetch = true;
  options.prefetch_cosine = 0.9f;
  AttentionIceCache attention(served_.shape, *served_.client, *backend_, options);
  attention.Begin(served_.handle, served_.window_state, served_.grant.context.segments);
  std::vector<float> q = Query();
  for (uint32_t t = kTokens; t < kTokens + 20; ++t) {
    // The second kv head's queries are new in every step, the first one's stay.
    const std::vector<float> other = Query();
    std::copy(other.begin() + 2 * 16, other.end(), q.begin() + 2 * 16);
    for (uint16_t l = 0; l < served_.shape.layers; ++l) {
      const std::vector<float> out = Step(attention, served_.layers[l], LayerId(l), t, q);
      for (uint32_t h = 0; h < served_.shape.query_heads; ++h) {
        ASSERT_LT(MaxDifference(out.data() + h * 16,
                                AttendReference(served_.layers[l], h, q.data(), Range(0, t + 1))),
                  kTolerance)
            << "token " << t << " head " << h;
      }
    }
  }
  EXPECT_EQ(attention.stats().asked_ahead, 19u * 2 * 2);
  EXPECT_EQ(attention.stats().asked_again, 19u * 2);
}

TEST_F(ServedMethod, WithPrefetchEveryTokenStillCountsOnceWhenQueriesMove) {
  for (const uint32_t window : {8u, 0u}) {
    SCOPED_TRACE(window);
    ServedDocument fresh(SmallShape(2, 2, 2, 16), kSinks, window, kTokens, 60, 2, 3);
    ASSERT_TRUE(fresh.Upload().ok());
    IceCacheOptions options;
    options.budget = {80, kSinks, window};
    options.prefetch = true;
    options.prefetch_cosine = 1.5f;  // nothing is ever alike enough
    AttentionIceCache attention(fresh.shape, *fresh.client, *backend_, options);
    attention.Begin(fresh.handle, fresh.window_state, fresh.grant.context.segments);
    for (uint32_t t = kTokens; t < kTokens + 60; ++t) {
      // An answer that does not come degrades this step; no token is lost for those after it.
      if (t == kTokens + 20) fresh.shards[1]->silent_selects = 1;
      for (uint16_t l = 0; l < fresh.shape.layers; ++l) {
        const std::vector<float> q = Query();
        const std::vector<float> out = Step(attention, fresh.layers[l], LayerId(l), t, q);
        for (uint32_t h = 0; h < fresh.shape.query_heads; ++h) {
          ASSERT_LT(MaxDifference(out.data() + h * 16,
                                  AttendReference(fresh.layers[l], h, q.data(), Range(0, t + 1))),
                    t == kTokens + 20 ? 5 : kTolerance)
              << "token " << t << " layer " << l << " head " << h;
        }
      }
    }
    EXPECT_EQ(attention.stats().degraded_steps, 1u);
    EXPECT_EQ(attention.stats().asked_again, attention.stats().asked_ahead);
  }
}

TEST_F(ServedMethod, WhatWasAskedAheadIsDroppedWithItsContext) {
  IceCacheOptions options;
  options.budget = {60, kSinks, kWindow};
  options.prefetch = true;
  {
    AttentionIceCache attention(served_.shape, *served_.client, *backend_, options);
    attention.Begin(served_.handle, served_.window_state, served_.grant.context.segments);
    StepError(attention, kTokens);
  }
  for (int i = 0; i < 100; ++i) served_.loop.reactor.Poll();  // answers to nobody
  // The server is a token ahead of this state, as it is of no fork that starts anew.
  auto plain = Make(60);
  EXPECT_LT(StepError(*plain, kTokens), 1);
  EXPECT_EQ(plain->stats().degraded_steps, 0u);
}

TEST_F(ServedMethod, LayersBehindAnAnchorLookNearWhatItChose) {
  IceCacheOptions options;
  options.budget = {60, kSinks, kWindow};
  options.layer_reuse = 2;
  AttentionIceCache attention(served_.shape, *served_.client, *backend_, options);
  attention.Begin(served_.handle, served_.window_state, served_.grant.context.segments);
  for (uint32_t t = kTokens; t < kTokens + 10; ++t) {
    EXPECT_LT(StepError(attention, t), kTolerance);  // the test's server looks everywhere
  }
  // Layer 0 asks without, layer 1 with the positions of 3 pages of 16 for each of its two heads.
  uint64_t near = 0, anchors_near = 0;
  for (const auto& shard : served_.shards) {
    near += shard->near_positions[1];
    anchors_near += shard->near_positions[0];
  }
  EXPECT_EQ(anchors_near, 0u);
  EXPECT_GT(near, 10u * 2 * 2 * 16);  // the newest page may not be full
  EXPECT_LE(near, 10u * 2 * 3 * 16);
}

TEST(Prefetch, MovedHeadsAreThoseWithAnyQueryBelowTheCosine) {
  const ModelShape shape = SmallShape(1, 3, 2, 16);
  std::vector<float> before(6 * 16, 0.0f), now = before;
  for (uint32_t h = 0; h < 6; ++h) before[h * 16 + 2] = now[h * 16 + 2] = 2;
  now[3 * 16 + 3] = 2;  // 45 degrees, in the second kv head
  now[4 * 16 + 2] = 5;  // longer, same direction
  EXPECT_NEAR(SmallestCosine(before.data() + 32, now.data() + 32, 2, 16), 0.7071f, 1e-3);
  EXPECT_EQ(MovedHeads(shape, before.data(), now.data(), 0.8f), std::vector{KvHeadId(1)});
  EXPECT_TRUE(MovedHeads(shape, before.data(), now.data(), 0.6f).empty());
  now[5 * 16 + 2] = std::nanf("");
  EXPECT_EQ(MovedHeads(shape, before.data(), now.data(), 0.6f), std::vector{KvHeadId(2)});
  const std::vector<float> zeros(6 * 16, 0.0f);
  EXPECT_TRUE(MovedHeads(shape, zeros.data(), zeros.data(), 0.8f).empty());
  EXPECT_EQ(MovedHeads(shape, zeros.data(), before.data(), 0.8f).size(), 3u);
}

}  // namespace
}  // namespace icecache
