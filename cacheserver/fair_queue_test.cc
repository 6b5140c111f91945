#include "cacheserver/fair_queue.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <deque>
#include <map>
#include <random>
#include <string>
#include <vector>

namespace icecache {
namespace {

using std::chrono::microseconds;

constexpr TenantId kA{1}, kB{2}, kC{3};

// Serves as a shard does: one item at a time, each takes as long as it says.
class Served {
 public:
  struct Work {
    int number;
    Duration takes;
  };
  FairQueue<Work> queue;
  std::map<TenantId, Duration> service;
  std::map<TenantId, int> count;
  std::vector<TenantId> order;

  void Add(TenantId tenant, int items, Duration each) {
    for (int i = 0; i < items; ++i) queue.Push(tenant, {next_number_++, each});
  }
  bool ServeOne() {
    const auto next = queue.Pop();
    if (!next) return false;
    service[next->tenant] += next->item.takes;
    ++count[next->tenant];
    order.push_back(next->tenant);
    queue.Charge(next->tenant, next->item.takes);
    return true;
  }
  void Serve(int items) {
    for (int i = 0; i < items; ++i) ASSERT_TRUE(ServeOne());
  }

 private:
  int next_number_ = 0;
};

TEST(FairQueue, SharesAreProportionalToWeightWhateverItemsCost) {
  Served s;
  s.queue.SetWeight(kA, 3);
  s.queue.SetWeight(kB, 1);
  s.Add(kA, 4000, microseconds(50));    // small requests
  s.Add(kB, 4000, microseconds(1700));  // large ones
  s.Serve(3500);
  const double ratio =
      static_cast<double>(s.service[kA].count()) / static_cast<double>(s.service[kB].count());
  EXPECT_NEAR(ratio, 3, 0.15);
}

TEST(FairQueue, EqualItemsOfEqualWeightAlternate) {
  Served s;
  s.Add(kA, 3, microseconds(10));
  s.Add(kB, 3, microseconds(10));
  s.Serve(6);
  EXPECT_THAT(s.order, ::testing::ElementsAre(kA, kB, kA, kB, kA, kB));
}

TEST(FairQueue, WorkThatTakesNoTimeGoesRound) {
  Served s;
  s.Add(kA, 3, Duration(0));
  s.Add(kB, 3, Duration(0));
  s.Serve(6);
  EXPECT_THAT(s.order, ::testing::ElementsAre(kA, kB, kA, kB, kA, kB));
}

TEST(FairQueue, ANewcomerPassesALongQueue) {
  Served s;
  s.Add(kA, 1000, microseconds(500));
  s.Serve(100);
  s.Add(kB, 1, microseconds(20));
  s.Serve(2);
  EXPECT_EQ(s.count[kB], 1);
}

TEST(FairQueue, IdlingSavesNothingUp) {
  Served s;
  s.Add(kA, 1000, microseconds(100));
  s.Add(kB, 1, microseconds(100));
  s.Serve(901);  // B was there, and then away for 90 ms
  s.Add(kB, 1000, microseconds(100));
  s.count.clear();
  s.Serve(80);
  EXPECT_NEAR(s.count[kB], 40, 1);
}

TEST(FairQueue, WorkOutsideOfItemsIsPaidFor) {
  Served s;
  s.Add(kA, 100, microseconds(100));
  s.Add(kB, 100, microseconds(100));
  s.queue.Charge(kA, microseconds(1000));  // indexing, say
  s.Serve(40);
  EXPECT_NEAR(s.count[kB] - s.count[kA], 10, 1);
}

TEST(FairQueue, AChangedWeightHoldsFromThenOn) {
  Served s;
  s.Add(kA, 1000, microseconds(100));
  s.Add(kB, 1000, microseconds(100));
  s.Serve(100);
  s.queue.SetWeight(kB, 4);
  s.count.clear();
  s.Serve(500);
  EXPECT_NEAR(s.count[kB], 400, 3);
}

// Random tenants, weights, costs and arrivals. What holds, after every step: nothing is lost, items
// of a tenant leave in order, the server is never idle while something waits, and two tenants that
// both wait all the time differ in service per weight by no more than their largest items.
class RandomRun {
 public:
  explicit RandomRun(uint64_t seed) : random_(seed) {
    for (uint64_t i = 0; i < kTenants; ++i) {
      weights_.push_back(static_cast<uint32_t>(1 + random_() % limits::kTenantWeightMax));
      queue_.SetWeight(TenantId(static_cast<uint32_t>(i)), weights_.back());
    }
  }

  void Step() {
    const size_t arrivals = random_() % 3;
    for (size_t i = 0; i < arrivals; ++i) Arrive(random_() % kTenants);
    const auto next = queue_.Pop();
    size_t waiting = 0;
    for (const auto& fifo : expected_) waiting += fifo.size();
    ASSERT_EQ(next.has_value(), waiting > 0);
    if (!next) return;
    const size_t tenant = next->tenant.value;
    ASSERT_EQ(next->item, expected_[tenant].front());
    expected_[tenant].pop_front();
    ASSERT_EQ(queue_.count(), waiting - 1);
    const Duration took = microseconds(random_() % kLongestUs);
    queue_.Charge(next->tenant, took);
    service_[tenant] += took;
    CheckShares(tenant);
  }

 private:
  static constexpr size_t kTenants = 5;
  static constexpr uint64_t kLongestUs = 3000;

  void Arrive(size_t tenant) {
    if (expected_[tenant].empty()) {  // begins to wait: measured against the others from now on
      for (size_t other = 0; other < kTenants; ++other) {
        const auto [a, b] = std::minmax(tenant, other);
        since_[a][b] = {service_[a], service_[b]};
      }
    }
    expected_[tenant].push_back(next_);
    queue_.Push(TenantId(static_cast<uint32_t>(tenant)), next_++);
  }

  void CheckShares(size_t served) {
    for (size_t other = 0; other < kTenants; ++other) {
      if (other == served || expected_[other].empty() || expected_[served].empty()) continue;
      const auto [a, b] = std::minmax(served, other);
      const auto [since_a, since_b] = since_[a][b];
      const double longest = 1e3 * kLongestUs;
      const double per_a = static_cast<double>((service_[a] - since_a).count()) / weights_[a];
      const double per_b = static_cast<double>((service_[b] - since_b).count()) / weights_[b];
      // Each may begin with a debt of one item, and be ahead by one.
      ASSERT_LE(std::abs(per_a - per_b), 2 * longest / weights_[a] + 2 * longest / weights_[b] + 1);
    }
  }

  std::mt19937_64 random_;
  FairQueue<int> queue_;
  std::vector<uint32_t> weights_;
  std::deque<int> expected_[kTenants];
  Duration service_[kTenants]{};
  std::pair<Duration, Duration> since_[kTenants][kTenants]{};  // service of both, [lower][higher]
  int next_ = 0;
};

TEST(FairQueue, RandomLoadsAreServedFairly) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  for (uint64_t run = 0; run < 30; ++run) {
    RandomRun random(seed + run);
    for (int step = 0; step < 3000; ++step) {
      random.Step();
      if (HasFatalFailure()) return;
    }
  }
}

}  // namespace
}  // namespace icecache
