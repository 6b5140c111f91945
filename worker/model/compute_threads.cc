#include "worker/model/compute_threads.h"

#include <algorithm>

#include "common/limits.h"

namespace icecache {

ComputeThreads::ComputeThreads(uint32_t threads) {
  if (threads == 0) threads = std::max(1u, std::thread::hardware_concurrency());
  threads = std::min(threads, limits::kComputeThreadsMax);
  for (uint32_t thread = 1; thread < threads; ++thread) {
    helpers_.emplace_back([this, thread] { HelperMain(thread); });
  }
}

ComputeThreads::~ComputeThreads() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  start_.notify_all();
  for (std::thread& helper : helpers_) helper.join();
}

void ComputeThreads::RunShare(uint32_t thread, const Body& body, uint32_t iterations) {
  for (uint32_t i = next_.fetch_add(1); i < iterations; i = next_.fetch_add(1)) body(i, thread);
}

void ComputeThreads::For(uint32_t iterations, const Body& body) {
  if (helpers_.empty() || iterations < 2) {
    for (uint32_t i = 0; i < iterations; ++i) body(i, 0);
    return;
  }
  next_ = 0;
  {
    std::lock_guard lock(mutex_);
    body_ = &body;
    iterations_ = iterations;
    ++loop_number_;
    busy_helpers_ = static_cast<uint32_t>(helpers_.size());
  }
  start_.notify_all();
  RunShare(0, body, iterations);
  std::unique_lock lock(mutex_);
  done_.wait(lock, [this] { return busy_helpers_ == 0; });
}

void ComputeThreads::HelperMain(uint32_t thread) {
  uint64_t seen = 0;
  std::unique_lock lock(mutex_);
  while (true) {
    start_.wait(lock, [&] { return stopping_ || loop_number_ != seen; });
    if (stopping_) return;
    seen = loop_number_;
    const Body& body = *body_;
    const uint32_t iterations = iterations_;
    lock.unlock();
    RunShare(thread, body, iterations);
    lock.lock();
    if (--busy_helpers_ == 0) done_.notify_one();
  }
}

}  // namespace icecache
