#include "cacheserver/context/lease_table.h"

#include <chrono>
#include <map>
#include <random>
#include <set>

#include <gtest/gtest.h>

namespace icecache {
namespace {

using std::chrono::milliseconds;

constexpr TenantId kTenant{0};
constexpr ConnectionId kAnna{1}, kBen{2};
constexpr ContextId kDoc{7}, kOther{8};

class LeaseTableTest : public ::testing::Test {
 protected:
  ManualClock clock_;
  LeaseTable table_{clock_, milliseconds(500), Epoch(100)};
  Lease Grant(ContextId context, ConnectionId connection, bool writable = false) {
    Result<Lease> lease = table_.Grant(context, kTenant, connection, writable);
    EXPECT_TRUE(lease.ok());
    return *lease;
  }
};

TEST_F(LeaseTableTest, EpochsGrowAndTicketsDiffer) {
  std::set<std::vector<std::byte>> tickets;
  Epoch last{99};
  for (int i = 0; i < 200; ++i) {
    Lease lease = Grant(kDoc, kAnna);
    EXPECT_GT(lease.epoch, last);
    last = lease.epoch;
    ASSERT_EQ(lease.ticket.size(), kTicketBytes);
    tickets.insert(lease.ticket);
  }
  EXPECT_EQ(tickets.size(), 200u);
}

TEST_F(LeaseTableTest, DiesAtItsTimeEvenBeforeTheSweep) {
  Lease lease = Grant(kDoc, kAnna);
  clock_.Advance(milliseconds(499));
  EXPECT_TRUE(table_.Alive(lease.epoch));
  clock_.Advance(milliseconds(1));
  EXPECT_FALSE(table_.Alive(lease.epoch));
  EXPECT_FALSE(table_.Find(kAnna, kDoc).has_value());
  EXPECT_EQ(table_.count(), 1u);
  ASSERT_EQ(table_.EndExpired().size(), 1u);
  EXPECT_EQ(table_.count(), 0u);
}

TEST_F(LeaseTableTest, RenewExtendsTheLeasesOfThatConnectionOnly) {
  Lease anna = Grant(kDoc, kAnna), ben = Grant(kDoc, kBen);
  clock_.Advance(milliseconds(400));
  EXPECT_EQ(table_.Renew(kAnna), 1u);
  clock_.Advance(milliseconds(400));
  EXPECT_TRUE(table_.Alive(anna.epoch));
  EXPECT_FALSE(table_.Alive(ben.epoch));
}

TEST_F(LeaseTableTest, RenewDoesNotRaiseTheDead) {
  Lease lease = Grant(kDoc, kAnna);
  clock_.Advance(milliseconds(500));
  EXPECT_EQ(table_.Renew(kAnna), 0u);
  EXPECT_FALSE(table_.Alive(lease.epoch));
}

TEST_F(LeaseTableTest, EndConnectionEndsAllItsLeasesInOrder) {
  Lease a = Grant(kDoc, kAnna), b = Grant(kOther, kAnna), c = Grant(kDoc, kBen);
  std::vector<Lease> ended = table_.EndConnection(kAnna);
  ASSERT_EQ(ended.size(), 2u);
  EXPECT_EQ(ended[0].epoch, a.epoch);
  EXPECT_EQ(ended[1].epoch, b.epoch);
  EXPECT_TRUE(table_.Alive(c.epoch));
  EXPECT_TRUE(table_.EndConnection(kAnna).empty());
}

TEST_F(LeaseTableTest, EndContextFencesEveryHolder) {
  Grant(kDoc, kAnna);
  Grant(kDoc, kBen);
  Lease other = Grant(kOther, kBen);
  EXPECT_EQ(table_.CountOf(kDoc), 2u);
  EXPECT_EQ(table_.EndContext(kDoc).size(), 2u);
  EXPECT_EQ(table_.CountOf(kDoc), 0u);
  EXPECT_TRUE(table_.Alive(other.epoch));
}

TEST_F(LeaseTableTest, FindPrefersTheWritableLease) {
  Grant(kDoc, kAnna, false);
  Lease writer = Grant(kDoc, kAnna, true);
  Grant(kDoc, kAnna, false);
  EXPECT_EQ(table_.Find(kAnna, kDoc)->epoch, writer.epoch);
  EXPECT_FALSE(table_.Find(kBen, kDoc).has_value());
}

TEST_F(LeaseTableTest, EndOfAnUnknownEpochIsAMiss) {
  Lease lease = Grant(kDoc, kAnna);
  EXPECT_FALSE(table_.End(Epoch(5)).has_value());
  EXPECT_TRUE(table_.End(lease.epoch).has_value());
  EXPECT_FALSE(table_.End(lease.epoch).has_value());
}

// Any sequence of operations agrees with a model that keeps expiry times in a map.
TEST_F(LeaseTableTest, AgreesWithAModelUnderRandomOperations) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  struct Entry {
    uint64_t context, connection;
    TimePoint expires;
  };
  std::map<uint64_t, Entry> model;
  for (int step = 0; step < 3000; ++step) {
    const uint64_t context = random() % 5, connection = random() % 4;
    switch (random() % 6) {
      case 0:
      case 1: {
        Lease lease = Grant(ContextId(context), ConnectionId(connection));
        model[lease.epoch.value] = {context, connection, clock_.Now() + milliseconds(500)};
        break;
      }
      case 2:
        clock_.Advance(milliseconds(random() % 200));
        break;
      case 3: {
        uint32_t expected = 0;
        for (auto& [epoch, e] : model) {
          if (e.connection != connection || e.expires <= clock_.Now()) continue;
          e.expires = clock_.Now() + milliseconds(500);
          ++expected;
        }
        ASSERT_EQ(table_.Renew(ConnectionId(connection)), expected);
        break;
      }
      case 4: {
        size_t expected =
            std::erase_if(model, [&](auto& m) { return m.second.expires <= clock_.Now(); });
        ASSERT_EQ(table_.EndExpired().size(), expected);
        break;
      }
      case 5: {
        if (random() % 4 != 0) break;
        size_t expected =
            std::erase_if(model, [&](auto& m) { return m.second.connection == connection; });
        ASSERT_EQ(table_.EndConnection(ConnectionId(connection)).size(), expected);
        break;
      }
    }
    ASSERT_EQ(table_.count(), model.size());
    for (auto& [epoch, e] : model) {
      ASSERT_EQ(table_.Alive(Epoch(epoch)), e.expires > clock_.Now());
    }
  }
}

}  // namespace
}  // namespace icecache
