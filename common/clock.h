// Clock: the seam through which everything that has a deadline reads time. Tests own their time
// through ManualClock and never sleep.
#pragma once

#include <chrono>
#include <memory>

namespace icecache {

using Duration = std::chrono::nanoseconds;
using TimePoint = std::chrono::time_point<std::chrono::steady_clock, Duration>;

class Clock {
 public:
  virtual ~Clock() = default;
  virtual TimePoint Now() const = 0;  // monotonic; any thread
};

// The machine's steady clock. Stateless: one per process, made in main().
std::unique_ptr<Clock> MakeSteadyClock();

// Time that moves only when told to. Starts one hour after the epoch, so that subtracting a
// time-out from Now() never wraps. Advance from the test's thread only.
class ManualClock final : public Clock {
 public:
  TimePoint Now() const override { return now_; }
  void Advance(Duration by) { now_ += by; }

 private:
  TimePoint now_ = TimePoint(std::chrono::hours(1));
};

}  // namespace icecache
