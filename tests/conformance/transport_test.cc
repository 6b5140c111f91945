// The Transport suite over the loopback twin and over UCX with and without shared memory.

#include <thread>

#include "common/ucx_environment.h"
#include "tests/conformance/transport_suite.h"

namespace icecache {
namespace {

TEST_P(TransportSuite, EveryFieldAndSizeArrivesAsSent) {
  ASSERT_NO_FATAL_FAILURE(Connect());
  uint64_t id = 0;
  const std::vector<size_t> metas = {0, 1, 8, 13, 1000, 70000};
  const std::vector<size_t> bodies = {0,    1,     7,     100,    4096,     8191,    8192,
                                      8193, 65000, 65536, 100000, 1u << 20, 4u << 20};
  for (const size_t meta_bytes : metas) {
    for (const size_t body_bytes : bodies) {
      if (meta_bytes > 8 && body_bytes > 100000) continue;  // time
      const Bytes meta = RandomBytes(meta_bytes, id), body = RandomBytes(body_bytes, id + 1000);
      ++id;
      here_->endpoint->Send(Message(id, meta, {body}));
      ASSERT_TRUE(Wait([&] { return there().got.size() == id; }));
      const Got& got = there().got.back();
      EXPECT_EQ(got.kind, 7);
      EXPECT_EQ(got.flags, 5);
      EXPECT_EQ(got.id, id);
      ASSERT_TRUE(Same(got.meta, meta)) << meta_bytes << " + " << body_bytes;
      ASSERT_TRUE(Same(got.body, body)) << meta_bytes << " + " << body_bytes;
      there().got.back() = {};  // memory
    }
  }
}

TEST_P(TransportSuite, PatienceTravelsInHundredthsOfASecond) {
  ASSERT_NO_FATAL_FAILURE(Connect());
  std::vector<Duration> heard;
  there().also = [&](const InMessage& m) { heard.push_back(m.patience); };
  for (const Duration patience : {Duration(0), Duration(std::chrono::milliseconds(5000)),
                                  Duration(std::chrono::hours(100))}) {
    OutMessage message = Message(1);
    message.patience = patience;
    here_->endpoint->Send(std::move(message));
  }
  ASSERT_TRUE(Wait([&] { return heard.size() == 3; }));
  EXPECT_EQ(heard[0], Duration(0));
  EXPECT_EQ(heard[1], std::chrono::milliseconds(5000));
  EXPECT_GE(heard[2], std::chrono::minutes(10));  // as much as can be said
}

TEST_P(TransportSuite, AHandlerMayTakeTheMemoryOfAMessage) {
  ASSERT_NO_FATAL_FAILURE(Connect());
  struct Taken {
    ReceiveBuffers::Buffer buffer;
    std::span<const std::byte> meta, body;
  };
  std::vector<Taken> taken;
  size_t heard = 0;
  there().also = [&](const InMessage& m) {
    ++heard;
    if (m.buffer != nullptr) taken.push_back({std::move(*m.buffer), m.meta, m.body});
  };
  const Bytes meta = RandomBytes(100, 1), body = RandomBytes(4u << 20, 2);  // a rendezvous
  for (uint64_t i = 0; i < 4; ++i) here_->endpoint->Send(Message(i, meta, {body}));
  ASSERT_TRUE(Wait([&] { return heard == 4; }));
  here_->endpoint->Close();  // what was taken stays
  RunTurns();
  for (const Taken& t : taken) {
    EXPECT_TRUE(Same(Bytes(t.meta.begin(), t.meta.end()), meta));
    EXPECT_TRUE(Same(Bytes(t.body.begin(), t.body.end()), body));
  }
  if (GetParam().name.find("Ucx") == 0) {
    EXPECT_EQ(taken.size(), 4u);
  }
  taken.clear();  // before the transport
}

TEST_P(TransportSuite, BothDirectionsCarryMessages) {
  ASSERT_NO_FATAL_FAILURE(Connect());
  const Bytes body = RandomBytes(10000, 1);
  there().also = [&](const InMessage& m) {
    there().endpoint->Send(Message(m.id + 1, {}, {body}));  // answered from inside the handler
  };
  for (uint64_t i = 0; i < 50; ++i) {
    here_->endpoint->Send(Message(i * 10));
    ASSERT_TRUE(Wait([&] { return here_->got.size() == i + 1; }));
    EXPECT_EQ(here_->got.back().id, i * 10 + 1);
    EXPECT_TRUE(Same(here_->got.back().body, body));
  }
}

TEST_P(TransportSuite, ThousandsOfSmallMessagesArriveInOrder) {
  ASSERT_NO_FATAL_FAILURE(Connect());
  constexpr uint64_t kCount = 8000;
  for (uint64_t i = 0; i < kCount; ++i) here_->endpoint->Send(Message(i, RandomBytes(i % 40, i)));
  ASSERT_TRUE(Wait([&] { return there().got.size() == kCount; }));
  for (uint64_t i = 0; i < kCount; ++i) {
    ASSERT_EQ(there().got[i].id, i);
    ASSERT_EQ(there().got[i].meta.size(), i % 40);
  }
}

TEST_P(TransportSuite, LargeAndSmallMessagesKeepTheirOrder) {
  ASSERT_NO_FATAL_FAILURE(Connect());
  const Bytes large = RandomBytes(3u << 20, 1), medium = RandomBytes(20000, 2);
  constexpr uint64_t kCount = 30;
  for (uint64_t i = 0; i < kCount; ++i) {
    OutMessage message = Message(i, RandomBytes(10, i));
    if (i % 5 == 0) message.body = {large};
    if (i % 5 == 3) message.body = {medium};
    here_->endpoint->Send(std::move(message));
  }
  ASSERT_TRUE(Wait([&] { return there().got.size() == kCount; }));
  for (uint64_t i = 0; i < kCount; ++i) {
    ASSERT_EQ(there().got[i].id, i);
    const Bytes expected = i % 5 == 0 ? large : i % 5 == 3 ? medium : Bytes();
    ASSERT_TRUE(Same(there().got[i].body, expected)) << i;
  }
}

// A reply to a selection: pages straight from an arena, and each page's positions.
TEST_P(TransportSuite, ThousandPagesAreGathered) {
  ASSERT_NO_FATAL_FAILURE(Connect());
  constexpr size_t kPages = 1024, kPageBytes = 8192, kPositionBytes = 64;
  const Bytes arena = RandomBytes(kPages * kPageBytes, 3);
  const Bytes positions = RandomBytes(kPages * kPositionBytes, 4);
  OutMessage message = Message(1, RandomBytes(3000, 5));
  Bytes expected;
  for (size_t i = 0; i < kPages; ++i) {
    const size_t page = i * 7 % kPages;
    const auto add = [&](const Bytes& from, size_t bytes) {
      message.body.push_back(std::span(from).subspan(page * bytes, bytes));
      expected.insert(expected.end(), message.body.back().begin(), message.body.back().end());
    };
    add(arena, kPageBytes);
    add(positions, kPositionBytes);
  }
  here_->endpoint->Send(std::move(message));
  ASSERT_TRUE(Wait([&] { return there().got.size() == 1; }));
  EXPECT_TRUE(Same(there().got[0].body, expected));
}

TEST_P(TransportSuite, RandomShapesArriveIntact) {
  ASSERT_NO_FATAL_FAILURE(Connect());
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  const Bytes arena = RandomBytes(1u << 20, seed);
  std::vector<Bytes> expected;
  for (uint64_t i = 0; i < 150; ++i) {
    OutMessage message = Message(i, RandomBytes(random() % (random() % 2 ? 64 : 20000), i));
    expected.emplace_back();
    const size_t parts = random() % (random() % 2 ? 8 : 200);
    for (size_t p = 0; p < parts; ++p) {
      const size_t bytes = random() % (random() % 2 ? 100 : 16385);
      const size_t offset = random() % (arena.size() - bytes);
      message.body.push_back(std::span(arena).subspan(offset, bytes));
      expected.back().insert(expected.back().end(), message.body.back().begin(),
                             message.body.back().end());
    }
    here_->endpoint->Send(std::move(message));
    if (random() % 4 == 0) reactor_.Poll();
  }
  ASSERT_TRUE(Wait([&] { return there().got.size() == expected.size(); }));
  for (size_t i = 0; i < expected.size(); ++i) {
    ASSERT_EQ(there().got[i].id, i);
    ASSERT_TRUE(Same(there().got[i].body, expected[i])) << i;
  }
}

TEST_P(TransportSuite, PinIsHeldUntilTheMessageIsOutAndThenLetGo) {
  ASSERT_NO_FATAL_FAILURE(Connect());
  for (const size_t body_bytes : {100u, 100000u, 4u << 20}) {
    auto pages = std::make_shared<const Bytes>(RandomBytes(body_bytes, body_bytes));
    const Bytes expected = *pages;
    const std::weak_ptr<const Bytes> watch = pages;
    OutMessage message = Message(1, {}, {*pages});
    message.pin = std::move(pages);
    there().got.clear();
    here_->endpoint->Send(std::move(message));
    ASSERT_TRUE(Wait([&] { return there().got.size() == 1; }));
    EXPECT_TRUE(Same(there().got[0].body, expected));
    EXPECT_TRUE(Wait([&] { return watch.expired(); })) << body_bytes;
    EXPECT_TRUE(Wait([&] { return here_->endpoint->bytes_queued() == 0; }));
  }
}

TEST_P(TransportSuite, PinOfADroppedMessageIsLetGo) {
  ASSERT_NO_FATAL_FAILURE(Connect());
  auto pages = std::make_shared<const Bytes>(RandomBytes(3u << 20, 1));
  const std::weak_ptr<const Bytes> watch = pages;
  for (int i = 0; i < 20; ++i) {
    OutMessage message = Message(1, {}, {*pages});
    message.pin = pages;
    here_->endpoint->Send(std::move(message));
  }
  pages.reset();
  here_.reset();
  EXPECT_TRUE(Wait([&] { return watch.expired(); }));
}

TEST_P(TransportSuite, BytesAreCounted) {
  ASSERT_NO_FATAL_FAILURE(Connect());
  const Bytes body(1000);
  here_->endpoint->Send(Message(1, Bytes(16), {body}));
  ASSERT_TRUE(
      Wait([&] { return there().got.size() == 1 && here_->endpoint->bytes_queued() == 0; }));
  EXPECT_EQ(here_->endpoint->bytes_sent(), 1016u);
  EXPECT_EQ(there().endpoint->bytes_sent(), 0u);
}

TEST_P(TransportSuite, CloseIsSeenByThePeerOnceAndNotByOneself) {
  ASSERT_NO_FATAL_FAILURE(Connect());
  here_->endpoint->Send(Message(1));
  ASSERT_TRUE(Wait([&] { return there().got.size() == 1; }));
  here_->endpoint->Close();
  ASSERT_TRUE(Wait([&] { return !there().closed.empty(); }));
  EXPECT_EQ(there().closed[0].code(), StatusCode::kUnavailable);
  here_->endpoint->Close();
  RunTurns();
  EXPECT_EQ(there().closed.size(), 1u);
  EXPECT_TRUE(here_->closed.empty());
}

TEST_P(TransportSuite, ServerMayCloseToo) {
  ASSERT_NO_FATAL_FAILURE(Connect());
  accepted_.clear();  // destroying the endpoint closes
  ASSERT_TRUE(Wait([&] { return !here_->closed.empty(); }));
  EXPECT_EQ(here_->closed[0].code(), StatusCode::kUnavailable);
}

TEST_P(TransportSuite, SendAfterTheEndIsDropped) {
  ASSERT_NO_FATAL_FAILURE(Connect());
  const Bytes body(5000);
  here_->endpoint->Close();
  here_->endpoint->Send(Message(1, {}, {body}));
  ASSERT_TRUE(Wait([&] { return !there().closed.empty(); }));
  there().endpoint->Send(Message(2, {}, {body}));
  RunTurns();
  EXPECT_TRUE(there().got.empty());
  EXPECT_TRUE(here_->got.empty());
  EXPECT_EQ(here_->endpoint->bytes_queued(), 0u);
}

TEST_P(TransportSuite, ConnectToNobodyFailsThroughOnClosed) {
  client_ = Make();
  server_ = Make();
  ASSERT_NO_FATAL_FAILURE(Listen());
  server_.reset();  // the port existed a moment ago
  auto endpoint = client_->Connect(address_);
  ASSERT_TRUE(endpoint.ok()) << endpoint.status().ToString();
  Peer peer(std::move(endpoint).value());
  EXPECT_TRUE(peer.closed.empty()) << "on_closed from inside Connect";
  peer.endpoint->Send(Message(1));
  ASSERT_TRUE(Wait([&] { return !peer.closed.empty(); }));
  EXPECT_EQ(peer.closed[0].code(), StatusCode::kUnavailable);
  EXPECT_THAT(peer.closed[0].message(), testing::HasSubstr(address_));
}

TEST_P(TransportSuite, BadAddressesAreRefused) {
  client_ = Make();
  for (const char* address : {"", "nonsense", "127.0.0.1", "127.0.0.1:", ":5", "127.0.0.1:70000",
                              "127.0.0.1:12x", "::1:5"}) {
    EXPECT_EQ(client_->Connect(address).status().code(), StatusCode::kInvalidArgument) << address;
    EXPECT_EQ(client_->Listen(address, [](auto) {}).status().code(), StatusCode::kInvalidArgument)
        << address;
  }
}

TEST_P(TransportSuite, TakenPortIsReportedWithTheRemedy) {
  server_ = Make();
  client_ = Make();
  ASSERT_NO_FATAL_FAILURE(Listen());
  const auto second = client_->Listen(address_, [](auto) {});
  ASSERT_FALSE(second.ok());
  EXPECT_EQ(second.status().code(), StatusCode::kUnavailable);
  EXPECT_THAT(second.status().message(), testing::HasSubstr("choose another port"));
  EXPECT_EQ(server_->Listen("127.0.0.1:0", [](auto) {}).status().code(),
            StatusCode::kFailedPrecondition);
}

TEST_P(TransportSuite, PortIsFreeAgainAfterTheListenerIsGone) {
  ASSERT_NO_FATAL_FAILURE(Connect());
  here_->endpoint->Send(Message(1));
  ASSERT_TRUE(Wait([&] { return there().got.size() == 1; }));
  accepted_.clear();
  server_.reset();
  server_ = Make();
  const auto again = server_->Listen(address_, [](auto) {});
  EXPECT_TRUE(again.ok()) << again.status().ToString();
}

TEST_P(TransportSuite, ClientsAreKeptApart) {
  ASSERT_NO_FATAL_FAILURE(Connect());
  const auto second_transport = Make();
  Peer second(second_transport->Connect(address_).value());
  Peer third(client_->Connect(address_).value());
  ASSERT_TRUE(Wait([&] { return accepted_.size() == 3; }));
  for (const auto& peer : accepted_) {
    peer->also = [p = peer.get()](const InMessage& m) { p->endpoint->Send(Message(m.id * 2)); };
  }
  here_->endpoint->Send(Message(1));
  second.endpoint->Send(Message(10));
  third.endpoint->Send(Message(100));
  ASSERT_TRUE(Wait([&] { return here_->got.size() + second.got.size() + third.got.size() == 3; }));
  ASSERT_EQ(here_->got.size(), 1u);
  ASSERT_EQ(second.got.size(), 1u);
  ASSERT_EQ(third.got.size(), 1u);
  EXPECT_EQ(here_->got[0].id, 2u);
  EXPECT_EQ(second.got[0].id, 20u);
  EXPECT_EQ(third.got[0].id, 200u);
  second.endpoint->Close();
  here_->endpoint->Send(Message(5));
  ASSERT_TRUE(Wait([&] { return here_->got.size() == 2; }));
  EXPECT_EQ(here_->got[1].id, 10u);
  EXPECT_TRUE(third.closed.empty());
}

TEST_P(TransportSuite, EndpointMayBeDestroyedInsideItsHandlers) {
  ASSERT_NO_FATAL_FAILURE(Connect());
  std::unique_ptr<Endpoint> local = client_->Connect(address_).value();
  ASSERT_TRUE(Wait([&] { return accepted_.size() == 2; }));
  // In on_message: more messages wait behind the one that destroys it.
  int messages = 0;
  local->SetHandlers(
      [&](const InMessage&) {
        ++messages;
        local.reset();
      },
      [](Status) { ADD_FAILURE() << "on_closed after destruction"; });
  for (int i = 0; i < 10; ++i) accepted_[1]->endpoint->Send(Message(1, Bytes(50)));
  ASSERT_TRUE(Wait([&] { return !accepted_[1]->closed.empty(); }));
  EXPECT_EQ(messages, 1);
  // In on_closed.
  std::unique_ptr<Endpoint> other = client_->Connect(address_).value();
  bool closed = false;
  other->SetHandlers([](const InMessage&) {},
                     [&](Status) {
                       other.reset();
                       closed = true;
                     });
  ASSERT_TRUE(Wait([&] { return accepted_.size() == 3; }));
  accepted_[2]->endpoint->Close();
  EXPECT_TRUE(Wait([&] { return closed; }));
}

TEST_P(TransportSuite, DestroyedTransportClosesItsConnections) {
  ASSERT_NO_FATAL_FAILURE(Connect());
  const Bytes large(8u << 20);
  here_->endpoint->Send(Message(1, {}, {large}));
  client_.reset();  // its endpoints still exist, and do nothing
  here_->endpoint->Send(Message(2));
  EXPECT_EQ(here_->endpoint->bytes_queued(), 0u);
  EXPECT_TRUE(Wait([&] { return !there().closed.empty(); }));
  EXPECT_TRUE(here_->closed.empty());
}

TEST_P(TransportSuite, DescribesPeerAndWire) {
  ASSERT_NO_FATAL_FAILURE(Connect());
  here_->endpoint->Send(Message(1));
  ASSERT_TRUE(Wait([&] { return there().got.size() == 1; }));
  EXPECT_THAT(here_->endpoint->Describe(), testing::HasSubstr(" over "));
  EXPECT_THAT(here_->endpoint->Describe(), testing::HasSubstr(address_));
  const std::string expected = GetParam().name == "UcxShm"   ? "posix/memory (shared memory)"
                               : GetParam().name == "UcxTcp" ? "tcp/"
                                                             : "loopback";
  EXPECT_THAT(here_->endpoint->Describe(), testing::HasSubstr(expected));
  EXPECT_FALSE(client_->Describe().empty());
}

TEST_P(TransportSuite, ServerMayRunInItsOwnThread) {
  std::string address;
  Reactor server_reactor(*clock_, std::chrono::microseconds(20));
  auto server = make_(server_reactor);
  ASSERT_TRUE(server.ok());
  std::vector<std::unique_ptr<Endpoint>> endpoints;
  const Bytes page = RandomBytes(200000, 9);
  address = (*server)
                ->Listen("127.0.0.1:0",
                         [&](std::unique_ptr<Endpoint> endpoint) {
                           Endpoint* raw = endpoint.get();
                           raw->SetHandlers(
                               [raw, &page](const InMessage& m) {
                                 const size_t bytes = m.id % 2 ? page.size() : 10;
                                 raw->Send(Message(m.id, Bytes(m.meta.begin(), m.meta.end()),
                                                   {std::span(page).first(bytes)}));
                               },
                               [](Status) {});
                           endpoints.push_back(std::move(endpoint));
                         })
                .value();
  std::thread thread([&] { server_reactor.Run(); });
  client_ = Make();
  {
    Peer peer(client_->Connect(address).value());
    for (uint64_t i = 0; i < 200; ++i) {
      const Bytes meta = RandomBytes(i * 3, i);
      peer.endpoint->Send(Message(i, meta));
      if (i % 3 != 0) continue;  // some together, some one by one
      ASSERT_TRUE(Wait([&] { return peer.got.size() == i + 1; }));
      EXPECT_TRUE(Same(peer.got.back().meta, meta));
      EXPECT_EQ(peer.got.back().body.size(), i % 2 ? page.size() : 10);
    }
  }
  server_reactor.Stop();
  thread.join();
  endpoints.clear();
}

INSTANTIATE_TEST_SUITE_P(All, TransportSuite,
                         testing::Values(Loopback(), DelayedLoopback(),
                                         Ucx("UcxShm", "posix,tcp,self"),
                                         Ucx("UcxTcp", "tcp,self")),
                         KindName);

TEST(UcxTransport, UnknownTransportsAreAnErrorWithTheRemedy) {
  const auto clock = MakeSteadyClock();
  Reactor reactor(*clock, Duration(0));
  const auto transport = MakeUcxTransport(reactor, {"no_such_wire"});
  ASSERT_FALSE(transport.ok());
  EXPECT_EQ(transport.status().code(), StatusCode::kUnavailable);
  EXPECT_THAT(transport.status().message(), testing::HasSubstr("ucx_info -d"));
}

}  // namespace
}  // namespace icecache
