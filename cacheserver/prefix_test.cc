// Forks at an earlier token, and contexts that are found by the tokens of a prompt: within a
// tenant, and across tenants only where they were shared.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "cacheserver/test_worker.h"
#include "tests/support/tenants.h"

namespace icecache {
namespace {

constexpr uint32_t kBlock = limits::kPrefixBlockTokens;

PrefixIdentity Identity() { return {.model = "tiny", .shape = kShape, .policy = "cluster_tree"}; }

// The tokens of document `doc`; documents begin alike for `common` tokens.
std::vector<int32_t> Tokens(int doc, uint32_t common, uint32_t count) {
  std::vector<int32_t> tokens(count);
  std::iota(tokens.begin(), tokens.end(), 1);
  for (uint32_t i = common; i < count; ++i) tokens[i] += 100000 * doc;
  return tokens;
}

class PrefixTest : public ::testing::Test {
 protected:
  void Publish(Worker& worker, const std::string& name, const std::vector<int32_t>& tokens,
               bool shared = false) {
    ASSERT_TRUE(worker.Create(name, "cluster_tree").ok());
    ASSERT_TRUE(worker.Prefill(static_cast<uint32_t>(tokens.size())).ok());
    const ContextId id = worker.grant().context.id;
    const Status sealed = worker.control().Do(wire::Seal{id, PrefixKeys(Identity(), tokens, true)});
    ASSERT_TRUE(sealed.ok()) << sealed.ToString();
    ASSERT_TRUE(worker.control().Do(wire::Publish{id, false, shared}).ok());
  }
  std::vector<wire::PrefixCandidate> Match(Worker& worker, const std::vector<int32_t>& tokens,
                                           bool shared = false) {
    const auto found = worker.control().Call<wire::Prefixes>(wire::MatchPrefix{
        PrefixKeys(Identity(), tokens, false), static_cast<uint32_t>(tokens.size()), shared});
    EXPECT_TRUE(found.ok()) << found.status().ToString();
    return found.ok() ? found->candidates : std::vector<wire::PrefixCandidate>{};
  }
  // Everything that a fork at `tokens` holds, exactly and under a small budget; then it decodes on.
  void CheckFork(Worker& worker, uint32_t tokens) {
    ForEachSlice([&](uint16_t layer, uint16_t head) {
      const uint32_t indexed =
          std::max(std::min(kSinks, tokens), tokens - std::min(tokens, kWindow));
      worker.CheckStep(layer, head, tokens, indexed, 0, 1u << 10, tokens);
      worker.CheckStep(layer, head, tokens, indexed, 0, 2, tokens + 1);
      const Result<OwnedMessage> tail = worker.FetchRows(layer, head, wire::RowsPart::kTail);
      ASSERT_TRUE(tail.ok()) << tail.status().ToString();
      const auto rows = wire::DecodeFetchRowsReply(tail->view(), kShape, 1);
      ASSERT_TRUE(rows.ok());
      EXPECT_EQ(rows->first_position, indexed);
      EXPECT_EQ(rows->count, tokens - indexed);
      const auto expected = worker.rows(layer, head).K(indexed, rows->count);
      EXPECT_TRUE(std::equal(expected.begin(), expected.end(), rows->body.begin()));
      if (tokens > kWindow + kSinks) {
        worker.CheckStep(layer, head, tokens + 1, indexed + 1, 1, 1u << 10, tokens + 2);
      }
    });
  }

