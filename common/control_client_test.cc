#include "common/control_client.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/read.hpp>
#include <boost/asio/write.hpp>

#include "common/test_loop.h"

namespace icecache {
namespace {

namespace asio = boost::asio;
using std::chrono::milliseconds;
using ::testing::HasSubstr;

// A control service on the same loop: answers as told.
class TestControlServer {
 public:
  explicit TestControlServer(Reactor& reactor)
      : acceptor_(reactor.io(), {asio::ip::address_v4::loopback(), 0}), socket_(reactor.io()) {
    acceptor_.async_accept(socket_, [this](const auto& error) {
      if (!error) Read();
    });
  }
  std::string address() const {
    return "127.0.0.1:" + std::to_string(acceptor_.local_endpoint().port());
  }
  void Close() {
    boost::system::error_code ignored;
    socket_.close(ignored);
  }
  void Send(const wire::ControlReply& reply) {
    const std::vector<std::byte> frame = wire::EncodeFrame(reply);
    asio::write(socket_, asio::buffer(frame));
  }
  void SendBytes(const std::string& bytes) { asio::write(socket_, asio::buffer(bytes)); }

  bool silent = false;  // answers nothing any more
  bool refuse_renewals = false;
  uint16_t version = wire::kProtocolVersion;
  int renewals = 0;
  std::function<void(const wire::ControlRequest&)> on_request;  // all but hello and renew

 private:
  void Read() {
    asio::async_read(socket_, asio::buffer(header_), [this](const auto& error, size_t) {
      if (error) return;
      frame_.assign(header_.begin(), header_.end());
      frame_.resize(wire::FrameBytes(header_).value());
      asio::async_read(socket_, asio::buffer(frame_) + header_.size(),
                       [this](const auto& body_error, size_t) {
                         if (body_error) return;
                         Handle(wire::DecodeRequest(frame_).value());
                         Read();
                       });
    });
  }
  void Handle(const wire::ControlRequest& request) {
    if (silent) return;
    if (std::holds_alternative<wire::Hello>(request.body)) {
      Send({request.id, wire::HelloReply{version, "test", {"0.0.0.0:7", "10.0.0.1:8"}, 100}});
    } else if (std::holds_alternative<wire::Renew>(request.body)) {
      ++renewals;
      if (refuse_renewals) {
        Send({request.id, FailedPrecondition("the lease has run out")});
      } else {
        Send({request.id, wire::Done{}});
      }
    } else {
      on_request(request);
    }
  }

  asio::ip::tcp::acceptor acceptor_;
  asio::ip::tcp::socket socket_;
  std::array<std::byte, wire::kFrameHeaderBytes> header_;
  std::vector<std::byte> frame_;
};

class ControlClientTest : public ::testing::Test {
 protected:
  Result<std::unique_ptr<ControlClient>> Connect() {
    ControlClientOptions options;
    options.address = server_.address();
    options.deadline = milliseconds(2000);
    options.interrupted = [this] { return interrupted_; };
    return ControlClient::Connect(loop_.reactor, options);
  }
  void Turn(Duration time) {
    loop_.reactor.RunUntil([] { return false; }, loop_.clock.Now() + time);
  }

