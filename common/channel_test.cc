#include "common/channel.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "common/wire/data_codec.h"

namespace icecache {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

// A client and a server channel over the loopback twin, on a clock of the test's own.
class ChannelTest : public testing::Test {
 protected:
  void Connect(const LoopbackFaults& faults = {}, const ChannelOptions& options = {}) {
    client_.reset();
    server_.reset();
    network_ = MakeLoopbackNetwork(faults);
    server_transport_ = MakeLoopbackTransport(reactor_, network_);
    client_transport_ = MakeLoopbackTransport(reactor_, network_);
    const auto address = server_transport_->Listen("here:0", [&](std::unique_ptr<Endpoint> e) {
      server_ = std::make_unique<Channel>(reactor_, std::move(e), options);
      server_->SetOnClosed([&](Status status) { server_closed_.push_back(std::move(status)); });
    });
    client_ =
        std::make_unique<Channel>(reactor_, client_transport_->Connect(*address).value(), options);
    client_->SetOnClosed([&](Status status) { client_closed_.push_back(std::move(status)); });
    Drain();
    ASSERT_NE(server_, nullptr);
  }
  void Drain() {
    while (reactor_.Poll()) {
    }
  }
  void Advance(Duration by) {
    for (; by > Duration(0); by -= milliseconds(1)) {
      clock_.Advance(milliseconds(1));
      Drain();
    }
  }
  void Echo() {
    server_->SetHandler([&](const InMessage& m) {
      OutMessage reply;
      reply.kind = m.kind;
      reply.meta.assign(m.meta.begin(), m.meta.end());
      server_->Reply(m.id, std::move(reply));
    });
  }
  static OutMessage Request(uint16_t kind = 3, size_t meta_bytes = 5) {
    OutMessage request;
    request.kind = kind;
    request.meta.resize(meta_bytes, std::byte{7});
    return request;
  }
  // Records how each call ends.
  Channel::Done Record() {
    return [this](Result<InMessage> result) {
      ends_.push_back(result.ok() ? OkStatus() : result.status());
    };
  }
  std::vector<StatusCode> EndCodes() const {
    std::vector<StatusCode> codes;
    for (const Status& status : ends_) codes.push_back(status.code());
    return codes;
  }

