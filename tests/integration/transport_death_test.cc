// Real processes that die or stop while they are connected over UCX, by shared memory and by TCP:
// the other side notices in time and every call ends once.
//
// The program is its own helper: with --echo-server TRANSPORTS or --caller TRANSPORTS ADDRESS it is
// the process that gets the signal.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "common/channel.h"
#include "common/ucx_environment.h"

namespace icecache {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr Duration kSpin = std::chrono::microseconds(20);

struct Node {
  explicit Node(const std::string& transports)
      : clock(MakeSteadyClock()),
        reactor(*clock, kSpin),
        transport(MakeUcxTransport(reactor, {transports}).value()) {}
  bool Wait(const std::function<bool()>& done, Duration at_most = seconds(10)) {
    return reactor.RunUntil(done, clock->Now() + at_most);
  }
  const std::unique_ptr<Clock> clock;
  Reactor reactor;
  const std::unique_ptr<Transport> transport;
};

OutMessage Request(size_t meta_bytes = 32) {
  OutMessage request;
  request.kind = 1;
  request.meta.resize(meta_bytes);
  return request;
}

// ---- the helper processes
// ---------------------------------------------------------------------------

// Answers requests of kind 1 with 1 MiB, says nothing to those of kind 2. Prints its address.
int RunEchoServer(const std::string& transports) {
  Node node(transports);
  static const std::vector<std::byte> pages(1u << 20);
  std::vector<std::unique_ptr<Channel>> channels;
  const auto address = node.transport->Listen("127.0.0.1:0", [&](std::unique_ptr<Endpoint> e) {
    channels.push_back(std::make_unique<Channel>(node.reactor, std::move(e)));
    Channel* channel = channels.back().get();
    channel->SetHandler([channel](const InMessage& m) {
      if (m.kind != 1) return;
      OutMessage reply = Request();
      reply.body.push_back(pages);
      channel->Reply(m.id, std::move(reply));
    });
  });
  std::printf("%s\n", address.value().c_str());
  std::fflush(stdout);
  node.reactor.Run();
  return 0;
}

// Calls without end. Prints a line after the first reply.
int RunCaller(const std::string& transports, const std::string& address) {
  Node node(transports);
  Channel channel(node.reactor, node.transport->Connect(address).value());
  for (int calls = 0;; ++calls) {
    bool done = false;
    channel.Call(Request(), seconds(10), [&](Result<InMessage>) { done = true; });
    if (!node.Wait([&] { return done; })) return 1;
    if (calls == 0) {
      std::printf("ready\n");
      std::fflush(stdout);
    }
  }
}

class Child {
 public:
  explicit Child(const std::vector<std::string>& arguments) {
    int pipe_fds[2];
    if (::pipe(pipe_fds) != 0) std::abort();
    pid_ = ::fork();
    if (pid_ == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);  // a failing test leaves nothing behind
      ::dup2(pipe_fds[1], STDOUT_FILENO);
      ::close(pipe_fds[0]);
      ::close(pipe_fds[1]);
      std::vector<char*> argv = {const_cast<char*>("transport_death_test")};
      for (const auto& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
      argv.push_back(nullptr);
      ::execv("/proc/self/exe", argv.data());
      ::_exit(127);
    }
    ::close(pipe_fds[1]);
    out_ = ::fdopen(pipe_fds[0], "r");
  }
  ~Child() {
    Signal(SIGKILL);
    ::waitpid(pid_, nullptr, 0);
    std::fclose(out_);
  }
  // Turns the node's loop while it waits: a process may take a second to start on a busy machine,
  // and to its peers a node that says nothing for so long is dead.
  std::string ReadLine(Node& node) {
    const auto readable = [this] {
      pollfd ready{::fileno(out_), POLLIN, 0};
      return ::poll(&ready, 1, 0) > 0;
    };
    for (int i = 0; i < 4000 && !node.Wait(readable, milliseconds(5)); ++i) {
    }
    char line[256] = {};
    if (std::fgets(line, sizeof line, out_) == nullptr) return "";
    return std::string(line, std::strcspn(line, "\n"));
  }
  void Signal(int signal) const { ::kill(pid_, signal); }

 private:
  pid_t pid_ = 0;
  FILE* out_ = nullptr;
};

// ---- the tests
// ----------------------------------------------------------------------------------------

class TransportDeath : public testing::TestWithParam<const char*> {
 protected:
  const std::string transports_ = GetParam();