  test::TestLoop loop_;
  TestControlServer server_{loop_.reactor};
  bool interrupted_ = false;
};

TEST_F(ControlClientTest, HelloTellsWhereTheShardsAre) {
  const auto client = Connect();
  ASSERT_TRUE(client.ok()) << client.status().ToString();
  EXPECT_THAT((*client)->hello().shards, ::testing::ElementsAre("127.0.0.1:7", "10.0.0.1:8"));
}

TEST_F(ControlClientTest, RequestsCarryWhatTheyShouldAndErrorsComeBack) {
  const auto client = Connect();
  ASSERT_TRUE(client.ok()) << client.status().ToString();
  server_.on_request = [&](const wire::ControlRequest& request) {
    const auto* fork = std::get_if<wire::Fork>(&request.body);
    ASSERT_NE(fork, nullptr);
    if (fork->parent == "absent") {
      server_.Send({request.id, NotFound("no such context")});
      return;
    }
    wire::Grant grant;
    grant.context.name = fork->name;
    grant.context.shape = {4, 2, 8, 64, DType::kF16};
    grant.epoch = Epoch(12);
    grant.ticket.resize(16);
    server_.Send({request.id, grant});
  };
  const auto grant = (*client)->Fork("doc", "mine");
  ASSERT_TRUE(grant.ok()) << grant.status().ToString();
  EXPECT_EQ(grant->context.name, "mine");
  EXPECT_EQ(grant->epoch.value, 12u);
  const Status error = (*client)->Fork("absent", "x").status();
  EXPECT_EQ(error.code(), StatusCode::kNotFound);
  EXPECT_THAT(error.message(), HasSubstr("absent"));
}

TEST_F(ControlClientTest, AnotherKindOfReplyIsAnError) {
  const auto client = Connect();
  ASSERT_TRUE(client.ok());
  server_.on_request = [&](const auto& request) { server_.Send({request.id, wire::Done{}}); };
  EXPECT_EQ((*client)->Open("doc").status().code(), StatusCode::kInternal);
}

TEST_F(ControlClientTest, NobodyThereIsUnavailableWithTheAddress) {
  ControlClientOptions options;
  options.address = "127.0.0.1:1";
  const auto client = ControlClient::Connect(loop_.reactor, options);
  EXPECT_EQ(client.status().code(), StatusCode::kUnavailable);
  EXPECT_THAT(client.status().message(), HasSubstr("127.0.0.1:1"));
  options.address = "7400";
  EXPECT_EQ(ControlClient::Connect(loop_.reactor, options).status().code(),
            StatusCode::kInvalidArgument);
}

TEST_F(ControlClientTest, AnotherProtocolVersionIsRefused) {
  server_.version = wire::kProtocolVersion + 1;
  EXPECT_EQ(Connect().status().code(), StatusCode::kUnimplemented);
}

TEST_F(ControlClientTest, ASilentServerCostsTheDeadline) {
  server_.silent = true;
  const TimePoint start = loop_.clock.Now();
  EXPECT_EQ(Connect().status().code(), StatusCode::kDeadlineExceeded);
  EXPECT_LT(loop_.clock.Now() - start, milliseconds(2100));
}

TEST_F(ControlClientTest, ALostConnectionEndsWaitsAndLaterCalls) {
  const auto client = Connect();
  ASSERT_TRUE(client.ok());
  server_.on_request = [&](const auto&) { server_.Close(); };
  const Status during = (*client)->Seal(ContextId(1));
  EXPECT_EQ(during.code(), StatusCode::kUnavailable) << during.ToString();
  EXPECT_THAT(during.message(), HasSubstr(server_.address()));
  EXPECT_EQ((*client)->Publish(ContextId(1)).code(), StatusCode::kUnavailable);
  EXPECT_EQ((*client)->Health().code(), StatusCode::kUnavailable);
}

TEST_F(ControlClientTest, RenewsWhileTheLoopTurns) {
  const auto client = Connect();
  ASSERT_TRUE(client.ok());
  Turn(milliseconds(1050));
  EXPECT_GE(server_.renewals, 9);
  EXPECT_TRUE((*client)->Health().ok());
}

TEST_F(ControlClientTest, UnansweredRenewalsMeanTheServerIsLost) {
  const auto client = Connect();
  ASSERT_TRUE(client.ok());
  server_.silent = true;
  Turn(milliseconds(1500));
  EXPECT_TRUE((*client)->Health().ok());
  loop_.reactor.RunUntil([&] { return !(*client)->Health().ok(); },
                         loop_.clock.Now() + std::chrono::seconds(20));
  EXPECT_EQ((*client)->Health().code(), StatusCode::kUnavailable);
}

TEST_F(ControlClientTest, ARefusedRenewalMeansTheLeaseIsLost) {
  const auto client = Connect();
  ASSERT_TRUE(client.ok());
  server_.refuse_renewals = true;
  Turn(milliseconds(300));
  EXPECT_EQ((*client)->Health().code(), StatusCode::kUnavailable);
  EXPECT_THAT((*client)->Health().message(), HasSubstr("run out"));
}

TEST_F(ControlClientTest, GarbageEndsTheConnection) {
  const auto client = Connect();
  ASSERT_TRUE(client.ok());
  server_.on_request = [&](const auto&) { server_.SendBytes(std::string(64, '\xff')); };
  EXPECT_EQ((*client)->Seal(ContextId(1)).code(), StatusCode::kUnavailable);
}

TEST_F(ControlClientTest, AnInterruptEndsAWait) {
  const auto client = Connect();
  ASSERT_TRUE(client.ok());
  server_.on_request = [&](const auto&) { interrupted_ = true; };
  EXPECT_EQ((*client)->Seal(ContextId(1)).code(), StatusCode::kCancelled);
}

TEST_F(ControlClientTest, ALateReplyIsNotTakenForAnother) {
  const auto client = Connect();
  ASSERT_TRUE(client.ok());
  uint64_t late = 0;
  server_.on_request = [&](const auto& request) { late = request.id; };
  EXPECT_EQ((*client)->Seal(ContextId(1)).code(), StatusCode::kDeadlineExceeded);
  server_.on_request = [&](const auto& request) {
    server_.Send({late, NotFound("for the first")});
    server_.Send({request.id, wire::Done{}});
  };
  const Status status = (*client)->Publish(ContextId(1));
  EXPECT_TRUE(status.ok()) << status.ToString();
}

}  // namespace
}  // namespace icecache
