#include "common/reactor.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/post.hpp>
#include <chrono>
#include <map>
#include <unordered_map>
#include <utility>
#include <vector>

#include "common/limits.h"

namespace icecache {
namespace {

namespace asio = boost::asio;
using std::chrono::hours;
using std::chrono::milliseconds;
using std::chrono::seconds;

// A socket poll is a system call (~0.4 us), a pump of shared memory is not (~0.05 us): while
// polling busily, only every n-th turn looks at sockets and timers.
constexpr uint32_t kQuickTurns = 16;
// A handler that posts itself again must not keep the pollables and timers waiting.
constexpr int kHandlersPerTurn = 64;

// Sleeps end after these although no descriptor became readable, because UCX wake-ups get lost (CMA
// has none; shared memory between network namespaces has none). Ten wake-ups a second are below 0.1
// % of a core.
constexpr Duration kSafetyActive = milliseconds(10);
constexpr Duration kSafetyIdle = milliseconds(100);
constexpr Duration kActiveFor = seconds(1);
constexpr Duration kPolledOnly = milliseconds(1);  // no descriptor, or silent work
// Silent work: how long to poll on, giving the core away at each turn, before sleeping for
// kPolledOnly. The peer may be waiting for this very core.
constexpr Duration kYieldFor = milliseconds(2);
constexpr Duration kSleepMax = hours(1);

Duration RealNow() { return std::chrono::steady_clock::now().time_since_epoch(); }

// A pollable's place in epoll. Shared with the wait in flight, which may complete after Detach.
struct Watch {
  Watch(Pollable* p, asio::io_context& io) : pollable(p), descriptor(io) {
    if (p->event_fd() < 0) return;
    // A duplicate, because asio closes what it holds and the original belongs to UCX.
    const int fd = ::dup(p->event_fd());
    KV_CHECK(fd >= 0);
    descriptor.assign(fd);
  }
  Pollable* pollable;  // null once detached
  asio::posix::stream_descriptor descriptor;
  bool waiting = false;
};

}  // namespace

struct Reactor::Impl {
  Impl(const Clock& c, Duration s) : clock(c), spin(s), work(io.get_executor()) {}

  bool RunHandlers() {
    int ran = 0;
    while (ran < kHandlersPerTurn && io.poll_one() > 0) ++ran;
    return ran > 0;
  }

  bool RunTimers() {
    if (timers.empty()) return false;
    const TimePoint now = clock.Now();
    // A timer made by a timer of this turn waits for the next turn, also with a delay of zero.
    const TimerId first_new = next_timer;
    bool ran = false;
    while (!timers.empty()) {
      const auto first = timers.begin();
      if (first->first.first > now || first->first.second >= first_new) break;
      const std::function<void()> fn = std::move(first->second);
      timer_times.erase(first->first.second);
      timers.erase(first);
      fn();
      ran = true;
    }
    return ran;
  }

  bool RunPollables() {
    bool ran = false;
    for (size_t i = 0; i < watches.size(); ++i) {  // by index: handlers may attach and detach
      const std::shared_ptr<Watch> watch = watches[i];
      if (watch->pollable != nullptr) ran |= watch->pollable->Progress();
    }
    if (detached) {
      std::erase_if(watches, [](const auto& w) { return w->pollable == nullptr; });
      detached = false;
    }
    return ran;
  }

  struct Turned {
    bool ran = false;         // anything ran
    bool progressed = false;  // a pollable did: worth polling busily for more
  };
  Turned Turn(bool full) {
    Turned turned;
    if (full) {
      turned.ran |= RunHandlers();
      turned.ran |= RunTimers();
    }
    turned.progressed = RunPollables();
    turned.ran |= turned.progressed;
    return turned;
  }

  bool HasSilentWork() const {
    return std::any_of(watches.begin(), watches.end(), [](const auto& watch) {
      return watch->pollable != nullptr && watch->pollable->has_silent_work();
    });
  }

  // False: a pollable has work, do not sleep.
  bool ArmAll() {
    for (const auto& watch : watches) {
      if (watch->pollable == nullptr || !watch->descriptor.is_open()) continue;
      if (!watch->pollable->Arm()) return false;
      if (watch->waiting) continue;
      watch->waiting = true;
      watch->descriptor.async_wait(asio::posix::stream_descriptor::wait_read,
                                   [watch](const auto&) { watch->waiting = false; });
    }
    return true;
  }

