#include "common/reactor.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <boost/asio/io_context.hpp>
#include <thread>
#include <vector>

namespace icecache {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

// Work arrives through Add(), from any thread; the descriptor is level-triggered like UCX's.
class FakeWorker : public Pollable {
 public:
  explicit FakeWorker(bool with_descriptor = true)
      : fd_(with_descriptor ? ::eventfd(0, EFD_NONBLOCK) : -1) {}
  ~FakeWorker() override {
    if (fd_ >= 0) ::close(fd_);
  }
  void Add() {
    pending_.fetch_add(1);
    const uint64_t one = 1;
    if (fd_ >= 0) (void)!::write(fd_, &one, sizeof one);
  }
  void AddSilently() { pending_.fetch_add(1); }  // a wake-up that got lost
  bool Progress() override {
    ++polls;
    if (pending_.load() == 0) return false;
    pending_.fetch_sub(1);
    ++done;
    if (on_work) on_work();
    return true;
  }
  int event_fd() const override { return fd_; }
  bool Arm() override {
    ++arms;
    uint64_t ignored;
    if (fd_ >= 0) (void)!::read(fd_, &ignored, sizeof ignored);
    return pending_.load() == 0;
  }

  bool has_silent_work() const override { return silent_work; }

  bool silent_work = false;
  int polls = 0, done = 0;
  std::atomic<int> arms{0};
  std::function<void()> on_work;

