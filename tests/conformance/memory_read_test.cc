// One-sided reads of a peer's memory (Transport::MakeReadable, Endpoint::Read) over the loopback
// twin and over UCX, which emulates them on this machine: both sides' software takes part. On RDMA
// hardware they have not been run.
#include "tests/conformance/transport_suite.h"

namespace icecache {
namespace {

class ReadSuite : public TransportSuite {
 protected:
  void ConnectAndSpeak() {
    ASSERT_NO_FATAL_FAILURE(Connect());
    there().endpoint->Send(Message(1));
    ASSERT_TRUE(Wait([&] { return !here_->got.empty(); }));
  }
  Status Read(std::span<const MemoryRead> reads) {
    std::vector<Status> ends;
    here_->endpoint->Read(reads, nullptr, [&](Status s) { ends.push_back(std::move(s)); });
    EXPECT_TRUE(ends.empty()) << "on a later turn";
    EXPECT_TRUE(Wait([&] { return !ends.empty(); }));
    RunTurns();
    EXPECT_EQ(ends.size(), 1u);
    return ends.empty() ? DeadlineExceeded("") : ends[0];
  }
};

TEST_P(ReadSuite, BringsThePeersMemoryAsItIsNow) {
  ASSERT_NO_FATAL_FAILURE(ConnectAndSpeak());
  Bytes a = RandomBytes(1 << 20, 1), b = RandomBytes(5000, 2);
  const auto of_a = server_->MakeReadable(a).value(), of_b = server_->MakeReadable(b).value();
  Bytes to(3 * 8192 + 77);
  const std::span<std::byte> out(to);
  const std::vector<MemoryRead> reads = {{of_a->key(), 4096, out.first(8192)},
                                         {of_b->key(), 0, out.subspan(8192, 77)},
                                         {of_a->key(), (1 << 20) - 8192, out.subspan(8269, 8192)}};
  for (int round = 0; round < 3; ++round) {
    const Bytes fresh = RandomBytes(a.size(), static_cast<uint64_t>(round) + 10);
    std::memcpy(a.data(), fresh.data(), a.size());
    ASSERT_EQ(Read(reads).ToString(), "OK");
    EXPECT_EQ(std::memcmp(to.data(), a.data() + 4096, 8192), 0);
    EXPECT_EQ(std::memcmp(to.data() + 8192, b.data(), 77), 0);
    EXPECT_EQ(std::memcmp(to.data() + 8269, a.data() + (1 << 20) - 8192, 8192), 0);
  }
}

TEST_P(ReadSuite, RefusesWhatIsOutsideAndWhatIsNoKey) {
  ASSERT_NO_FATAL_FAILURE(ConnectAndSpeak());
  Bytes memory = RandomBytes(10000, 1), to(4096);
  const auto readable = server_->MakeReadable(memory).value();
  const auto code = [&](std::span<const std::byte> key, uint64_t offset) {
    const MemoryRead read{key, offset, to};
    return Read({&read, 1}).code();
  };
  EXPECT_EQ(code(readable->key(), 10000 - 4096), StatusCode::kOk);
  EXPECT_EQ(code(readable->key(), 10000 - 4095), StatusCode::kOutOfRange);
  EXPECT_EQ(code(readable->key(), ~uint64_t{0}), StatusCode::kOutOfRange);
  EXPECT_EQ(code({}, 0), StatusCode::kInvalidArgument);
  EXPECT_EQ(code(RandomBytes(5, 1), 0), StatusCode::kInvalidArgument);
  EXPECT_EQ(code(RandomBytes(limits::kMemoryKeyBytesMax + 1, 1), 0), StatusCode::kInvalidArgument);
}

TEST_P(ReadSuite, MemoryLivesUntilTheReadIsOverAndNothingIsToldAfterClose) {
  if (GetParam().name.starts_with("Ucx")) {
    GTEST_SKIP()
        << "UCX 1.13 ends the process that emulates a read when the reader goes meanwhile; "
           "UnreadableServer has the case that servers know";
  }
  ASSERT_NO_FATAL_FAILURE(ConnectAndSpeak());
  Bytes memory = RandomBytes(1 << 20, 1);
  const auto readable = server_->MakeReadable(memory).value();
  auto to = std::make_shared<Bytes>(memory.size());
  const std::weak_ptr<Bytes> watch = to;
  const MemoryRead read{readable->key(), 0, *to};
  bool told = false;
  here_->endpoint->Read({&read, 1}, to, [&](const Status&) { told = true; });
  to.reset();
  EXPECT_FALSE(watch.expired());
  here_->endpoint->Close();
  EXPECT_TRUE(Wait([&] { return watch.expired(); }));
  EXPECT_FALSE(told);
}

INSTANTIATE_TEST_SUITE_P(All, ReadSuite,
                         testing::Values(Loopback(), DelayedLoopback(),
                                         Ucx("UcxShm", "posix,tcp,self", true),
                                         Ucx("UcxTcp", "tcp,self", true)),
                         KindName);

// A server does not let its software be asked for memory: UCX would look at no key.
class UnreadableServer : public testing::TestWithParam<const char*> {
 protected:
  // The two are connected, and one read of the server's memory is under way.
  void ConnectAndRead() {
    const auto address = server_->Listen("127.0.0.1:0", [&](std::unique_ptr<Endpoint> endpoint) {
      there_ = std::make_unique<Peer>(std::move(endpoint));
      there_->endpoint->Send({});
    });
    here_ = std::make_unique<Peer>(client_->Connect(*address).value());
    ASSERT_TRUE(Wait([&] { return here_->got.size() == 1; }));
    readable_ = server_->MakeReadable(memory_).value();
    const MemoryRead read{readable_->key(), 0, *to_};
    here_->endpoint->Read({&read, 1}, to_, [&](Status s) { ends_.push_back(std::move(s)); });
  }
  bool Wait(const std::function<bool()>& done, Duration at_most = std::chrono::seconds(20)) {
    return reactor_.RunUntil(done, clock_->Now() + at_most);
  }

