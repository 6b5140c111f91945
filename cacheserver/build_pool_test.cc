#include "cacheserver/build_pool.h"

#include <gtest/gtest.h>

#include <chrono>
#include <future>
#include <vector>

namespace icecache {
namespace {

TEST(BuildPool, ATenantsBuildDoesNotWaitForAllOfAnothers) {
  BuildPool pool(1);
  std::promise<void> submitted, done;
  pool.Submit(TenantId(0), [&] {
    const auto begin = std::chrono::steady_clock::now();
    submitted.get_future().wait();
    while (std::chrono::steady_clock::now() < begin + std::chrono::milliseconds(1)) {
    }
  });
  std::vector<uint32_t> order;  // one thread
  for (int i = 0; i < 20; ++i) pool.Submit(TenantId(0), [&] { order.push_back(0); });
  pool.Submit(TenantId(1), [&] {
    order.push_back(1);
    done.set_value();
  });
  submitted.set_value();
  done.get_future().wait();
  pool.Stop();
  // The first tenant has had the thread for a while, so the other is next.
  EXPECT_EQ(order.front(), 1u);
}

}  // namespace
}  // namespace icecache
