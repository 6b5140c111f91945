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
#include <deque>
#include <map>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "common/limits.h"

namespace icecache {
namespace {

namespace asio = boost::asio;
using std::chrono::hours;
using std::chrono::milliseconds;

// A socket poll is a system call (~0.4 us), a pump of shared memory is not (~0.05 us): while
// polling busily, only every n-th turn looks at sockets and timers.
constexpr uint32_t kQuickTurns = 16;
// So many at a time do not keep the pollables and timers waiting.
constexpr int kHandlersPerTurn = 64;

// An armed pollable is pumped although its descriptor says nothing, because UCX wake-ups get lost
// (CMA has none; shared memory between network namespaces has none): when it has been quiet for as
// long again as before, within these bounds. Heartbeats every 200 ms make that 6 pumps each.
constexpr Duration kSafetyMin = milliseconds(10);
constexpr Duration kSafetyMax = milliseconds(100);
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
  bool waiting = false;     // for the descriptor
  bool hot = false;         // in Impl::hot: pumped at each turn
  bool progressed = false;  // since quiet_since was last set
  Duration quiet_since{0};  // real time
  Duration next_pump{0};    // real time; of an armed one
};

}  // namespace

struct Reactor::Impl {
  Impl(const Clock& c, Duration s) : clock(c), spin(s), work(io.get_executor()) {}

  bool RunHandlers() {
    int ran = 0;
    while (ran < kHandlersPerTurn && io.poll_one() > 0) ++ran;
    return RunPosted() || ran > 0;
  }

  // True: the loop must be woken.
  bool AddPosted(std::function<void()> fn) {
    const std::lock_guard lock(posted_mutex);
    incoming.push_back(std::move(fn));
    posted.fetch_add(1);
    return incoming.size() == 1;
  }