  // Sleeps until something is ready or `deadline`. Timers may run up to 1 ms late after a sleep:
  // epoll counts in milliseconds.
  void Sleep(TimePoint deadline, Duration idle_for) {
    if (!ArmAll()) return;
    const TimePoint now = clock.Now();
    Duration wait = std::min(kSleepMax, deadline - now);
    if (!timers.empty()) wait = std::min(wait, timers.begin()->first.first - now);
    for (const auto& watch : watches) {
      if (watch->pollable == nullptr) continue;
      const bool polled = !watch->descriptor.is_open() || watch->pollable->has_silent_work();
      const Duration safety = idle_for < kActiveFor ? kSafetyActive : kSafetyIdle;
      wait = std::min(wait, polled ? kPolledOnly : safety);
    }
    if (wait > Duration(0)) io.run_one_for(wait);
  }

  bool Loop(const std::function<bool()>* done, TimePoint deadline) {
    KV_CHECK(!looping);  // a handler must not block in RunUntil: the loop would run inside itself
    looping = true;
    const bool result = LoopBody(done, deadline);
    looping = false;
    return result;
  }

  bool LoopBody(const std::function<bool()>* done, TimePoint deadline) {
    Duration idle_since(-1);
    for (;; ++turn) {
      if (stop.load(std::memory_order_relaxed) && stop.exchange(false)) return false;
      if (done != nullptr && (*done)()) return true;
      const bool full = turn % kQuickTurns == 0 || watches.empty() || posted.load() > 0;
      if (full && clock.Now() >= deadline) return false;
      const Turned turned = Turn(full);
      if (turned.progressed) idle_since = Duration(-1);
      if (turned.ran || !full)
        continue;  // sockets and timers were not looked at: not known to be idle
      const Duration now = RealNow();
      if (idle_since < Duration(0)) idle_since = now;
      if (now - idle_since < spin && !watches.empty()) continue;
      if (now - idle_since < kYieldFor && HasSilentWork()) {
        ::sched_yield();
        continue;
      }
      Sleep(deadline, now - idle_since);
      turn = kQuickTurns - 1;  // makes the next turn a full one
    }
  }

  const Clock& clock;
  const Duration spin;
  asio::io_context io{1};
  asio::executor_work_guard<asio::io_context::executor_type> work;  // poll and run never "finish"

  std::atomic<bool> stop{false};
  std::atomic<uint32_t> posted{0};  // posted and not yet run: makes the next turn a full one

  std::map<std::pair<TimePoint, TimerId>, std::function<void()>> timers;
  std::unordered_map<TimerId, TimePoint> timer_times;
  TimerId next_timer = 1;
  std::vector<std::shared_ptr<Watch>> watches;
  bool detached = false;
  bool looping = false;
  // Counts on across calls: a caller of many short RunUntil must not starve sockets and timers.
  uint32_t turn = 0;
};

Reactor::Reactor(const Clock& clock, Duration spin) : impl_(std::make_unique<Impl>(clock, spin)) {}

Reactor::~Reactor() {
  for (const auto& watch : impl_->watches) KV_CHECK(watch->pollable == nullptr);
}

const Clock& Reactor::clock() const { return impl_->clock; }
boost::asio::io_context& Reactor::io() { return impl_->io; }

void Reactor::Post(std::function<void()> fn) {
  impl_->posted.fetch_add(1);
  asio::post(impl_->io, [impl = impl_.get(), fn = std::move(fn)] {
    impl->posted.fetch_sub(1);
    fn();
  });
}

Reactor::TimerId Reactor::After(Duration delay, std::function<void()> fn) {
  KV_CHECK(impl_->timers.size() < limits::kTimersMax);
  const TimerId id = impl_->next_timer++;
  const TimePoint at = impl_->clock.Now() + std::max(delay, Duration(0));
  impl_->timers.emplace(std::pair(at, id), std::move(fn));
  impl_->timer_times.emplace(id, at);
  return id;
}

void Reactor::Cancel(TimerId id) {
  const auto it = impl_->timer_times.find(id);
  if (it == impl_->timer_times.end()) return;
  // The function is destroyed after the tables are in order: its destructor may call back into
  // here.
  const auto node = impl_->timers.extract(std::pair(it->second, id));
  impl_->timer_times.erase(it);
}

void Reactor::Attach(Pollable* pollable) {
  impl_->watches.push_back(std::make_shared<Watch>(pollable, impl_->io));
}

void Reactor::Detach(Pollable* pollable) {
  for (const auto& watch : impl_->watches) {
    if (watch->pollable != pollable) continue;
    watch->pollable = nullptr;
    boost::system::error_code ignored;
    if (watch->descriptor.is_open()) watch->descriptor.close(ignored);
    impl_->detached = true;  // removed by RunPollables, which may be running now
  }
}

void Reactor::Run() { impl_->Loop(nullptr, TimePoint::max()); }

void Reactor::Stop() {
  impl_->stop.store(true);
  asio::post(impl_->io, [] {});
}

bool Reactor::RunUntil(const std::function<bool()>& done, TimePoint deadline) {
  return impl_->Loop(&done, deadline);
}

bool Reactor::Poll() { return impl_->Turn(true).ran; }

}  // namespace icecache
