// Connections that end at every moment of their making, between real processes that are stopped,
// continued and killed: no process may end by itself.
//
// The connection manager of UCX runs on a thread of UCX's own, and what goes wrong in it depends on
// when that thread runs. So that thread is also held back, as a crowded machine does
// (common/ucx_missed_events.h). By hand, for as long as asked, with another seed:
// connect_storm_test --seconds 300 --seed 7.
//
// The program is its own helper: --listener TRANSPORTS SEED listens and prints its address,
// --callers TRANSPORTS SEED ADDRESS connects and gives up, --caller TRANSPORTS ADDRESS stays.

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <list>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "common/transport.h"
#include "common/ucx_environment.h"
#include "tests/support/process.h"

namespace icecache {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;
using test::Process;
using test::Seconds;

double seconds_asked = 2;
uint64_t seed_asked = std::random_device{}();

// ---- the helper processes
// ---------------------------------------------------------------------------

std::atomic<unsigned> hold_us = 0;

// UCX's thread does nothing for so long. It comes and goes with what it watches.
void HoldUcxThread(unsigned us) {
  hold_us = us;
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
    const std::string name = test::ReadFile(task.path() / "comm");
    const pid_t thread = std::atoi(task.path().filename().c_str());
    if (name.starts_with("async")) ::syscall(SYS_tgkill, ::getpid(), thread, SIGUSR2);
  }
}

void LetUcxThreadBeHeld() {
  struct sigaction action {};
  action.sa_handler = [](int) { ::usleep(hold_us.load()); };
  action.sa_flags = SA_RESTART;
  ::sigaction(SIGUSR2, &action, nullptr);
}

// Holds it back now and then, until the process is killed.
void StartToHoldUcxThread(uint64_t seed) {
  LetUcxThreadBeHeld();
  std::thread([random = std::mt19937_64(seed)]() mutable {
    while (true) {
      ::usleep(static_cast<useconds_t>(100 + random() % 8000));
      HoldUcxThread(random() % 20000);
    }
  }).detach();
}

// Endpoints, each with a time to live. Every second one says something when it can.
class Crowd {
 public:
  Crowd(Reactor& reactor, uint64_t seed) : reactor_(reactor), random_(seed) {}

  void Add(std::unique_ptr<Endpoint> endpoint) {
    const auto member = members_.insert(members_.end(), Member{++last_, std::move(endpoint)});
    const uint64_t number = last_;
    member->endpoint->SetHandlers([](const InMessage&) {}, [this, number](Status) { End(number); });
    OutMessage message;
    message.kind = 1;
    if (Draw(2) == 0) member->endpoint->Send(std::move(message));
    // From before the first message is written to long after the connection stands.
    reactor_.After(microseconds(Draw(2) == 0 ? Draw(3000) : Draw(60000)),
                   [this, number] { End(number); });
  }
  size_t size() const { return members_.size(); }
  uint64_t Draw(uint64_t below) { return random_() % below; }

 private:
  struct Member {
    uint64_t number;
    std::unique_ptr<Endpoint> endpoint;
  };
  void End(uint64_t number) {
    members_.remove_if([number](const Member& member) { return member.number == number; });
  }
  Reactor& reactor_;
  std::mt19937_64 random_;
  uint64_t last_ = 0;
  std::list<Member> members_;
};

struct Node {
  explicit Node(const std::string& transports, uint64_t seed = 0)
      : clock(MakeSteadyClock()),
        reactor(*clock, microseconds(20)),
        transport(MakeUcxTransport(reactor, {transports}).value()),
        crowd(reactor, seed) {}
  // Turns the loop, and now and then does something else for a while, as a busy shard does.
  void Turn() {
    reactor.RunUntil([] { return false; }, clock->Now() + microseconds(200 + crowd.Draw(2000)));
    if (crowd.Draw(4) == 0) ::usleep(static_cast<useconds_t>(crowd.Draw(15000)));
  }
  const std::unique_ptr<Clock> clock;
  Reactor reactor;
  const std::unique_ptr<Transport> transport;
  Crowd crowd;
};

int RunListener(const std::string& transports, uint64_t seed) {
  StartToHoldUcxThread(seed + 1);
  Node node(transports, seed);
  const auto address = node.transport->Listen("127.0.0.1:0", [&](std::unique_ptr<Endpoint> peer) {
    node.crowd.Add(std::move(peer));
    // Making a connection takes a while, and many come at once when a server goes on.
    if (node.crowd.Draw(3) == 0) ::usleep(static_cast<useconds_t>(node.crowd.Draw(20000)));
  });
  std::printf("%s\n", address.value().c_str());
  std::fflush(stdout);
  while (true) node.Turn();
}

int RunCallers(const std::string& transports, uint64_t seed, const std::string& address) {
  StartToHoldUcxThread(seed + 1);
  Node node(transports, seed);
  constexpr size_t kCallersMax = 12;
  while (true) {
    while (node.crowd.size() < kCallersMax) {
      node.crowd.Add(node.transport->Connect(address).value());
      if (node.crowd.Draw(3) == 0) break;
    }
    node.Turn();
  }
}

