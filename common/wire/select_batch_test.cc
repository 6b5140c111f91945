// Joined Selects come out as they went in, and each is a call of its own.
#include "common/wire/select_batch_codec.h"

#include <gmock/gmock.h>

#include "common/channel.h"
#include "common/wire/data_samples.h"

namespace icecache::wire {
namespace {

using testing::HasSubstr;

TEST_F(DataCodec, JoinedSelectsComeApartAsTheyWere) {
  for (const uint32_t count : {1u, 2u, 7u, limits::kSelectsPerBatchMax}) {
    std::vector<Sample> samples(count);
    std::vector<SelectRequest> requests;
    std::vector<OutMessage> messages;
    for (uint32_t i = 0; i < count; ++i) {
      requests.push_back(RandomSelect(random, &samples[i]));
      samples[i].out.id = 100 + i;
      messages.push_back(samples[i].out);
      messages.back().pin = samples[i].bytes;
    }
    const OutMessage joined = JoinSelects(messages);
    EXPECT_EQ(joined.id, 100u);
    EXPECT_EQ(samples[0].bytes.use_count(), 2) << "held by the message alone";
    const Received received(joined);
    const auto parts = SplitSelects(received);
    ASSERT_TRUE(parts.ok()) << parts.status().ToString();
    ASSERT_EQ(parts->size(), count);
    for (uint32_t i = 0; i < count; ++i) {
      const InMessage& part = (*parts)[i];
      EXPECT_EQ(part.kind, kSelect);
      EXPECT_EQ(part.id, 100 + i);
      EXPECT_EQ(PeekContext(part).value(), requests[i].context);
      const auto select = DecodeSelectRequest(part, kShape);
      ASSERT_TRUE(select.ok()) << select.status().ToString();
      EXPECT_EQ(select->queries, requests[i].queries);
      EXPECT_EQ(select->append_body.size(),
                requests[i].heads.size() * requests[i].append_count * 2 * kShape.row_bytes());
    }
  }
}

TEST_F(DataCodec, BatchesThatDoNotAddUpAreRefused) {
  Sample a, b;
  RandomSelect(random, &a);
  RandomSelect(random, &b);
  std::vector<OutMessage> messages = {a.out, b.out};
  const Received whole(JoinSelects(messages));
  const auto split = [](const Received& message) { return SplitSelects(message).status(); };
  EXPECT_TRUE(split(whole).ok());
  const size_t meta = whole.in().meta.size(), body = whole.in().body.size();
  EXPECT_THAT(split(whole.Truncated(meta, body - 1)).message(), HasSubstr("SelectBatch.bodyBytes"));
  EXPECT_FALSE(split(whole.Truncated(meta - 8, body)).ok());
  std::vector<std::byte> longer(whole.in().body.begin(), whole.in().body.end());
  longer.push_back(std::byte{1});
  EXPECT_THAT(split(Received(kSelectBatch, whole.in().meta, longer)).message(),
              HasSubstr("SelectBatch.body"));
  EXPECT_THAT(split(Received(kSelect, whole.in().meta, whole.in().body)).message(),
              HasSubstr("expected 7"));
  InMessage unaligned = whole.in();
  std::vector<uint64_t> words(meta / 8 + 1);
  auto* const bytes = reinterpret_cast<std::byte*>(words.data()) + 1;
  std::memcpy(bytes, unaligned.meta.data(), meta);
  unaligned.meta = {bytes, meta};
  EXPECT_THAT(SplitSelects(unaligned).status().message(), HasSubstr("unaligned"));
}

// A client and a server over the loopback twin.
struct Pair {
  explicit Pair(const ChannelOptions& options = {}) {
    const auto address = there->Listen("here:0", [&](std::unique_ptr<Endpoint> e) {
      server = std::make_unique<Channel>(reactor, std::move(e));
    });
    client = std::make_unique<Channel>(reactor, here->Connect(*address).value(), options);
    Drain();
  }
  void Drain() {
    while (reactor.Poll()) {
    }
  }
  ManualClock clock;
  Reactor reactor{clock, Duration(0)};
  std::shared_ptr<LoopbackNetwork> network = MakeLoopbackNetwork({});
  std::unique_ptr<Transport> here = MakeLoopbackTransport(reactor, network);
  std::unique_ptr<Transport> there = MakeLoopbackTransport(reactor, network);
  std::unique_ptr<Channel> client, server;
};

TEST_F(DataCodec, EachOfABatchEndsByItself) {
  Pair pair({.in_flight_max = 3});
  std::vector<InMessage> asked;
  pair.server->SetHandler([&](const InMessage& m) {
    ASSERT_EQ(m.kind, kSelectBatch);
    const auto parts = SplitSelects(m);
    ASSERT_TRUE(parts.ok());
    asked = *parts;
  });
  std::vector<Channel::Request> requests(4);  // one more than may be in flight
  std::vector<Sample> samples(4);
  std::vector<std::string> ends(4, "open");
  for (size_t i = 0; i < 4; ++i) {
    RandomSelect(random, &samples[i]);
    requests[i] = {samples[i].out, std::chrono::milliseconds(50 + 100 * i),
                   [&ends, i](Result<InMessage> reply) {
                     ends[i] = reply.ok() ? "ok" : std::string(StatusCodeName(reply.status().code()));
                   }};
  }
  pair.client->CallTogether(std::move(requests), JoinSelects);
  pair.Drain();
  ASSERT_EQ(asked.size(), 3u);
  EXPECT_THAT(ends, testing::ElementsAre("open", "open", "open", "RESOURCE_EXHAUSTED"));
  pair.server->Reply(asked[1].id, OutMessage{.kind = kSelect});
  pair.server->ReplyError(asked[2].id, NotFound("dropped"));
  pair.Drain();
  EXPECT_THAT(ends, testing::ElementsAre("open", "ok", "NOT_FOUND", "RESOURCE_EXHAUSTED"));
  pair.clock.Advance(std::chrono::milliseconds(60));
  pair.Drain();
  EXPECT_EQ(ends[0], "DEADLINE_EXCEEDED");
}

}  // namespace
}  // namespace icecache::wire
