// ComputeThreads: a few threads that share the iterations of one loop at a time.
//
// Made once and kept, since a matrix product of a small model takes less time than starting a
// thread. The thread that calls For() works too; the others sleep between loops. For() is called
// from one thread at a time and returns when every iteration is done. Costs: waking the others
// takes 10-50 us, so a loop of less work than that runs faster in place.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace icecache {

class ComputeThreads {
 public:
  // body(index, thread): thread < count() says whose scratch memory to use.
  using Body = std::function<void(uint32_t index, uint32_t thread)>;

  // 0: one per core. The calling thread is one of them. At most limits::kComputeThreadsMax.
  explicit ComputeThreads(uint32_t threads);
  ~ComputeThreads();
  ComputeThreads(const ComputeThreads&) = delete;
  ComputeThreads& operator=(const ComputeThreads&) = delete;

  uint32_t count() const { return static_cast<uint32_t>(helpers_.size()) + 1; }

  // body(i, thread) for every i in [0, iterations), in no order between threads, ascending within
  // one.
  void For(uint32_t iterations, const Body& body);

 private:
  void HelperMain(uint32_t thread);
  void RunShare(uint32_t thread, const Body& body, uint32_t iterations);

  std::atomic<uint32_t> next_{0};  // own synchronization

  std::mutex mutex_;  // guards what follows
  std::condition_variable start_;
  std::condition_variable done_;
  const Body* body_ = nullptr;
  uint32_t iterations_ = 0;
  uint64_t loop_number_ = 0;
  uint32_t busy_helpers_ = 0;
  bool stopping_ = false;

  std::vector<std::thread> helpers_;  // owner thread only
};

}  // namespace icecache
