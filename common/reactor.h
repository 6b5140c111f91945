// Reactor: one thread's event loop. A Boost.Asio io_context, timers on a Clock, and pollables (UCX)
// that are pumped between handlers.
//
// Owned by main(); Run() is called on the one thread that owns everything attached to it. Only
// Post() and Stop() may be called from other threads. Handlers run to completion and never block.
//
// A pollable is hot or armed. A hot one is pumped at each turn; after `spin` without progress its
// event descriptor is armed, and it costs nothing until the descriptor becomes readable or its
// owner calls Wake. So a loop may have thousands of pollables, and only the busy ones take time.
// When none is hot the loop sleeps in epoll. UCX wake-ups can be lost (CMA has none), so armed ones
// are pumped too, after 10 ms at first and then at growing intervals, up to 100 ms. Timers run up
// to 1 ms late after a sleep.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "common/clock.h"
#include "common/status.h"

namespace boost::asio {
class io_context;
}

namespace icecache {

// Something that makes progress when polled and can wake the loop through a file descriptor.
class Pollable {
 public:
  virtual ~Pollable() = default;
  // Does what can be done now; true when anything was done.
  virtual bool Progress() = 0;
  // The descriptor that becomes readable when there is work; -1: none (it is polled).
  virtual int event_fd() const = 0;
  // Arms the descriptor. False: work is pending, call Progress again.
  virtual bool Arm() = 0;
  // True while there is work that the descriptor will not announce, such as a send that waits for
  // room in a peer's shared-memory queue: the loop then polls on for a while and sleeps for 1 ms at
  // most.
  virtual bool has_silent_work() const { return false; }
};

class Reactor {
 public:
  // The clock outlives the reactor. spin: how long to poll busily before sleeping.
  Reactor(const Clock& clock, Duration spin);
  ~Reactor();
  Reactor(const Reactor&) = delete;
  Reactor& operator=(const Reactor&) = delete;

  const Clock& clock() const;
  boost::asio::io_context& io();

  // Runs fn on the loop's thread, in order, after the current handler; what a posted function posts
  // waits for the next turn, so that pollables and timers come in between. Any thread.
  void Post(std::function<void()> fn);

  // Timers. `fn` runs at the first turn of the loop at or after `delay`. Cancel of a timer that has
  // run or of 0 does nothing. Owner's thread.
  using TimerId = uint64_t;
  TimerId After(Duration delay, std::function<void()> fn);
  void Cancel(TimerId id);

  // The pollable must Detach before it is destroyed. Owner's thread.
  void Attach(Pollable* pollable);
  void Detach(Pollable* pollable);
  // Makes it hot. Required after anything that gives it work of which its descriptor, once armed,
  // does not tell, such as posting a send. Cheap when it is hot already.
  void Wake(Pollable* pollable);

  // Runs until Stop().
  void Run();
  // Any thread. Run and RunUntil return soon; the reactor can run again afterwards.
  void Stop();
  // Runs until done() is true (checked after every turn), `deadline` passes or Stop(): a
  // synchronous caller's wait. True when done() was.
  bool RunUntil(const std::function<bool()>& done, TimePoint deadline);
  // One turn without sleeping: ready handlers, due timers, pollables. True when anything ran. With
  // a ManualClock this is how tests drive everything by hand.
  bool Poll();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace icecache
