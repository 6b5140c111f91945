// For tests: a reactor whose time passes by itself, 20 us for every turn of its loop, so that
// synchronous waits with deadlines end without anybody sleeping.
#pragma once

#include <chrono>

#include "common/clock.h"
#include "common/reactor.h"

namespace icecache::test {

class TestLoop final : private Pollable {
 public:
  TestLoop() { reactor.Attach(this); }
  ~TestLoop() override { reactor.Detach(this); }
  TestLoop(const TestLoop&) = delete;
  TestLoop& operator=(const TestLoop&) = delete;

  ManualClock clock;
  Reactor reactor{clock, std::chrono::hours(1)};

 private:
  bool Progress() override {
    clock.Advance(std::chrono::microseconds(20));
    return true;  // never idle: the loop does not sleep
  }
  int event_fd() const override { return -1; }
  bool Arm() override { return false; }
};

}  // namespace icecache::test
