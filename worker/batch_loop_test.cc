// Sequences that decode together say what each of them says alone, and one's trouble is not
// another's.
#include "worker/batch_loop.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>

#include "worker/decode_loop.h"
#include "worker/prefill.h"
#include "worker/test_model.h"
#include "worker/test_served.h"

namespace icecache {
namespace {

using test::RandomModel;
using test::RandomTokens;

constexpr uint32_t kSinks = 4, kWindow = 8;

struct Ask {
  std::vector<int32_t> question;
  uint32_t budget = 1000000;
  uint32_t count = 20;
  SamplerOptions sampling;
  bool prefetch = false;
};

class Batch : public ::testing::Test {
 protected:
  static constexpr uint32_t kDocument = 150;

  Batch() : document_(RandomTokens(model_.rng(), kDocument)) {}

  static IceCacheOptions Options(const Ask& ask) {
    IceCacheOptions options;
    options.budget = {ask.budget, kSinks, kWindow};
    options.prefetch = ask.prefetch;
    options.select_deadline = std::chrono::milliseconds(300);
    return options;
  }

  std::vector<int32_t> Alone(const Ask& ask) {
    test::ServedDocument served(model_.shape(), kSinks, kWindow, kDocument, 0, 2, 1);
    EXPECT_TRUE(served.PrefillFrom(model_, document_).ok());
    const auto backend = MakeCpuAttention();
    AttentionIceCache attention(model_.shape(), *served.client, *backend, Options(ask));
    attention.Begin(served.handle, served.window_state, served.grant.context.segments);
    DecodeLoop loop(model_, attention, {});
    loop.Begin(kDocument);
    for (const int32_t token : ask.question) EXPECT_TRUE(loop.Feed(token).ok());
    std::vector<int32_t> said;
    Sampler sampler(ask.sampling);
    EXPECT_TRUE(loop.Generate(sampler, ask.count, {}, [&](int32_t token) {
                      said.push_back(token);
                      return true;
                    }).ok());
    return said;
  }

  RandomModel model_{17};
  const std::vector<int32_t> document_;
};

class Together : public Batch {
 protected:
  struct Sequence {
    std::unique_ptr<AttentionIceCache> attention;
    std::vector<int32_t> said;
    Status status = Internal("has not ended");
  };

  // Contexts 5, 6, ... of one server with the same document.
  void Serve(uint32_t contexts) {
    served_ = std::make_unique<test::ServedDocument>(model_.shape(), kSinks, kWindow, kDocument, 0,
                                                     2, 1);
    for (uint32_t c = 0; c < contexts; ++c) {
      wire::Grant grant = served_->grant;
      grant.context.id = ContextId(5 + c);
      ASSERT_TRUE(served_->client->Attach(grant).ok());
      LayerUpload upload(*served_->client, Handle(c));
      const auto hidden = Prefill(model_, document_, {}, [&](FinishedLayer layer) -> Status {
        served_->window_state.LoadDocument(layer.layer, *layer.rows);
        KV_RETURN_IF_ERROR(upload.WaitRows());
        upload.Start(layer.layer, std::move(layer.rows), std::move(layer.query_energy));
        return OkStatus();
      });
      ASSERT_TRUE(hidden.ok() && upload.WaitAll().ok());
    }
    loop_ = std::make_unique<BatchLoop>(model_, *served_->client, *backend_);
  }
  ContextHandle Handle(uint32_t context) const {
    return {ContextId(5 + context), Epoch(9), model_.shape()};
  }
  Sequence& Join(const Ask& ask) {
    const auto context = static_cast<uint32_t>(sequences_.size());
    Sequence& s = *sequences_.emplace_back(std::make_unique<Sequence>());
    s.attention = std::make_unique<AttentionIceCache>(model_.shape(), *served_->client, *backend_,
                                                      Options(ask));
    s.attention->Begin(Handle(context), served_->window_state,
                       served_->grant.context.segments);
    BatchSequence sequence;
    sequence.attention = s.attention.get();
    sequence.position = kDocument;
    sequence.feed = ask.question;
    sequence.sampling = ask.sampling;
    sequence.max_new_tokens = ask.count;
    sequence.on_token = [&s](int32_t token) {
      s.said.push_back(token);
      return true;
    };
    sequence.on_end = [&s](const Status& status) { s.status = status; };
    const Status joined = loop_->Join(std::move(sequence));
    EXPECT_TRUE(joined.ok()) << joined.ToString();
    return s;
  }
  void Finish() {
    while (loop_->size() > 0) ASSERT_TRUE(loop_->Step().ok());
  }