  ManualClock clock_;
  Reactor reactor_{clock_, Duration(0)};
  std::shared_ptr<LoopbackNetwork> network_;
  std::unique_ptr<Transport> server_transport_, client_transport_;
  std::unique_ptr<Channel> client_, server_;
  std::vector<Status> client_closed_, server_closed_, ends_;
};

TEST_F(ChannelTest, RepliesReachTheirCalls) {
  Connect();
  Echo();
  std::vector<size_t> sizes;
  for (size_t i = 0; i < 20; ++i) {
    client_->Call(Request(3, i), seconds(1), [&](Result<InMessage> m) {
      ASSERT_TRUE(m.ok());
      EXPECT_EQ(m->kind, 3);
      sizes.push_back(m->meta.size());
    });
  }
  EXPECT_EQ(client_->calls_in_flight(), 20u);
  Drain();
  EXPECT_EQ(sizes.size(), 20u);
  for (size_t i = 0; i < sizes.size(); ++i) EXPECT_EQ(sizes[i], i);
  EXPECT_EQ(client_->calls_in_flight(), 0u);
}

TEST_F(ChannelTest, RepliesMayComeInAnyOrder) {
  Connect();
  std::vector<uint64_t> asked;
  server_->SetHandler([&](const InMessage& m) { asked.push_back(m.id); });
  std::vector<int> ended;
  for (int i = 0; i < 3; ++i) {
    client_->Call(Request(), seconds(1), [&, i](Result<InMessage>) { ended.push_back(i); });
  }
  Drain();
  for (const int i : {2, 0, 1}) server_->Reply(asked[static_cast<size_t>(i)], Request());
  Drain();
  EXPECT_THAT(ended, testing::ElementsAre(2, 0, 1));
}

TEST_F(ChannelTest, ErrorRepliesCarryTheirStatus) {
  Connect();
  server_->SetHandler([&](const InMessage& m) {
    server_->ReplyError(m.id, FailedPrecondition("epoch 3 is over, the lease is at 4"));
  });
  client_->Call(Request(), seconds(1), Record());
  Drain();
  ASSERT_EQ(ends_.size(), 1u);
  EXPECT_EQ(ends_[0].code(), StatusCode::kFailedPrecondition);
  EXPECT_EQ(ends_[0].message(), "epoch 3 is over, the lease is at 4");
}

TEST_F(ChannelTest, RequestWithoutAHandlerIsUnimplemented) {
  Connect();
  client_->Call(Request(), seconds(1), Record());
  client_->SendOneWay(Request());
  Drain();
  EXPECT_THAT(EndCodes(), testing::ElementsAre(StatusCode::kUnimplemented));
}

TEST_F(ChannelTest, OneWayMessagesReachTheHandler) {
  Connect();
  std::vector<uint16_t> flags;
  server_->SetHandler([&](const InMessage& m) { flags.push_back(m.flags); });
  client_->SendOneWay(Request());
  Drain();
  EXPECT_THAT(flags, testing::ElementsAre(kFlagOneWay));
  EXPECT_EQ(client_->calls_in_flight(), 0u);
}

TEST_F(ChannelTest, DeadlineEndsACallOnTimeAndItsLateReplyIsDropped) {
  Connect();
  uint64_t asked = 0;
  server_->SetHandler([&](const InMessage& m) { asked = m.id; });
  client_->Call(Request(), milliseconds(50), Record());
  Advance(milliseconds(49));
  EXPECT_TRUE(ends_.empty());
  Advance(milliseconds(2));
  EXPECT_THAT(EndCodes(), testing::ElementsAre(StatusCode::kDeadlineExceeded));
  EXPECT_THAT(ends_[0].message(), testing::HasSubstr("50 ms"));
  server_->Reply(asked, Request());
  Drain();
  EXPECT_EQ(ends_.size(), 1u);
  EXPECT_FALSE(client_->closed());
}

TEST_F(ChannelTest, LaterCallWithAnEarlierDeadlineEndsFirst) {
  Connect();
  server_->SetHandler([](const InMessage&) {});
  std::vector<int> ended;
  client_->Call(Request(), milliseconds(90), [&](Result<InMessage>) { ended.push_back(90); });
  client_->Call(Request(), milliseconds(30), [&](Result<InMessage>) { ended.push_back(30); });
  client_->Call(Request(), milliseconds(60), [&](Result<InMessage>) { ended.push_back(60); });
  Advance(milliseconds(31));
  EXPECT_THAT(ended, testing::ElementsAre(30));
  Advance(milliseconds(60));
  EXPECT_THAT(ended, testing::ElementsAre(30, 60, 90));
}

TEST_F(ChannelTest, CancelEndsACallAtOnce) {
  Connect();
  Echo();
  const uint64_t id = client_->Call(Request(), seconds(1), Record());
  client_->CancelCall(id);
  EXPECT_THAT(EndCodes(), testing::ElementsAre(StatusCode::kCancelled));
  client_->CancelCall(id);
  client_->CancelCall(12345);
  Drain();
  EXPECT_EQ(ends_.size(), 1u);
}

TEST_F(ChannelTest, CallsBeyondTheMaximumAreRefusedOnALaterTurn) {
  ChannelOptions options;
  options.in_flight_max = 4;
  Connect({}, options);
  server_->SetHandler([](const InMessage&) {});
  uint64_t last = 0;
  for (int i = 0; i < 6; ++i) last = client_->Call(Request(), milliseconds(100), Record());
  EXPECT_TRUE(ends_.empty());
  EXPECT_EQ(client_->calls_in_flight(), 4u);
  client_->CancelCall(last);
  EXPECT_THAT(EndCodes(), testing::ElementsAre(StatusCode::kCancelled));
  Drain();
  EXPECT_THAT(EndCodes(),
              testing::ElementsAre(StatusCode::kCancelled, StatusCode::kResourceExhausted));
  Advance(milliseconds(100));
  EXPECT_EQ(ends_.size(), 6u);
  Echo();
  client_->Call(Request(), seconds(1), Record());  // there is room again
  Drain();
  EXPECT_TRUE(ends_.back().ok());
}

TEST_F(ChannelTest, HeartbeatsKeepAQuietConnectionAlive) {
  Connect();
  Advance(seconds(10));
  EXPECT_FALSE(client_->closed());
  EXPECT_FALSE(server_->closed());
  EXPECT_TRUE(client_closed_.empty());
}

TEST_F(ChannelTest, NoHeartbeatsAreSentWhileMessagesFlow) {
  Connect();
  Echo();
  const uint64_t before = client_->endpoint().bytes_sent();
  int requests = 0;
  for (int i = 0; i < 100; ++i) {
    client_->Call(Request(3, 8), seconds(1), [&](Result<InMessage>) { ++requests; });
    Advance(milliseconds(20));
  }
  EXPECT_EQ(requests, 100);
  EXPECT_EQ(client_->endpoint().bytes_sent() - before, 800u);  // heartbeats carry no bytes either
}

TEST_F(ChannelTest, SilentPeerIsDeadAfterFiveMisses) {
  LoopbackFaults faults;
  Connect(faults);
  server_->SetHandler([](const InMessage&) {});
  client_->Call(Request(), seconds(30), Record());
  Drain();
  // From here on every message makes the link fall silent.
  LoopbackFaults silence;
  silence.silence = 1;
  Connect(silence);
  ends_.clear();
  client_closed_.clear();
  server_closed_.clear();
  client_->Call(Request(), seconds(30), Record());
  Advance(milliseconds(990));
  EXPECT_TRUE(ends_.empty());
  Advance(milliseconds(20));
  EXPECT_THAT(EndCodes(), testing::ElementsAre(StatusCode::kUnavailable));
  ASSERT_EQ(client_closed_.size(), 1u);
  EXPECT_THAT(client_closed_[0].message(), testing::HasSubstr("no sign of life"));
  EXPECT_EQ(server_closed_.size(), 1u);  // it hears nothing either
  EXPECT_TRUE(client_->closed());
  Advance(seconds(3));
  EXPECT_EQ(client_closed_.size(), 1u);
}

// A thread that computed for seconds without pumping must not take its own absence for the peer's
// death.
TEST_F(ChannelTest, OwnAbsenceIsNotThePeersSilence) {
  Connect();
  Advance(milliseconds(300));
  clock_.Advance(seconds(5));
  Drain();  // both sides see an old last_heard; heartbeats now cross
  Advance(milliseconds(500));
  EXPECT_FALSE(client_->closed());
  EXPECT_FALSE(server_->closed());
}

TEST_F(ChannelTest, AnnouncedSilenceIsWaitedForAndNoLonger) {
  // The server is another thread's: its reactor is not driven while it computes.
  Reactor server_reactor(clock_, Duration(0));
  network_ = MakeLoopbackNetwork({});
  server_transport_ = MakeLoopbackTransport(server_reactor, network_);
  client_transport_ = MakeLoopbackTransport(reactor_, network_);
  const auto address = server_transport_->Listen("here:0", [&](std::unique_ptr<Endpoint> e) {
    server_ = std::make_unique<Channel>(server_reactor, std::move(e));
  });
  client_ = std::make_unique<Channel>(reactor_, client_transport_->Connect(*address).value());
  const auto run_server = [&] {
    while (server_reactor.Poll()) {
    }
  };
  run_server();
  ASSERT_NE(server_, nullptr);
  server_->AnnounceSilence(seconds(3));
  Advance(milliseconds(2900));
  EXPECT_FALSE(client_->closed());
  run_server();  // back again: from now on the usual patience
  Advance(milliseconds(900));
  EXPECT_FALSE(client_->closed());
  Advance(milliseconds(200));
  EXPECT_TRUE(client_->closed());

  client_ = std::make_unique<Channel>(reactor_, client_transport_->Connect(*address).value());
  run_server();
  server_->AnnounceSilence(std::chrono::hours(100));
  Advance(limits::kSilenceAnnouncedMax - milliseconds(100));
  EXPECT_FALSE(client_->closed());
  Advance(milliseconds(200));
  EXPECT_TRUE(client_->closed());
  server_.reset();
  server_transport_.reset();
}

// Only complete messages are signs of life: without notice, a slow large one would look like
// silence.
TEST_F(ChannelTest, LargeMessagesAreAnnounced) {
  struct Recorder : Endpoint {
    explicit Recorder(std::vector<OutMessage>& s) : sent(s) {}
    void Send(OutMessage message) override { sent.push_back(std::move(message)); }
    void SetHandlers(std::function<void(const InMessage&)>, std::function<void(Status)>) override {}
    void Read(std::span<const MemoryRead>, std::shared_ptr<const void>,
              std::function<void(Status)>) override {}
    void Close() override {}
    uint64_t bytes_sent() const override { return 0; }
    uint64_t bytes_queued() const override { return 0; }
    std::string Describe() const override { return "recorder"; }
    std::vector<OutMessage>& sent;
  };
  std::vector<OutMessage> sent;
  Channel channel(reactor_, std::make_unique<Recorder>(sent));
  const std::vector<std::byte> large(16u << 20);
  OutMessage reply = Request();
  reply.body.push_back(large);
  channel.Reply(1, std::move(reply));
  channel.Reply(2, Request());
  ASSERT_EQ(sent.size(), 3u);
  EXPECT_EQ(sent[0].kind, kKindHeartbeat);
  EXPECT_EQ(sent[0].id, 1000u + 2000u);  // the usual second, and two for 16 MiB at 8 MiB/s
  EXPECT_EQ(sent[1].id, 1u);
  EXPECT_EQ(sent[2].id, 2u);
}

TEST_F(ChannelTest, PeersDeathEndsEveryCallOnce) {
  Connect();
  server_->SetHandler([](const InMessage&) {});
  for (int i = 0; i < 5; ++i) client_->Call(Request(), seconds(1), Record());
  Drain();
  server_.reset();
  Drain();
  EXPECT_EQ(ends_.size(), 5u);
  for (const Status& status : ends_) EXPECT_EQ(status.code(), StatusCode::kUnavailable);
  EXPECT_EQ(client_closed_.size(), 1u);
  client_->Call(Request(), seconds(1), Record());
  EXPECT_EQ(ends_.size(), 5u) << "done ran inside Call";
  Drain();
  EXPECT_EQ(ends_.size(), 6u);
  Advance(seconds(3));
  EXPECT_EQ(ends_.size(), 6u);
}

TEST_F(ChannelTest, CallsMadeWhileCallsFailEndToo) {
  Connect();
  server_->SetHandler([](const InMessage&) {});
  client_->Call(Request(), seconds(1), [&](Result<InMessage> first) {
    ends_.push_back(first.status());
    client_->Call(Request(), seconds(1), Record());
  });
  Drain();
  server_.reset();
  Drain();
  EXPECT_EQ(ends_.size(), 2u);
}

TEST_F(ChannelTest, CloseCancelsCallsAndIsSeenByThePeerOnly) {
  Connect();
  server_->SetHandler([](const InMessage&) {});
  client_->Call(Request(), seconds(1), Record());
  client_->Close();
  EXPECT_THAT(EndCodes(), testing::ElementsAre(StatusCode::kCancelled));
  Drain();
  EXPECT_TRUE(client_closed_.empty());
  EXPECT_EQ(server_closed_.size(), 1u);
  client_->Reply(1, Request());
  client_->SendOneWay(Request());
  Drain();
}

TEST_F(ChannelTest, DestructionCancelsCallsAndNothingRunsAfterwards) {
  Connect();
  server_->SetHandler([](const InMessage&) {});
  client_->Call(Request(), seconds(1), Record());
  client_.reset();
  EXPECT_THAT(EndCodes(), testing::ElementsAre(StatusCode::kCancelled));
  Advance(seconds(3));
  EXPECT_EQ(ends_.size(), 1u);
  EXPECT_TRUE(client_closed_.empty());
}

TEST_F(ChannelTest, CallbacksMayDestroyTheChannel) {
  // In done of a reply, of a deadline, of a lost peer; in the handler; in on_closed.
  for (const int where : {0, 1, 2, 3, 4}) {
    SCOPED_TRACE(where);
    Connect();
    ends_.clear();
    const auto destroy = [&](Result<InMessage> m) {
      ends_.push_back(m.ok() ? OkStatus() : m.status());
      client_.reset();
    };
    if (where == 0) Echo();
    if (where == 1 || where == 2) server_->SetHandler([](const InMessage&) {});
    if (where == 3) server_->SetHandler([&](const InMessage&) { server_.reset(); });
    if (where == 4) client_->SetOnClosed([&](Status) { client_.reset(); });
    for (int i = 0; i < 3; ++i) client_->Call(Request(), milliseconds(50), destroy);
    Drain();
    if (where == 1) Advance(milliseconds(60));
    if (where == 2) server_.reset();
    if (where == 4) server_.reset();
    Drain();
    EXPECT_EQ(ends_.size(), 3u);  // the others end with CANCELLED, inside the destructor
    EXPECT_EQ(client_, nullptr);
    Advance(seconds(2));
  }
}

TEST_F(ChannelTest, PinsLiveUntilTheTransportLetsGoAlsoAfterTheDeadline) {
  LoopbackFaults slow;
  slow.delay_min = slow.delay_max = milliseconds(80);
  Connect(slow);
  server_->SetHandler([](const InMessage&) {});
  auto pages = std::make_shared<const std::vector<std::byte>>(1000);
  const std::weak_ptr<const std::vector<std::byte>> watch = pages;
  OutMessage request = Request();
  request.body.push_back(*pages);
  request.pin = std::move(pages);
  client_->Call(std::move(request), milliseconds(20), Record());
  Advance(milliseconds(30));
  EXPECT_THAT(EndCodes(), testing::ElementsAre(StatusCode::kDeadlineExceeded));
  EXPECT_FALSE(watch.expired()) << "the transport still reads it";
  Advance(milliseconds(60));
  EXPECT_TRUE(watch.expired());
}

// Whatever happens on the link: every call ends once, no later than its deadline allows.
TEST_F(ChannelTest, EveryCallEndsOnceUnderAnyFaults) {
  const uint64_t base = std::random_device{}();
  for (uint64_t round = 0; round < 60; ++round) {
    const uint64_t seed = base + round;
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937_64 random(seed);
    LoopbackFaults faults;
    faults.seed = seed;
    faults.delay_max = milliseconds(random() % 30);
    const double rates[] = {0, 0.005, 0.03};
    faults.loss = rates[random() % 3];
    faults.death = rates[random() % 3];
    faults.silence = rates[random() % 3];
    ChannelOptions options;
    options.in_flight_max = 20;
    Connect(faults, options);
    std::vector<int> ends(200, 0);
    std::vector<uint64_t> ids;
    if (server_ != nullptr) {
      server_->SetHandler([&](const InMessage& m) {
        if (random() % 10 == 0) return;  // never answers
        if (random() % 10 == 0) return server_->ReplyError(m.id, NotFound("no such page"));
        server_->Reply(m.id, Request());
      });
    }
    for (size_t i = 0; i < ends.size(); ++i) {
      ids.push_back(client_->Call(Request(), milliseconds(1 + random() % 100),
                                  [&ends, i](Result<InMessage>) { ++ends[i]; }));
      if (random() % 20 == 0) client_->CancelCall(ids[random() % ids.size()]);
      if (random() % 100 == 0) server_.reset();
      Advance(milliseconds(random() % 5));
    }
    Advance(milliseconds(110));
    for (size_t i = 0; i < ends.size(); ++i) ASSERT_EQ(ends[i], 1) << "call " << i;
    EXPECT_EQ(client_->calls_in_flight(), 0u);
    EXPECT_LE(client_closed_.size(), round + 1);
  }
}

TEST_F(ChannelTest, SameSeedSameHistory) {
  const auto history = [&](uint64_t seed) {
    LoopbackFaults faults;
    faults.seed = seed;
    faults.delay_max = milliseconds(40);
    faults.loss = 0.01;
    Connect(faults);
    Echo();
    std::string log;
    for (int i = 0; i < 100; ++i) {
      client_->Call(Request(), milliseconds(60), [&log, i, this](Result<InMessage> m) {
        const auto now = clock_.Now().time_since_epoch().count() % 1000;
        log += std::to_string(i) + (m.ok() ? "+" : "-") + std::to_string(now) + " ";
      });
      Advance(milliseconds(3));
    }
    client_.reset();
    return log;
  };
  const std::string first = history(11);
  EXPECT_EQ(first, history(11));
  EXPECT_NE(first, history(12));
}

}  // namespace
}  // namespace icecache