  bool RunPosted() {
    if (batch.empty()) {
      if (posted.load() == 0) return false;
      const std::lock_guard lock(posted_mutex);
      batch.swap(incoming);
    }
    for (int n = 0; n < kHandlersPerTurn && !batch.empty(); ++n) {
      const std::function<void()> fn = std::move(batch.front());
      batch.pop_front();
      posted.fetch_sub(1);
      fn();
    }
    return true;
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

  void Heat(const std::shared_ptr<Watch>& watch) {
    if (watch->hot || watch->pollable == nullptr) return;
    watch->hot = true;
    hot.push_back(watch);
  }

  bool RunPollables() {
    bool ran = false;
    for (size_t i = 0; i < hot.size(); ++i) {  // by index: handlers may attach, wake and detach
      Watch* watch = hot[i].get();
      if (watch->pollable == nullptr || !watch->pollable->Progress()) continue;
      watch->progressed = ran = true;
    }
    if (detached) {
      std::erase_if(hot, [](const auto& w) { return w->pollable == nullptr; });
      detached = false;
    }
    return ran;
  }

  bool Turn(bool full) {
    bool ran = false;
    if (full) {
      ran |= RunHandlers();
      ran |= RunTimers();
    }
    return RunPollables() || ran;
  }

  // Arms the pollables that have been quiet for long enough. The answer: how the rest wants to be
  // treated, the most urgent one first.
  enum class Mood { kBusy, kYielding, kPolled, kAsleep };
  Mood CoolDown(Duration now) {
    Mood mood = Mood::kAsleep;
    for (size_t i = 0; i < hot.size();) {
      const Mood its = CoolDown(hot[i], now);
      mood = std::min(mood, its);
      if (its != Mood::kAsleep) {
        ++i;
        continue;
      }
      hot[i]->hot = false;
      hot[i] = std::move(hot.back());
      hot.pop_back();
    }
    return mood;
  }

  Mood CoolDown(const std::shared_ptr<Watch>& watch, Duration now) {
    if (watch->pollable == nullptr) return Mood::kAsleep;
    if (std::exchange(watch->progressed, false)) watch->quiet_since = now;
    const Duration quiet = now - watch->quiet_since;
    if (quiet < spin) return Mood::kBusy;
    if (!watch->descriptor.is_open()) return Mood::kPolled;
    const bool silent = watch->pollable->has_silent_work();
    if (silent && quiet < kYieldFor) return Mood::kYielding;
    if (!watch->pollable->Arm()) return Mood::kBusy;
    watch->next_pump = now + (silent ? kPolledOnly : std::clamp(quiet, kSafetyMin, kSafetyMax));
    first_pump = std::min(first_pump, watch->next_pump);
    if (watch->waiting) return Mood::kAsleep;
    watch->waiting = true;
    watch->descriptor.async_wait(asio::posix::stream_descriptor::wait_read,
                                 [this, watch](const auto& error) {
                                   watch->waiting = false;
                                   if (error || watch->hot) return;
                                   watch->progressed = true;
                                   Heat(watch);
                                 });
    return Mood::kAsleep;
  }

  // True when there was something to do.
  bool PumpArmed(Duration now) {
    if (now < first_pump) return false;
    first_pump = Duration::max();
    std::vector<std::shared_ptr<Watch>> due;  // Progress may change `watches`
    for (const auto& [pollable, watch] : watches) {
      if (watch->hot) continue;
      if (watch->next_pump <= now) {
        due.push_back(watch);
      } else {
        first_pump = std::min(first_pump, watch->next_pump);
      }
    }
    bool ran = false;
    for (const auto& watch : due) {
      if (watch->hot || watch->pollable == nullptr) continue;
      watch->progressed = watch->pollable->Progress();
      ran |= watch->progressed;
      if (watch->progressed || CoolDown(watch, now) != Mood::kAsleep) Heat(watch);
    }
    return ran;
  }

  // Sleeps until something is ready or `deadline`. Timers may run up to 1 ms late after a sleep:
  // epoll counts in milliseconds.
  void Sleep(TimePoint deadline, Duration now, bool polled) {
    Duration wait = std::min(kSleepMax, polled ? kPolledOnly : first_pump - now);
    const TimePoint clock_now = clock.Now();
    wait = std::min(wait, deadline - clock_now);
    if (!timers.empty()) wait = std::min(wait, timers.begin()->first.first - clock_now);
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
    for (;; ++turn) {
      if (stop.load(std::memory_order_relaxed) && stop.exchange(false)) return false;
      if (done != nullptr && (*done)()) return true;
      const bool full = turn % kQuickTurns == 0 || hot.empty() || posted.load() > 0;
      if (full && clock.Now() >= deadline) return false;
      const bool ran = Turn(full);
      if (!full) continue;  // sockets and timers were not looked at: not known to be idle
      const Duration now = RealNow();
      if (PumpArmed(now) || ran) continue;
      const Mood mood = CoolDown(now);
      if (mood == Mood::kBusy) continue;
      if (mood == Mood::kYielding) {
        ::sched_yield();
        continue;
      }
      Sleep(deadline, now, mood == Mood::kPolled);
      turn = kQuickTurns - 1;  // makes the next turn a full one
    }
  }

  const Clock& clock;
  const Duration spin;
  asio::io_context io{1};
  asio::executor_work_guard<asio::io_context::executor_type> work;  // poll and run never "finish"

  std::atomic<bool> stop{false};
  std::atomic<uint32_t> posted{0};  // posted and not yet run: makes the next turn a full one
  std::mutex posted_mutex;
  std::deque<std::function<void()>> incoming;  // under the mutex
  std::deque<std::function<void()>> batch;     // of this turn; older than `incoming`

  std::map<std::pair<TimePoint, TimerId>, std::function<void()>> timers;
  std::unordered_map<TimerId, TimePoint> timer_times;
  TimerId next_timer = 1;
  std::unordered_map<Pollable*, std::shared_ptr<Watch>> watches;
  std::vector<std::shared_ptr<Watch>> hot;
  bool detached = false;                  // `hot` may hold watches without a pollable
  Duration first_pump = Duration::max();  // no armed one is due before
  bool looping = false;
  // Counts on across calls: a caller of many short RunUntil must not starve sockets and timers.
  uint32_t turn = 0;
};

Reactor::Reactor(const Clock& clock, Duration spin) : impl_(std::make_unique<Impl>(clock, spin)) {}

Reactor::~Reactor() { KV_CHECK(impl_->watches.empty()); }

const Clock& Reactor::clock() const { return impl_->clock; }
boost::asio::io_context& Reactor::io() { return impl_->io; }

void Reactor::Post(std::function<void()> fn) {
  if (impl_->AddPosted(std::move(fn))) asio::post(impl_->io, [] {});
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
  const auto watch = std::make_shared<Watch>(pollable, impl_->io);
  KV_CHECK(impl_->watches.emplace(pollable, watch).second);
  watch->progressed = true;
  impl_->Heat(watch);
}

void Reactor::Detach(Pollable* pollable) {
  const auto node = impl_->watches.extract(pollable);
  if (node.empty()) return;
  Watch& watch = *node.mapped();
  watch.pollable = nullptr;
  boost::system::error_code ignored;
  if (watch.descriptor.is_open()) watch.descriptor.close(ignored);
  impl_->detached = true;  // leaves `hot` in RunPollables, which may be running now
}

void Reactor::Wake(Pollable* pollable) {
  const auto it = impl_->watches.find(pollable);
  if (it == impl_->watches.end()) return;
  it->second->progressed = true;
  impl_->Heat(it->second);
}

void Reactor::Run() { impl_->Loop(nullptr, TimePoint::max()); }

void Reactor::Stop() {
  impl_->stop.store(true);
  asio::post(impl_->io, [] {});
}

bool Reactor::RunUntil(const std::function<bool()>& done, TimePoint deadline) {
  return impl_->Loop(&done, deadline);
}

bool Reactor::Poll() {
  for (const auto& [pollable, watch] : impl_->watches) impl_->Heat(watch);
  return impl_->Turn(true);
}

}  // namespace icecache
