#include "cacheserver/build_pool.h"

#include <boost/asio/post.hpp>
#include <boost/asio/thread_pool.hpp>
#include <utility>

namespace icecache {

struct BuildPool::Impl {
  explicit Impl(uint32_t threads) : pool(threads) {}
  boost::asio::thread_pool pool;
};

BuildPool::BuildPool(uint32_t threads) : impl_(std::make_unique<Impl>(threads)) {}
BuildPool::~BuildPool() { Stop(); }

void BuildPool::Submit(std::function<void()> task) {
  boost::asio::post(impl_->pool, std::move(task));
}

void BuildPool::Stop() {
  impl_->pool.stop();
  impl_->pool.join();
}

}  // namespace icecache
