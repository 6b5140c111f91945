#include "common/wire/control_codec.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>

#include "common/limits.h"

namespace icecache::wire {
namespace {

using testing::HasSubstr;

// Random messages within the limits.
class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  uint32_t Below(uint32_t n) { return std::uniform_int_distribution<uint32_t>(0, n - 1)(engine_); }
  uint64_t U64() { return engine_(); }
  bool Flip() { return Below(2) == 0; }
  std::string Text(size_t max) {
    std::string out(Below(static_cast<uint32_t>(max) + 1), ' ');
    for (char& c : out) c = static_cast<char>(' ' + Below(95));
    return out;
  }
  std::string Name() { return Text(limits::kContextNameBytesMax); }
  std::string Label() { return Text(limits::kTextBytesMax); }
  ModelShape Shape() {
    const uint32_t kv = 1 + Below(8);
    return {.layers = 1 + Below(limits::kLayersMax),
            .kv_heads = kv,
            .query_heads = kv * (1 + Below(limits::kGroupMax)),
            .head_dim = 16 * (1 + Below(8)),
            .dtype = static_cast<DType>(Below(3))};
  }
  ContextInfo Context() {
    ContextInfo c;
    c.id = ContextId(U64());
    c.name = Name();
    c.shape = Shape();
    c.model = Label();
    c.tokens = Below(limits::kContextTokensMax + 1);
    c.sink_tokens = Below(limits::kSinkTokensMax + 1);
    c.window_tokens = Below(limits::kWindowTokensMax + 1);
    c.tail_tokens = Below(limits::kWindowTokensMax + 1);
    c.policy = Label();
    c.seed = U64();
    c.sealed = Flip();
    c.published = Flip();
    c.durable = Flip();
    c.tenant = Label();
    c.segments.resize(Below(limits::kSegmentsPerContextMax + 1));
    for (auto& s : c.segments) {
      s = {SegmentId(U64()), Below(limits::kContextTokensMax), Flip(), Below(~0u), U64(), U64(),
           Below(~0u)};
    }
    return c;
  }
  std::vector<std::byte> Bytes(size_t n) {
    std::vector<std::byte> out(n);
    for (auto& b : out) b = static_cast<std::byte>(engine_());
    return out;
  }

 private:
  std::mt19937_64 engine_;
};

void ExpectEqual(const ContextInfo& a, const ContextInfo& b) {
  EXPECT_EQ(a.id, b.id);
  EXPECT_EQ(a.name, b.name);
  EXPECT_EQ(a.shape, b.shape);
  EXPECT_EQ(a.model, b.model);
  EXPECT_EQ(a.tokens, b.tokens);
  EXPECT_EQ(a.sink_tokens, b.sink_tokens);
  EXPECT_EQ(a.window_tokens, b.window_tokens);
  EXPECT_EQ(a.tail_tokens, b.tail_tokens);
  EXPECT_EQ(a.policy, b.policy);
  EXPECT_EQ(a.seed, b.seed);
  EXPECT_EQ(a.sealed, b.sealed);
  EXPECT_EQ(a.published, b.published);
  EXPECT_EQ(a.durable, b.durable);
  EXPECT_EQ(a.tenant, b.tenant);
  ASSERT_EQ(a.segments.size(), b.segments.size());
  for (size_t i = 0; i < a.segments.size(); ++i) {
    const SegmentInfo &x = a.segments[i], &y = b.segments[i];
    EXPECT_EQ(x.id, y.id);
    EXPECT_EQ(x.tokens, y.tokens);
    EXPECT_EQ(x.sealed, y.sealed);
    EXPECT_EQ(x.references, y.references);
    EXPECT_EQ(x.bytes, y.bytes);
    EXPECT_EQ(x.index_bytes, y.index_bytes);
    EXPECT_EQ(x.merged, y.merged);
  }
}

size_t HeaderSays(std::span<const std::byte> frame) {
  return FrameBytes(frame.first<kFrameHeaderBytes>()).value();
}

struct ControlCodec : testing::Test {
  uint64_t seed = std::random_device{}();
  Random random{seed};
  void TearDown() override {
    if (HasFailure()) std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  }