  // The time from the signal to on_closed, with a call in flight that is never answered, or without
  // one.
  Duration NoticedBySurvivingClient(int signal, bool call_in_flight) {
    Child server({"--echo-server", transports_});
    Node node(transports_);
    Channel channel(node.reactor, node.transport->Connect(server.ReadLine(node)).value());
    std::vector<Status> closed, ends;
    channel.SetOnClosed([&](Status status) { closed.push_back(std::move(status)); });
    bool ready = false;
    channel.Call(Request(), seconds(10), [&](Result<InMessage> m) { ready = m.ok(); });
    EXPECT_TRUE(node.Wait([&] { return ready; }));
    if (call_in_flight) {
      OutMessage unanswered = Request();
      unanswered.kind = 2;
      channel.Call(std::move(unanswered), seconds(30),
                   [&](Result<InMessage> m) { ends.push_back(m.status()); });
    }
    node.Wait([] { return false; }, milliseconds(20));
    const TimePoint start = node.clock->Now();
    server.Signal(signal);
    EXPECT_TRUE(node.Wait([&] { return !closed.empty(); }));
    const Duration took = node.clock->Now() - start;
    EXPECT_EQ(closed.size(), 1u);
    EXPECT_EQ(closed[0].code(), StatusCode::kUnavailable) << closed[0].ToString();
    EXPECT_EQ(ends.size(), call_in_flight ? 1u : 0u);
    for (const Status& end : ends) EXPECT_EQ(end.code(), StatusCode::kUnavailable);
    return took;
  }

  Duration NoticedBySurvivingServer(int signal) {
    Node node(transports_);
    std::unique_ptr<Channel> channel;
    std::vector<Status> closed;
    uint64_t requests = 0;
    const auto address = node.transport->Listen("127.0.0.1:0", [&](std::unique_ptr<Endpoint> e) {
      channel = std::make_unique<Channel>(node.reactor, std::move(e));
      channel->SetOnClosed([&](Status status) { closed.push_back(std::move(status)); });
      channel->SetHandler([&](const InMessage& m) {
        ++requests;
        channel->Reply(m.id, Request());
      });
    });
    const Child caller({"--caller", transports_, *address});
    EXPECT_TRUE(node.Wait([&] { return requests > 50; }));
    const TimePoint start = node.clock->Now();
    caller.Signal(signal);
    EXPECT_TRUE(node.Wait([&] { return !closed.empty(); }));
    return node.clock->Now() - start;
  }

