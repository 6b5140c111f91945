#include "cacheserver/build_pool.h"

#include <boost/asio/post.hpp>
#include <boost/asio/thread_pool.hpp>
#include <chrono>
#include <mutex>
#include <optional>
#include <utility>

#include "cacheserver/fair_queue.h"

namespace icecache {

using Task = std::function<void()>;

struct BuildPool::Impl {
  explicit Impl(uint32_t threads) : pool(threads) {}

  // Posted once for each task, so there is one.
  void RunNext() {
    std::optional<FairQueue<Task>::Next> next;
    {
      const std::lock_guard lock(mutex);
      next = queue.Pop();
    }
    const auto begin = std::chrono::steady_clock::now();
    next->item();
    const Duration took = std::chrono::steady_clock::now() - begin;
    const std::lock_guard lock(mutex);
    queue.Charge(next->tenant, took);
  }

  std::mutex mutex;  // of the queue
  FairQueue<Task> queue;
  boost::asio::thread_pool pool;  // ends first: its threads use the rest
};

BuildPool::BuildPool(uint32_t threads) : impl_(std::make_unique<Impl>(threads)) {}
BuildPool::~BuildPool() { Stop(); }

void BuildPool::SetWeight(TenantId tenant, uint32_t weight) {
  const std::lock_guard lock(impl_->mutex);
  impl_->queue.SetWeight(tenant, weight);
}

void BuildPool::Submit(TenantId tenant, std::function<void()> task) {
  {
    const std::lock_guard lock(impl_->mutex);
    impl_->queue.Push(tenant, std::move(task));
  }
  boost::asio::post(impl_->pool, [impl = impl_.get()] { impl->RunNext(); });
}

void BuildPool::Stop() {
  impl_->pool.stop();
  impl_->pool.join();
}

}  // namespace icecache