  // Through the wire and back; the header's length must be right.
  template <typename T>
  T Ask(const T& body) {
    const uint64_t id = random.U64();
    const auto frame = EncodeFrame(ControlRequest{id, body});
    EXPECT_EQ(HeaderSays(frame), frame.size());
    auto read = DecodeRequest(frame);
    EXPECT_TRUE(read.ok()) << read.status().ToString();
    EXPECT_EQ(read->id, id);
    return std::get<T>(read->body);
  }
  template <typename T>
  T Answer(const T& body) {
    const uint64_t id = random.U64();
    const auto frame = EncodeFrame(ControlReply{id, body});
    EXPECT_EQ(HeaderSays(frame), frame.size());
    auto read = DecodeReply(frame);
    EXPECT_TRUE(read.ok()) << read.status().ToString();
    EXPECT_EQ(read->id, id);
    return std::get<T>(read->body);
  }
};

TEST_F(ControlCodec, RequestsComeBackAsSent) {
  for (int round = 0; round < 20; ++round) {
    const Hello hello{9, random.Label(), random.Text(limits::kSecretBytesMax), random.Label()};
    const Hello h = Ask(hello);
    EXPECT_EQ(h.protocol_version, 9);
    EXPECT_EQ(h.tenant, hello.tenant);
    EXPECT_EQ(h.secret, hello.secret);
    EXPECT_EQ(h.client, hello.client);

    const Create create{random.Name(),      random.Shape(), random.Label(), random.Below(257),
                        random.Below(4097), random.Label(), random.U64()};
    const Create c = Ask(create);
    EXPECT_EQ(c.name, create.name);
    EXPECT_EQ(c.shape, create.shape);
    EXPECT_EQ(c.model, create.model);
    EXPECT_EQ(c.sink_tokens, create.sink_tokens);
    EXPECT_EQ(c.window_tokens, create.window_tokens);
    EXPECT_EQ(c.policy, create.policy);
    EXPECT_EQ(c.seed, create.seed);

    const Fork fork{random.Name(), random.Name()};
    EXPECT_EQ(Ask(fork).parent, fork.parent);
    EXPECT_EQ(Ask(fork).name, fork.name);
    const std::string name = random.Name();
    EXPECT_EQ(Ask(Open{name}).name, name);
    EXPECT_EQ(Ask(Drop{name}).name, name);
    EXPECT_EQ(Ask(Describe{name}).name, name);
    const ContextId id(random.U64());
    EXPECT_EQ(Ask(Seal{id}).context, id);
    EXPECT_EQ(Ask(Publish{id}).context, id);
    EXPECT_EQ(Ask(Release{id}).context, id);
    const Publish publish{id, random.Flip()};
    EXPECT_EQ(Ask(publish).durable, publish.durable);
    const Inspect inspect{static_cast<InspectTopic>(random.Below(kInspectTopics)), name};
    EXPECT_EQ(Ask(inspect).topic, inspect.topic);
    EXPECT_EQ(Ask(inspect).name, inspect.name);
    const ShareFrames share{random.Label(), random.Bytes(1 + random.Below(256)),
                            random.Bytes(1 + random.Below(64))};
    const ShareFrames s = Ask(share);
    EXPECT_EQ(s.host, share.host);
    EXPECT_EQ(s.memory, share.memory);
    EXPECT_EQ(s.directory, share.directory);
    EXPECT_TRUE(Ask(ShareFrames{share.host, {}}).memory.empty());
    Ask(List{});
    Ask(Renew{});
    Ask(Drain{});
  }
}

TEST_F(ControlCodec, RepliesComeBackAsSent) {
  for (int round = 0; round < 20; ++round) {
    HelloReply hello{2, random.Label(), {}, random.Below(~0u)};
    hello.shards.resize(1 + random.Below(limits::kShardsMax));
    for (auto& s : hello.shards) s = random.Label();
    const HelloReply h = Answer(hello);
    EXPECT_EQ(h.protocol_version, 2);
    EXPECT_EQ(h.version, hello.version);
    EXPECT_EQ(h.shards, hello.shards);
    EXPECT_EQ(h.heartbeat_ms, hello.heartbeat_ms);

    const Grant grant{random.Context(), Epoch(random.U64()), random.Bytes(32), random.Below(~0u)};
    const Grant g = Answer(grant);
    ExpectEqual(g.context, grant.context);
    EXPECT_EQ(g.epoch, grant.epoch);
    EXPECT_EQ(g.ticket, grant.ticket);
    EXPECT_EQ(g.lease_ms, grant.lease_ms);

    SharedFramesList frames;
    for (uint32_t i = random.Below(limits::kSharingWorkersMax + 1); i > 0; --i) {
      frames.others.push_back(
          {random.U64(), random.Bytes(1 + random.Below(256)), random.Bytes(40)});
    }
    const SharedFramesList f = Answer(frames);
    ASSERT_EQ(f.others.size(), frames.others.size());
    for (size_t i = 0; i < f.others.size(); ++i) {
      EXPECT_EQ(f.others[i].id, frames.others[i].id);
      EXPECT_EQ(f.others[i].memory, frames.others[i].memory);
      EXPECT_EQ(f.others[i].directory, frames.others[i].directory);
    }

    ContextList list;
    for (uint32_t i = random.Below(5); i > 0; --i) list.contexts.push_back(random.Context());
    const ContextList l = Answer(list);
    ASSERT_EQ(l.contexts.size(), list.contexts.size());
    for (size_t i = 0; i < l.contexts.size(); ++i) ExpectEqual(l.contexts[i], list.contexts[i]);

    Answer(Done{});
    const Report report{random.Text(5000)};
    EXPECT_EQ(Answer(report).json, report.json);
    const Status error(static_cast<StatusCode>(1 + random.Below(14)), random.Label());
    EXPECT_EQ(Answer(error).ToString(), error.ToString());
  }
}

TEST_F(ControlCodec, ListTooLongForAFrameBecomesAnError) {
  ContextList list;
  list.contexts.resize(3000);
  for (auto& c : list.contexts) c = random.Context();
  const auto frame = EncodeFrame(ControlReply{7, list});
  EXPECT_LE(frame.size(), limits::kControlMessageBytesMax);
  const auto read = DecodeReply(frame);
  ASSERT_TRUE(read.ok()) << read.status().ToString();
  EXPECT_EQ(read->id, 7u);
  EXPECT_EQ(std::get<Status>(read->body).code(), StatusCode::kResourceExhausted);
  const auto cut = DecodeReply(EncodeFrame(ControlReply{1, NotFound(std::string(1u << 21, 'x'))}));
  EXPECT_EQ(std::get<Status>(cut->body).message().size(), limits::kStatusTextBytesMax);
}

TEST(ControlFrames, HeaderIsBounded) {
  const auto header = [](uint32_t words) {
    std::array<std::byte, kFrameHeaderBytes> bytes;
    std::memcpy(bytes.data(), &words, sizeof words);
    return FrameBytes(bytes);
  };
  EXPECT_EQ(header(1).value(), 12u);
  EXPECT_EQ(header((1u << 17) - 1).value(), (1u << 20) - 4);
  EXPECT_EQ(header(1u << 17).status().code(), StatusCode::kInvalidArgument);
  EXPECT_FALSE(header(0).ok());
  EXPECT_FALSE(header(~0u).ok());
  std::array<std::byte, 4> http;
  std::memcpy(http.data(), "GET ", 4);
  EXPECT_THAT(FrameBytes(http).status().message(), HasSubstr("control port?"));
}

std::vector<std::vector<std::byte>> Frames(Random& random) {
  ContextInfo small = random.Context();
  small.segments.resize(3);
  small.name = "alice/doc";
  small.model = small.policy = small.tenant = "m";
  return {
      EncodeFrame(ControlRequest{1, Hello{1, "t", "s", "c"}}),
      EncodeFrame(ControlRequest{2, Create{"n", random.Shape(), "m", 4, 64, "cluster_tree", 1}}),
      EncodeFrame(ControlRequest{3, Fork{"parent", "child"}}),
      EncodeFrame(ControlRequest{4, Seal{ContextId(8)}}),
      EncodeFrame(ControlRequest{4, Open{"n"}}),
      EncodeFrame(ControlRequest{4, Publish{ContextId(8), true}}),
      EncodeFrame(ControlRequest{4, Release{ContextId(8)}}),
      EncodeFrame(ControlRequest{4, Drop{"n"}}),
      EncodeFrame(ControlRequest{4, List{}}),
      EncodeFrame(ControlRequest{4, Describe{"n"}}),
      EncodeFrame(ControlRequest{4, Renew{}}),
      EncodeFrame(ControlRequest{4, Inspect{InspectTopic::kExplain, "n"}}),
      EncodeFrame(ControlRequest{4, Drain{}}),
      EncodeFrame(ControlRequest{4, ShareFrames{"h", random.Bytes(30), random.Bytes(40)}}),
      EncodeFrame(ControlReply{5, SharedFramesList{{{1, random.Bytes(30), random.Bytes(40)}}}}),
      EncodeFrame(ControlReply{5, Done{}}),
      EncodeFrame(ControlReply{5, Report{"{}"}}),
      EncodeFrame(ControlReply{5, Grant{small, Epoch(1), random.Bytes(16), 1000}}),
      EncodeFrame(ControlReply{6, ContextList{{small, small}}}),
      EncodeFrame(ControlReply{7, HelloReply{1, "0.1.0", {"127.0.0.1:1", "127.0.0.1:2"}, 200}}),
      EncodeFrame(ControlReply{8, NotFound("context 'x'")}),
  };
}

// An exact heap block at an odd address: AddressSanitizer sees one byte too many, UBSan a
// misaligned load.
struct Misaligned {
  explicit Misaligned(std::span<const std::byte> from)
      : block(std::make_unique<std::byte[]>(from.size() + 1)), bytes(block.get() + 1, from.size()) {
    if (!from.empty()) std::memcpy(bytes.data(), from.data(), from.size());
  }
  std::unique_ptr<std::byte[]> block;
  std::span<std::byte> bytes;
};

TEST_F(ControlCodec, RefusesEveryTruncation) {
  for (const auto& frame : Frames(random)) {
    for (size_t n = 0; n < frame.size(); ++n) {
      const Misaligned part(std::span<const std::byte>(frame).first(n));
      EXPECT_FALSE(DecodeRequest(part.bytes).ok());
      EXPECT_FALSE(DecodeReply(part.bytes).ok());
    }
    const Misaligned whole(frame);
    EXPECT_TRUE(DecodeRequest(whole.bytes).ok() || DecodeReply(whole.bytes).ok());
  }
}

TEST_F(ControlCodec, SurvivesFlippedBytes) {
  int refused = 0;
  for (const auto& frame : Frames(random)) {
    for (int round = 0; round < 2000; ++round) {
      Misaligned damaged(frame);
      for (uint32_t flips = 1 + random.Below(3); flips > 0; --flips) {
        damaged.bytes[random.Below(static_cast<uint32_t>(frame.size()))] ^=
            static_cast<std::byte>(1u << random.Below(8));
      }
      const auto request = DecodeRequest(damaged.bytes);
      const auto reply = DecodeReply(damaged.bytes);
      refused += request.ok() || reply.ok() ? 0 : 1;
      if (!reply.ok()) continue;
      if (const auto* grant = std::get_if<Grant>(&reply->body)) {
        EXPECT_TRUE(grant->context.shape.Validate().ok());
        EXPECT_LE(grant->context.segments.size(), limits::kSegmentsPerContextMax);
      }
      const auto* error = std::get_if<Status>(&reply->body);
      EXPECT_TRUE(error == nullptr || !error->ok());
    }
  }
  EXPECT_GT(refused, 1000);
}

TEST_F(ControlCodec, SurvivesNoise) {
  for (int round = 0; round < 10000; ++round) {
    auto noise = random.Bytes(kFrameHeaderBytes + 8 * (1 + random.Below(12)));
    const auto words = static_cast<uint32_t>((noise.size() - kFrameHeaderBytes) / 8);
    std::memcpy(noise.data(), &words, sizeof words);
    if (random.Flip()) std::memset(noise.data() + 4, 0, 4);  // one segment: one check further
    DecodeRequest(noise).ok();
    DecodeReply(noise).ok();
  }
}

TEST(ControlChecks, NamesWhatIsWrong) {
  const auto error = [](auto body) {
    return DecodeRequest(EncodeFrame(ControlRequest{1, body})).status().message();
  };
  const ModelShape shape{.layers = 2, .kv_heads = 2, .query_heads = 4, .head_dim = 16};
  EXPECT_EQ(error(Create{"n", shape, "m", 4, 64, "p", 1}), "");
  EXPECT_THAT(error(Open{std::string(201, 'a')}),
              HasSubstr("open = 201 bytes, expected at most 200"));
  EXPECT_THAT(error(Open{"a\nb"}), HasSubstr("open = text with control character 10"));
  EXPECT_THAT(error(Create{"n", shape, "m", 257, 64, "p", 1}),
              HasSubstr("create.sinkTokens = 257"));
  EXPECT_THAT(error(Create{"n", shape, "m", 4, 4097, "p", 1}),
              HasSubstr("create.windowTokens = 4097"));
  ModelShape wrong = shape;
  wrong.head_dim = 17;
  EXPECT_THAT(error(Create{"n", wrong, "m", 4, 64, "p", 1}), HasSubstr("head_dim = 17"));
  wrong = shape;
  wrong.dtype = static_cast<DType>(9);
  EXPECT_THAT(error(Create{"n", wrong, "m", 4, 64, "p", 1}), HasSubstr("unknown dtype 9"));
  EXPECT_THAT(error(Hello{1, std::string(513, 't'), "", ""}),
              HasSubstr("hello.tenant = 513 bytes"));
  EXPECT_THAT(error(Hello{1, "", std::string(1025, 's'), ""}), HasSubstr("hello.secret = 1025"));
  const auto bytes = [](size_t count) { return std::vector<std::byte>(count); };
  EXPECT_EQ(error(ShareFrames{"h", bytes(256), bytes(64)}), "");
  EXPECT_THAT(error(ShareFrames{"h", bytes(257), bytes(64)}),
              HasSubstr("frames.memory.size = 257, expected 0..256"));
  EXPECT_THAT(error(ShareFrames{"h", bytes(1), bytes(65)}),
              HasSubstr("frames.directory.size = 65, expected 1..64"));
  EXPECT_THAT(error(ShareFrames{"h", bytes(1), {}}), HasSubstr("frames.directory.size = 0"));
  EXPECT_THAT(error(ShareFrames{"h", {}, bytes(1)}), HasSubstr("frames.directory.size = 1"));
  EXPECT_THAT(error(ShareFrames{std::string(513, 'h'), {}}), HasSubstr("shareFrames.host = 513"));
  const auto answer = [](auto body) {
    return DecodeReply(EncodeFrame(ControlReply{1, body})).status().message();
  };
  SharedFramesList list;
  list.others.resize(limits::kSharingWorkersMax + 1, {1, bytes(1), bytes(1)});
  EXPECT_THAT(answer(list), HasSubstr("frames.size = 33"));
  EXPECT_THAT(answer(SharedFramesList{{{1, {}, {}}}}), HasSubstr("frames.memory.size = 0"));
  EXPECT_THAT(answer(HelloReply{}), HasSubstr("hello.shards.size = 0, expected 1..64"));
  ContextInfo context;
  context.shape = shape;
  EXPECT_THAT(answer(Grant{context, Epoch(1), {}, 1}), HasSubstr("ticket.size = 0"));
  context.segments.resize(limits::kSegmentsPerContextMax + 1);
  EXPECT_THAT(answer(ContextList{{context}}), HasSubstr("segments.size = 65"));
}

}  // namespace
}  // namespace icecache::wire