  // Three times: a busy machine may delay one of them, but never beyond what the heartbeats
  // promise.
  static void ExpectWithin(Duration usual, Duration always,
                           const std::function<Duration()>& measure) {
    std::vector<Duration> took = {measure(), measure(), measure()};
    std::sort(took.begin(), took.end());
    const auto ms = [](Duration d) { return std::chrono::duration_cast<milliseconds>(d).count(); };
    std::printf("noticed after %ld, %ld, %ld ms\n", static_cast<long>(ms(took[0])),
                static_cast<long>(ms(took[1])), static_cast<long>(ms(took[2])));
    EXPECT_LE(ms(took[1]), ms(usual)) << "median";
    EXPECT_LE(ms(took[2]), ms(always)) << "worst";
  }
};

TEST_P(TransportDeath, KilledServerIsNoticedWithin250ms) {
  ExpectWithin(milliseconds(250), milliseconds(1500),
               [&] { return NoticedBySurvivingClient(SIGKILL, /*call_in_flight=*/true); });
}

TEST_P(TransportDeath, KilledServerOfAnIdleConnectionIsNoticedWithin250ms) {
  ExpectWithin(milliseconds(250), milliseconds(1500),
               [&] { return NoticedBySurvivingClient(SIGKILL, /*call_in_flight=*/false); });
}

TEST_P(TransportDeath, StoppedServerIsNoticedWithin1500ms) {
  ExpectWithin(milliseconds(1500), milliseconds(1800),
               [&] { return NoticedBySurvivingClient(SIGSTOP, /*call_in_flight=*/true); });
}

TEST_P(TransportDeath, KilledClientIsNoticedWithin250ms) {
  ExpectWithin(milliseconds(250), milliseconds(1500),
               [&] { return NoticedBySurvivingServer(SIGKILL); });
}

TEST_P(TransportDeath, StoppedClientIsNoticedWithin1500ms) {
  ExpectWithin(milliseconds(1500), milliseconds(1800),
               [&] { return NoticedBySurvivingServer(SIGSTOP); });
}

TEST_P(TransportDeath, DeadlineIsKeptWhileTheServerIsStopped) {
  Child server({"--echo-server", transports_});
  Node node(transports_);
  Channel channel(node.reactor, node.transport->Connect(server.ReadLine(node)).value());
  bool ready = false;
  channel.Call(Request(), seconds(10), [&](Result<InMessage> m) { ready = m.ok(); });
  ASSERT_TRUE(node.Wait([&] { return ready; }));
  std::vector<Duration> late;
  for (int i = 0; i < 3; ++i) {
    server.Signal(SIGSTOP);
    std::vector<Status> ends;
    const TimePoint start = node.clock->Now();
    channel.Call(Request(), milliseconds(100),
                 [&](Result<InMessage> m) { ends.push_back(m.status()); });
    ASSERT_TRUE(node.Wait([&] { return !ends.empty(); }));
    late.push_back(node.clock->Now() - start - milliseconds(100));
    EXPECT_EQ(ends[0].code(), StatusCode::kDeadlineExceeded);
    server.Signal(SIGCONT);
    // The connection survives a short stop, and the late reply is dropped.
    ready = false;
    channel.Call(Request(), seconds(10), [&](Result<InMessage> m) { ready = m.ok(); });
    ASSERT_TRUE(node.Wait([&] { return ready; }));
    EXPECT_EQ(ends.size(), 1u);
  }
  EXPECT_FALSE(channel.closed());
  EXPECT_GE(*std::min_element(late.begin(), late.end()), Duration(0));
  EXPECT_LE(*std::min_element(late.begin(), late.end()), milliseconds(10));
}

TEST_P(TransportDeath, NewConnectionWorksAfterTheOldServerDied) {
  Node node(transports_);
  for (int i = 0; i < 3; ++i) {
    Child server({"--echo-server", transports_});
    Channel channel(node.reactor, node.transport->Connect(server.ReadLine(node)).value());
    bool ready = false, closed = false;
    channel.SetOnClosed([&](Status) { closed = true; });
    channel.Call(Request(), seconds(10),
                 [&](Result<InMessage> m) { ready = m.ok() && m->body.size() == 1u << 20; });
    ASSERT_TRUE(node.Wait([&] { return ready; }));
    // Replies of a megabyte are under way when it dies.
    int ended = 0;
    for (int call = 0; call < 20; ++call) {
      channel.Call(Request(), seconds(10), [&](Result<InMessage>) { ++ended; });
    }
    ASSERT_TRUE(node.Wait([&] { return ended >= 2; }));
    server.Signal(SIGKILL);
    ASSERT_TRUE(node.Wait([&] { return closed; }));
    EXPECT_EQ(ended, 20);
  }
}

// Over shared memory a process that is killed while it writes leaves its half of a message in the
// receiver's queue for ever.
TEST_P(TransportDeath, OtherConnectionsGoOnWhenOnePeerIsKilledWhileItSends) {
  Node node(transports_);
  Child steady({"--echo-server", transports_});
  Channel channel(node.reactor, node.transport->Connect(steady.ReadLine(node)).value());
  const auto call = [&](Channel& to) {
    Status end = DeadlineExceeded("nothing came");
    bool ended = false;
    to.Call(Request(), seconds(10), [&](Result<InMessage> m) {
      end = m.ok() && m->body.size() != 1u << 20 ? DataLoss("a short reply") : m.status();
      ended = true;
    });
    node.Wait([&] { return ended; });
    return end.ToString();
  };
  for (int i = 0; i < 5; ++i) {
    Child doomed({"--echo-server", transports_});
    Channel other(node.reactor, node.transport->Connect(doomed.ReadLine(node)).value());
    ASSERT_EQ(call(other), "OK");
    int ended = 0;
    for (int n = 0; n < 20; ++n) {
      other.Call(Request(), seconds(10), [&](Result<InMessage>) { ++ended; });
    }
    ASSERT_TRUE(node.Wait([&] { return ended >= 2; }));
    doomed.Signal(SIGKILL);
    for (int n = 0; n < 5; ++n) ASSERT_EQ(call(channel), "OK") << "death " << i << ", call " << n;
    ASSERT_TRUE(node.Wait([&] { return other.closed(); }));
    EXPECT_EQ(ended, 20);
  }
}

INSTANTIATE_TEST_SUITE_P(Ucx, TransportDeath, testing::Values("posix,tcp,self", "tcp,self"),
                         [](const auto& wire) {
                           return std::string(wire.param).starts_with("posix") ? "Shm" : "Tcp";
                         });

}  // namespace
}  // namespace icecache

int main(int argc, char** argv) {
  icecache::ApplyUcxEnvironment();
  if (argc == 3 && std::strcmp(argv[1], "--echo-server") == 0) {
    return icecache::RunEchoServer(argv[2]);
  }
  if (argc == 4 && std::strcmp(argv[1], "--caller") == 0) {
    return icecache::RunCaller(argv[2], argv[3]);
  }
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