  std::unique_ptr<test::ServedDocument> served_;
  const std::unique_ptr<AttentionBackend> backend_ = MakeCpuAttention();
  std::unique_ptr<BatchLoop> loop_;
  std::vector<std::unique_ptr<Sequence>> sequences_;
};

TEST_F(Together, EachSaysWhatItSaysAloneThoughBudgetsLengthsAndSamplingDiffer) {
  const std::vector<Ask> asks = {
      {RandomTokens(model_.rng(), 5), 1000000, 30},
      {RandomTokens(model_.rng(), 1), 44, 12, {0.8, 0.9, 3}},
      {RandomTokens(model_.rng(), 9), 28, 20, {1.5, 1, 4}},
      {RandomTokens(model_.rng(), 2), 60, 25, {}, true},
  };
  Serve(static_cast<uint32_t>(asks.size()));
  for (const Ask& ask : asks) Join(ask);
  Finish();
  for (size_t i = 0; i < asks.size(); ++i) {
    EXPECT_TRUE(sequences_[i]->status.ok()) << sequences_[i]->status.ToString();
    EXPECT_EQ(sequences_[i]->said, Alone(asks[i])) << "sequence " << i;
    EXPECT_EQ(sequences_[i]->attention->stats().degraded_steps, 0u);
  }
  EXPECT_EQ(loop_->stats().chosen, 30u + 12 + 20 + 25);
}

TEST_F(Together, AStepsQuestionsLeaveAsOneMessagePerShard) {
  Serve(3);
  for (int i = 0; i < 3; ++i) Join({RandomTokens(model_.rng(), 1), 44, 1});
  const int before = served_->shards[0]->selects;
  ASSERT_TRUE(loop_->Step().ok());
  for (const auto& shard : served_->shards) {
    EXPECT_EQ(shard->batches, static_cast<int>(model_.shape().layers));
  }
  EXPECT_EQ(served_->shards[0]->selects - before, 3 * static_cast<int>(model_.shape().layers));
}

TEST_F(Together, SequencesJoinAndLeaveBetweenSteps) {
  const Ask first{RandomTokens(model_.rng(), 3), 44, 8}, second{RandomTokens(model_.rng(), 6), 60, 30},
      third{RandomTokens(model_.rng(), 2), 36, 10};
  Serve(3);
  Join(first);
  for (int i = 0; i < 4; ++i) ASSERT_TRUE(loop_->Step().ok());
  Join(second);
  while (!sequences_[0]->status.ok()) ASSERT_TRUE(loop_->Step().ok());
  EXPECT_EQ(loop_->size(), 1u);
  Join(third);
  Finish();
  EXPECT_EQ(sequences_[0]->said, Alone(first));
  EXPECT_EQ(sequences_[1]->said, Alone(second));
  EXPECT_EQ(sequences_[2]->said, Alone(third));
}

TEST_F(Together, AnErrorOfOneSequenceLeavesTheOthersAlone) {
  const Ask ask{RandomTokens(model_.rng(), 3), 44, 16};
  Serve(2);
  Join(ask);
  Join(ask);
  ASSERT_TRUE(loop_->Step().ok());
  served_->shards[0]->refused = 1;  // the first sequence's next Select there
  Finish();
  EXPECT_EQ(sequences_[0]->status.code(), StatusCode::kFailedPrecondition);
  EXPECT_TRUE(sequences_[1]->status.ok()) << sequences_[1]->status.ToString();
  EXPECT_EQ(sequences_[1]->said, Alone(ask));
}

TEST_F(Together, AnUnansweredSelectDegradesOnlyItsOwnSequence) {
  const Ask ask{RandomTokens(model_.rng(), 2), 44, 6};
  Serve(2);
  Join(ask);
  Join(ask);
  served_->shards[1]->silent_selects = 1;
  Finish();
  EXPECT_TRUE(sequences_[0]->status.ok() && sequences_[1]->status.ok());
  EXPECT_EQ(sequences_[0]->attention->stats().degraded_steps, 1u);
  EXPECT_EQ(sequences_[1]->attention->stats().degraded_steps, 0u);
  EXPECT_EQ(sequences_[1]->said, Alone(ask));
}

TEST_F(Together, ALostServerEndsAllWithItsName) {
  const Ask ask{RandomTokens(model_.rng(), 2), 44, 50};
  Serve(2);
  Join(ask);
  Join(ask);
  ASSERT_TRUE(loop_->Step().ok());
  for (const auto& shard : served_->shards) shard->Die(true);
  Finish();
  for (const auto& s : sequences_) {
    EXPECT_EQ(s->status.code(), StatusCode::kUnavailable) << s->status.ToString();
    EXPECT_THAT(s->status.message(), ::testing::HasSubstr("shard"));
  }
}

TEST_F(Together, RefusesWhatCannotRun) {
  Serve(1);
  BatchSequence nothing;
  EXPECT_EQ(loop_->Join(nothing).code(), StatusCode::kInvalidArgument);
  nothing.feed = {static_cast<int32_t>(RandomModel::kVocab)};
  EXPECT_EQ(loop_->Join(nothing).code(), StatusCode::kInvalidArgument);
  Sequence& s = Join({RandomTokens(model_.rng(), 2), 44, 5});
  loop_->EndAll(Cancelled("interrupted"));
  EXPECT_EQ(s.status.code(), StatusCode::kCancelled);
  EXPECT_EQ(loop_->size(), 0u);
}

}  // namespace
}  // namespace icecache