  const std::unique_ptr<icecache::Clock> clock_ = MakeSteadyClock();
  Reactor reactor_{*clock_, Duration(0)};
  Bytes memory_ = RandomBytes(8192, 1);
  std::shared_ptr<Bytes> to_ = std::make_shared<Bytes>(memory_.size());
  const std::unique_ptr<Transport> server_ =
      MakeUcxTransport(reactor_, {GetParam(), false}).value();
  const std::unique_ptr<Transport> client_ = MakeUcxTransport(reactor_, {GetParam(), true}).value();
  std::unique_ptr<ReadableMemory> readable_;
  std::unique_ptr<Peer> there_, here_;
  std::vector<Status> ends_;  // of the read
};
INSTANTIATE_TEST_SUITE_P(Ucx, UnreadableServer, testing::Values("posix,tcp,self", "tcp,self"),
                         [](const auto& i) { return i.index == 0 ? "Shm" : "Tcp"; });

TEST_P(UnreadableServer, NeverAnswersAReadThatUcxWouldEmulate) {
  ASSERT_NO_FATAL_FAILURE(ConnectAndRead());
  EXPECT_FALSE(Wait([&] { return !ends_.empty(); }, std::chrono::milliseconds(200)));
  EXPECT_TRUE(Same(*to_, Bytes(memory_.size())));
  there_->endpoint->Send({});  // the connection is none the worse
  EXPECT_TRUE(Wait([&] { return here_->got.size() == 2; }));
  // The memory that it might have been written to is let go with the connection.
  const std::weak_ptr<Bytes> watch = to_;
  to_.reset();
  EXPECT_FALSE(watch.expired());
  here_->endpoint->Close();
  EXPECT_TRUE(Wait([&] { return watch.expired(); }));
  EXPECT_TRUE(ends_.empty());
}

TEST_P(UnreadableServer, ReaderIsToldWhenTheConnectionBreaks) {
  ASSERT_NO_FATAL_FAILURE(ConnectAndRead());
  there_->endpoint->Close();
  ASSERT_TRUE(Wait([&] { return !here_->closed.empty(); }));
  ASSERT_EQ(ends_.size(), 1u) << "before on_closed";
  EXPECT_EQ(ends_[0].code(), StatusCode::kUnavailable);
}

}  // namespace
}  // namespace icecache