 private:
  const int fd_;
  std::atomic<int> pending_{0};
};

struct ManualReactor {
  ManualClock clock;
  Reactor reactor{clock, Duration(0)};
  std::vector<std::string> log;
};

TEST(Reactor, TimersRunInOrderOfTheirTimes) {
  ManualReactor m;
  m.reactor.After(milliseconds(20), [&] { m.log.push_back("b"); });
  m.reactor.After(milliseconds(10), [&] { m.log.push_back("a"); });
  m.reactor.After(milliseconds(20), [&] { m.log.push_back("c"); });
  EXPECT_FALSE(m.reactor.Poll());
  m.clock.Advance(milliseconds(10));
  EXPECT_TRUE(m.reactor.Poll());
  EXPECT_THAT(m.log, testing::ElementsAre("a"));
  m.clock.Advance(milliseconds(10));
  m.reactor.Poll();
  EXPECT_THAT(m.log, testing::ElementsAre("a", "b", "c"));
  EXPECT_FALSE(m.reactor.Poll());
}

TEST(Reactor, CancelledTimerDoesNotRun) {
  ManualReactor m;
  const auto first = m.reactor.After(milliseconds(1), [&] { m.log.push_back("first"); });
  Reactor::TimerId second = 0;
  second = m.reactor.After(milliseconds(3), [&] { m.log.push_back("second"); });
  m.reactor.After(milliseconds(2), [&] { m.reactor.Cancel(second); });
  m.reactor.Cancel(first);
  m.reactor.Cancel(first);
  m.reactor.Cancel(0);
  m.clock.Advance(seconds(1));
  m.reactor.Poll();
  EXPECT_TRUE(m.log.empty());
}

TEST(Reactor, TimerMadeByATimerWaitsForTheNextTurn) {
  ManualReactor m;
  int runs = 0;
  std::function<void()> again = [&] {
    ++runs;
    m.reactor.After(Duration(0), again);
  };
  m.reactor.After(Duration(0), again);
  for (int turn = 1; turn <= 5; ++turn) {
    m.reactor.Poll();
    EXPECT_EQ(runs, turn);
  }
}

TEST(Reactor, PostedFunctionsRunInOrderAfterTheCurrentOne) {
  ManualReactor m;
  m.reactor.Post([&] {
    m.reactor.Post([&] { m.log.push_back("inner"); });
    m.log.push_back("outer");
  });
  m.reactor.Post([&] { m.log.push_back("next"); });
  while (m.reactor.Poll()) {
  }
  EXPECT_THAT(m.log, testing::ElementsAre("outer", "next", "inner"));
}

TEST(Reactor, WhatAPostedFunctionPostsWaitsForTheNextTurn) {
  ManualReactor m;
  FakeWorker worker;
  m.reactor.Attach(&worker);
  worker.on_work = [&] { m.log.push_back("work"); };
  for (int i = 0; i < 2; ++i) worker.Add();
  m.reactor.Post([&] {
    m.log.push_back("first");
    m.reactor.Post([&] { m.log.push_back("second"); });
  });
  m.reactor.Poll();
  m.reactor.Poll();
  EXPECT_THAT(m.log, testing::ElementsAre("first", "work", "second", "work"));
  m.reactor.Detach(&worker);
}

TEST(Reactor, SelfPostingHandlerDoesNotStarveTimersAndPollables) {
  ManualReactor m;
  FakeWorker worker;
  m.reactor.Attach(&worker);
  std::function<void()> again = [&] { m.reactor.Post(again); };
  m.reactor.Post(again);
  m.reactor.After(Duration(0), [&] { m.log.push_back("timer"); });
  worker.Add();
  m.reactor.Poll();
  EXPECT_THAT(m.log, testing::ElementsAre("timer"));
  EXPECT_EQ(worker.done, 1);
  m.reactor.Detach(&worker);
}

TEST(Reactor, PollableMayDetachItselfAndOthersWhileItRuns) {
  ManualReactor m;
  FakeWorker first, second;
  m.reactor.Attach(&first);
  m.reactor.Attach(&second);
  first.on_work = [&] {
    m.reactor.Detach(&first);
    m.reactor.Detach(&second);
  };
  first.Add();
  m.reactor.Poll();
  const int polls = second.polls;
  m.reactor.Poll();
  EXPECT_EQ(first.polls, 1);
  EXPECT_EQ(second.polls, polls);
}

TEST(Reactor, RunUntilReturnsWhenDoneOrLate) {
  const auto clock = MakeSteadyClock();
  Reactor reactor(*clock, Duration(0));
  bool done = false;
  reactor.After(milliseconds(5), [&] { done = true; });
  EXPECT_TRUE(reactor.RunUntil([&] { return done; }, clock->Now() + seconds(10)));
  const TimePoint start = clock->Now();
  EXPECT_FALSE(reactor.RunUntil([] { return false; }, start + milliseconds(20)));
  EXPECT_GE(clock->Now() - start, milliseconds(20));
  EXPECT_LT(clock->Now() - start, seconds(2));
}

TEST(Reactor, StopFromAnotherThreadWakesASleepingLoop) {
  const auto clock = MakeSteadyClock();
  Reactor reactor(*clock, Duration(0));
  int posted = 0;
  std::thread thread([&] {
    for (int i = 0; i < 100; ++i) reactor.Post([&] { ++posted; });
    reactor.Post([&] { reactor.Stop(); });
  });
  reactor.Run();
  thread.join();
  EXPECT_EQ(posted, 100);
  std::thread stopper([&] { reactor.Stop(); });
  reactor.Run();  // runs again after a Stop
  stopper.join();
  reactor.Stop();
  reactor.Run();  // a Stop before Run counts
}

TEST(Reactor, SleepingLoopIsWokenByThePollablesDescriptor) {
  const auto clock = MakeSteadyClock();
  Reactor reactor(*clock, Duration(0));
  FakeWorker worker;
  reactor.Attach(&worker);
  std::thread thread([&] {
    for (int i = 0; i < 50; ++i) {
      // Armed again: asleep, or about to be.
      for (const int seen = worker.arms; worker.arms == seen;) std::this_thread::yield();
      worker.Add();
    }
  });
  EXPECT_TRUE(reactor.RunUntil([&] { return worker.done == 50; }, clock->Now() + seconds(10)));
  thread.join();
  reactor.Detach(&worker);
}

TEST(Reactor, PollableWithoutDescriptorIsPolled) {
  const auto clock = MakeSteadyClock();
  Reactor reactor(*clock, Duration(0));
  FakeWorker worker(/*with_descriptor=*/false);
  reactor.Attach(&worker);
  std::thread thread([&] { worker.Add(); });
  EXPECT_TRUE(reactor.RunUntil([&] { return worker.done == 1; }, clock->Now() + seconds(10)));
  thread.join();
  reactor.Detach(&worker);
}

TEST(Reactor, SilentWorkIsPolledEveryMillisecond) {
  const auto clock = MakeSteadyClock();
  Reactor reactor(*clock, Duration(0));
  FakeWorker worker;
  worker.silent_work = true;
  reactor.Attach(&worker);
  reactor.RunUntil([&] { return worker.arms >= 20; }, clock->Now() + seconds(10));
  const TimePoint start = clock->Now();
  const int arms = worker.arms;
  reactor.RunUntil([&] { return worker.arms - arms >= 20; }, start + seconds(10));
  // At the usual 10 ms between sleeps it would be 200 ms; a busy machine gets some slack.
  EXPECT_LT(clock->Now() - start, milliseconds(150));
  EXPECT_GE(clock->Now() - start, milliseconds(15)) << "busy polling without end";
  reactor.Detach(&worker);
}

// Many connections, one of them busy: the others are armed and take no turns.
TEST(Reactor, OnlyBusyPollablesArePumped) {
  const auto clock = MakeSteadyClock();
  Reactor reactor(*clock, Duration(0));
  FakeWorker busy, quiet;
  reactor.Attach(&busy);
  reactor.Attach(&quiet);
  reactor.RunUntil([&] { return quiet.arms > 0; }, clock->Now() + seconds(10));
  const int polls = quiet.polls;
  busy.Add();
  busy.on_work = [&] { busy.Add(); };
  EXPECT_TRUE(reactor.RunUntil([&] { return busy.done >= 5000; }, clock->Now() + seconds(10)));
  EXPECT_LT(quiet.polls - polls, 1000);
  // And they are heard all the same.
  quiet.Add();
  EXPECT_TRUE(reactor.RunUntil([&] { return quiet.done == 1; }, clock->Now() + seconds(10)));
  reactor.Detach(&busy);
  reactor.Detach(&quiet);
}

// Work that the descriptor does not tell of.
TEST(Reactor, WakeMakesAnArmedPollableHot) {
  const auto clock = MakeSteadyClock();
  Reactor reactor(*clock, milliseconds(50));
  FakeWorker worker;
  reactor.Attach(&worker);
  reactor.RunUntil([&] { return worker.arms > 0; }, clock->Now() + seconds(10));
  const int polls = worker.polls;
  reactor.Wake(&worker);
  reactor.RunUntil([&] { return worker.polls > polls + 100; }, clock->Now() + milliseconds(40));
  EXPECT_GT(worker.polls, polls + 100);
  reactor.Detach(&worker);
  reactor.Wake(&worker);  // nothing
}

TEST(Reactor, ArmedPollableIsPumpedThoughItsDescriptorSaysNothing) {
  const auto clock = MakeSteadyClock();
  Reactor reactor(*clock, Duration(0));
  FakeWorker worker;
  reactor.Attach(&worker);
  reactor.RunUntil([&] { return worker.arms > 0; }, clock->Now() + seconds(10));
  worker.AddSilently();
  EXPECT_TRUE(reactor.RunUntil([&] { return worker.done == 1; }, clock->Now() + seconds(10)));
  reactor.Detach(&worker);
}

TEST(Reactor, SpinsBeforeArmingOnlyWhenAskedTo) {
  const auto clock = MakeSteadyClock();
  for (const Duration spin : {Duration(0), Duration(milliseconds(50))}) {
    Reactor reactor(*clock, spin);
    FakeWorker worker;
    reactor.Attach(&worker);
    reactor.RunUntil([] { return false; }, clock->Now() + milliseconds(20));
    if (spin == Duration(0)) {
      EXPECT_GT(worker.arms.load(), 0);
    } else {
      EXPECT_EQ(worker.arms.load(), 0);  // 20 ms are less than the spin
      EXPECT_GT(worker.polls, 100);
    }
    reactor.Detach(&worker);
  }
}

// Idle: under 1 % of a core. CPU time and wake-ups are counted, so a busy machine does not matter.
TEST(Reactor, IdleLoopSleeps) {
  const auto clock = MakeSteadyClock();
  Reactor reactor(*clock, std::chrono::microseconds(50));
  FakeWorker worker;
  reactor.Attach(&worker);
  const auto cpu_seconds = [] {
    rusage usage{};
    ::getrusage(RUSAGE_THREAD, &usage);
    return static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           1e-6 * static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
  };
  int arms = 0;
  double cpu = 0;
  reactor.After(milliseconds(1200), [&] {  // quiet for more than a second: idle
    arms = worker.arms;
    cpu = cpu_seconds();
  });
  reactor.RunUntil([] { return false; }, clock->Now() + milliseconds(2200));
  EXPECT_LE(arms, 130);               // every 10 ms at first
  EXPECT_LE(worker.arms - arms, 14);  // every 100 ms then
  EXPECT_GE(worker.arms - arms, 2);
  EXPECT_LT(cpu_seconds() - cpu, 0.01);
  reactor.Detach(&worker);
}

TEST(ReactorDeathTest, WaitingInsideAHandlerIsRefused) {
  ManualReactor m;
  m.reactor.Post([&] { m.reactor.RunUntil([] { return true; }, TimePoint::max()); });
  EXPECT_DEATH(m.reactor.RunUntil([] { return false; }, TimePoint::max()), "invariant broken");
}

}  // namespace
}  // namespace icecache