  RunningServer server_{test::TwoTenants()};
  Worker alice_{server_.address(), 7, "alice", "alice"};
  Worker bob_{server_.address(), 7, "bob", "bob"};
};

TEST_F(PrefixTest, AForkAtAnyTokenHoldsExactlyTheTokensBeforeItAndItsParentStays) {
  const uint32_t kTokens = 500;
  Publish(alice_, "doc", Tokens(0, 0, kTokens));
  // A second segment behind the first.
  ASSERT_TRUE(alice_.Fork("doc", "longer").ok());
  ForEachSlice([&](uint16_t layer, uint16_t head) {
    ASSERT_TRUE(alice_.PutRows(layer, head, kTokens - kWindow, kWindow + 200).ok());
    ASSERT_TRUE(alice_.Build(layer, head, kWindow + 200).ok());
  });
  const ContextId longer = alice_.grant().context.id;
  ASSERT_TRUE(alice_.control().Do(wire::Seal{longer}).ok());
  ASSERT_TRUE(alice_.control().Do(wire::Publish{longer}).ok());
  for (const uint32_t tokens :
       {kSinks, kSinks + kWindow, 90u, 467u, 499u, 500u, 501u, 640u, 700u}) {
    SCOPED_TRACE("fork at " + std::to_string(tokens));
    const Status forked =
        alice_.Fork({.parent = "longer", .name = "at" + std::to_string(tokens), .tokens = tokens});
    ASSERT_TRUE(forked.ok()) << forked.ToString();
    EXPECT_EQ(alice_.grant().context.tokens, tokens);
    CheckFork(alice_, tokens);
    ASSERT_TRUE(alice_.control().Do(wire::Release{alice_.grant().context.id}).ok());
  }
  const auto parent = alice_.control().Call<wire::Grant>(wire::Open{"longer"});
  ASSERT_TRUE(parent.ok() && alice_.Attach(*parent).ok());
  ForEachSlice([&](uint16_t layer, uint16_t head) {
    alice_.CheckStep(layer, head, 700, 700 - kWindow, 0, 1u << 10, 1);
  });
  for (const uint32_t tokens : {kSinks - 1, kTokens + 1}) {
    EXPECT_EQ(alice_.Fork({.parent = "doc", .name = "x", .tokens = tokens}).code(),
              StatusCode::kOutOfRange);
  }
}

TEST_F(PrefixTest, RangesOfRowsAreReadFromWhereverTheyAre) {
  Publish(alice_, "doc", Tokens(0, 0, 400));
  ASSERT_TRUE(alice_.Fork("doc", "child").ok());
  for (const auto& [first, count] : {std::pair{0u, 400u}, {2u, 9u}, {390u, 10u}, {128u, 256u}}) {
    ForEachSlice([&, first = first, count = count](uint16_t layer, uint16_t head) {
      OutMessage out;
      wire::Encode(wire::FetchRowsRequest{.slices = alice_.Slices(layer, head),
                                          .part = wire::RowsPart::kRange,
                                          .first_position = first,
                                          .token_count = count},
                   &out);
      const auto reply = alice_.shard_of(layer, head).Call(std::move(out));
      ASSERT_TRUE(reply.ok()) << reply.status().ToString();
      const auto rows = wire::DecodeFetchRowsReply(reply->view(), kShape, 1);
      ASSERT_TRUE(rows.ok());
      TestRows& truth = alice_.rows(layer, head);
      const auto k = truth.K(first, count), v = truth.V(first, count);
      ASSERT_EQ(rows->body.size(), k.size() + v.size());
      EXPECT_TRUE(std::equal(k.begin(), k.end(), rows->body.begin()));
      EXPECT_TRUE(std::equal(v.begin(), v.end(), rows->body.begin() + k.size()));
    });
  }
}

TEST_F(PrefixTest, APromptFindsTheLongestContextThatBeginsAsItDoes) {
  const uint32_t kEnd = 2 * kBlock + 70;
  Publish(alice_, "doc", Tokens(0, 0, kEnd));
  // The whole document and more: its end, and the blocks for who does not share the rest.
  const auto prompt = Tokens(0, 0, 4 * kBlock);
  auto found = Match(alice_, prompt);
  ASSERT_EQ(found.size(), 2u);
  EXPECT_EQ(found[0].tokens, kEnd);
  EXPECT_EQ(found[0].name, "doc");
  EXPECT_EQ(found[0].key, PrefixKeyOf(Identity(), std::span(prompt).first(kEnd)));
  EXPECT_EQ(found[1].tokens, 2 * kBlock);
  // Another end: the key tells.
  const auto other = Tokens(3, kBlock + 5, 4 * kBlock);
  found = Match(alice_, other);
  ASSERT_EQ(found.size(), 1u);
  EXPECT_EQ(found[0].tokens, kBlock);
  ASSERT_TRUE(
      alice_.Fork({.parent = "doc", .name = "mine", .tokens = kBlock, .key = found[0].key}).ok());
  CheckFork(alice_, kBlock);
  EXPECT_TRUE(Match(alice_, Tokens(3, kBlock - 1, 4 * kBlock)).empty());
  EXPECT_TRUE(Match(alice_, Tokens(0, 0, kBlock - 1)).empty());
  // Another model, layout or seed is another prefix.
  PrefixIdentity seed = Identity();
  seed.seed = 2;
  EXPECT_NE(PrefixKeyOf(seed, prompt), PrefixKeyOf(Identity(), prompt));
  // A name that has passed to other content is not forked for the old key.
  ASSERT_TRUE(alice_.control().Do(wire::Drop{"doc"}).ok());
  EXPECT_TRUE(Match(alice_, prompt).empty());
  Publish(alice_, "doc", Tokens(9, 0, kEnd));
  EXPECT_EQ(
      alice_.Fork({.parent = "doc", .name = "y", .tokens = kBlock, .key = found[0].key}).code(),
      StatusCode::kFailedPrecondition);
  EXPECT_THAT(
      server_.Page("/metrics"),
      ::testing::HasSubstr("icecache_prefix_tokens_reused_total " + std::to_string(kBlock)));
}

TEST_F(PrefixTest, OfOtherTenantsOnlyWhatTheyShareIsFound) {
  const auto prompt = Tokens(0, 0, 3 * kBlock);
  Publish(alice_, "private", prompt);
  // Bob asks for the very tokens: the answer is that of tokens that nobody has.
  EXPECT_TRUE(Match(bob_, prompt).empty());
  EXPECT_TRUE(Match(bob_, prompt, true).empty());
  const PrefixKey key = PrefixKeyOf(Identity(), prompt);
  const auto fork_as_bob = [&](const std::string& name) {
    return bob_.Fork({.parent = name, .name = "b", .tokens = 0, .owner = "alice", .key = key});
  };
  const Status hidden = fork_as_bob("private"), absent = fork_as_bob("nothing");
  EXPECT_EQ(hidden.code(), StatusCode::kNotFound);
  EXPECT_EQ(absent.message().size() - hidden.message().size(), 0u);
  Publish(alice_, "open", Tokens(5, 0, 3 * kBlock), true);
  const auto shared = Tokens(5, 0, 3 * kBlock);
  EXPECT_TRUE(Match(bob_, shared).empty());  // he did not ask for others'
  const auto found = Match(bob_, shared, true);
  ASSERT_EQ(found.size(), 1u);
  EXPECT_EQ(found[0].owner, "alice");
  EXPECT_EQ(found[0].tokens, 3 * kBlock);
  for (const uint32_t tokens : {3 * kBlock, kBlock}) {
    const PrefixKey at = PrefixKeyOf(Identity(), std::span(shared).first(tokens));
    ASSERT_TRUE(bob_.Fork({.parent = "open",
                           .name = "b" + std::to_string(tokens),
                           .tokens = tokens,
                           .owner = "alice",
                           .key = at})
                    .ok());
    CheckFork(bob_, tokens);
  }
  // It is his: alice neither sees nor finds it, and he goes on when she drops hers.
  EXPECT_FALSE(alice_.control().Call<wire::Grant>(wire::Open{"b256"}).ok());
  ASSERT_TRUE(alice_.control().Do(wire::Drop{"open"}).ok());
  ForEachSlice([&](uint16_t layer, uint16_t head) {
    bob_.CheckStep(layer, head, kBlock + 2, kBlock - kWindow + 2, 1, 1u << 10, 9);
  });
}

TEST_F(PrefixTest, KeysThatDoNotFitTheTokensAreRefused) {
  ASSERT_TRUE(alice_.Create("doc", "cluster_tree").ok());
  ASSERT_TRUE(alice_.Prefill(2 * kBlock).ok());
  const auto keys = PrefixKeys(Identity(), Tokens(0, 0, 3 * kBlock), true);
  EXPECT_EQ(alice_.control().Do(wire::Seal{alice_.grant().context.id, keys}).code(),
            StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace icecache