int RunCaller(const std::string& transports, const std::string& address) {
  Node node(transports);
  const auto endpoint = node.transport->Connect(address).value();
  endpoint->Send({});
  node.reactor.Run();
  return 0;
}

// ---- the tests
// --------------------------------------------------------------------------------------

class ConnectStorm : public testing::TestWithParam<const char*> {
 protected:
  std::unique_ptr<Process> Start(std::vector<std::string> arguments, bool seeded = true) {
    if (seeded) arguments.insert(arguments.begin() + 1, std::to_string(random_()));
    arguments.insert(arguments.begin() + 1, GetParam());
    return std::make_unique<Process>("/proc/self/exe", arguments);
  }
  static void ExpectAlive(Process& process, const char* which) {
    if (process.Running()) return;
    const ProcessResult end = process.Wait(Seconds(1));
    FAIL() << which << " ended with signal " << end.signal << ", exit code " << end.exit_code
           << ": " << process.Err();
  }
  using ProcessResult = test::ProcessResult;
  std::mt19937_64 random_{seed_asked};
};

TEST_P(ConnectStorm, NobodyEndsBecauseAPeerGaveUp) {
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed_asked));
  const auto listener = Start({"--listener"});
  ASSERT_TRUE(listener->WaitForOutput("\n", Seconds(30))) << listener->Err();
  const std::string text = listener->Out();
  const std::string address = text.substr(0, text.find('\n'));
  std::vector<std::unique_ptr<Process>> callers;
  for (int i = 0; i < 3; ++i) callers.push_back(Start({"--callers", address}));
  const auto end = std::chrono::steady_clock::now() + Seconds(seconds_asked);
  while (std::chrono::steady_clock::now() < end && !HasFatalFailure()) {
    ::usleep(static_cast<useconds_t>(random_() % 60000));
    auto& caller = callers[random_() % callers.size()];
    Process& stopped = random_() % 2 == 0 ? *listener : *caller;
    stopped.Signal(SIGSTOP);
    ::usleep(static_cast<useconds_t>(random_() % 60000));
    if (random_() % 2 == 0) {
      ExpectAlive(*caller, "callers");
      caller->Signal(SIGKILL);
      stopped.Signal(SIGCONT);
      caller = Start({"--callers", address});
    } else {
      stopped.Signal(SIGCONT);
    }
    ExpectAlive(*listener, "the listener");
    for (const auto& each : callers) {
      if (!HasFatalFailure()) ExpectAlive(*each, "callers");
    }
  }
}

// The worst moment by design: UCX has answered a peer behind the back of a busy listener, the peer
// dies, and UCX's thread learns of that after the listener.
TEST_P(ConnectStorm, APeerThatDiesWhileItsListenerIsBusyIsALostConnection) {
  LetUcxThreadBeHeld();
  Node node(GetParam());
  std::unique_ptr<Process> caller;
  std::unique_ptr<Endpoint> peer;
  int lost = 0;
  const std::string address =
      node.transport
          ->Listen("127.0.0.1:0",
                   [&](std::unique_ptr<Endpoint> endpoint) {
                     peer = std::move(endpoint);
                     peer->SetHandlers([](const InMessage&) {}, [&](Status) { ++lost; });
                     ::usleep(50000);
                     HoldUcxThread(30000);
                     ::usleep(2000);
                     caller.reset();  // killed
                   })
          .value();
  const int rounds = std::max(12, static_cast<int>(seconds_asked * 4));
  for (int round = 0; round < rounds; ++round) {
    SCOPED_TRACE(round);
    caller = Start({"--caller", address}, /*seeded=*/false);
    ASSERT_TRUE(node.reactor.RunUntil([&] { return lost == round + 1; },
                                      node.clock->Now() + std::chrono::seconds(10)));
  }
}

INSTANTIATE_TEST_SUITE_P(Ucx, ConnectStorm, testing::Values("posix,tcp,self", "tcp,self"),
                         [](const auto& wire) {
                           return std::string(wire.param).starts_with("posix") ? "Shm" : "Tcp";
                         });

}  // namespace
}  // namespace icecache

int main(int argc, char** argv) {
  icecache::ApplyUcxEnvironment();
  if (argc == 4 && std::strcmp(argv[1], "--listener") == 0) {
    return icecache::RunListener(argv[2], std::strtoull(argv[3], nullptr, 10));
  }
  if (argc == 5 && std::strcmp(argv[1], "--callers") == 0) {
    return icecache::RunCallers(argv[2], std::strtoull(argv[3], nullptr, 10), argv[4]);
  }
  if (argc == 4 && std::strcmp(argv[1], "--caller") == 0) {
    return icecache::RunCaller(argv[2], argv[3]);
  }
  testing::InitGoogleTest(&argc, argv);
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--seconds") == 0) icecache::seconds_asked = std::atof(argv[i + 1]);
    if (std::strcmp(argv[i], "--seed") == 0) {
      icecache::seed_asked = std::strtoull(argv[i + 1], nullptr, 10);
    }
  }
  return RUN_ALL_TESTS();
}
