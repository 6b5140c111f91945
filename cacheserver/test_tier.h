// One shard over a cold store in memory, with what tests of the tier do to it.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cacheserver/context/test_rows.h"
#include "cacheserver/shard.h"
#include "cacheserver/test_client.h"
#include "cacheserver/tier.h"
#include "common/checksum.h"

namespace icecache::tier_test {

inline constexpr ModelShape kShape{
    .layers = 1, .kv_heads = 2, .query_heads = 4, .head_dim = 64, .dtype = DType::kF16};
inline constexpr uint32_t kSinks = 4, kWindow = 16;
inline constexpr LayerId kLayer(0);

// Every wait has a limit.
class TierFixture : public ::testing::Test {
 protected:
  void Open(uint64_t memory_bytes, uint32_t tenants = 1) {
    QuietLog();
    ColdFaults faults;
    faults.before = [this](std::string_view operation) {
      return fault_ ? fault_(operation) : OkStatus();
    };
    cold_ = std::make_unique<ColdPool>(MakeMemoryColdStore(faults), 2, *clock_, metrics_);
    shard_ = std::make_unique<Shard>(
        ShardOptions{.id = ShardId(0), .count = 1, .memory_bytes = memory_bytes}, reactor_, builds_,
        metrics_, cold_.get());
    for (uint32_t t = 0; t < tenants; ++t) shard_->SetQuota(TenantId(t), 0);
  }
  void TearDown() override {
    builds_.Stop();
    if (cold_) cold_->Stop();
    shard_.reset();
  }
  bool Until(const std::function<bool()>& done) {
    return reactor_.RunUntil(done, clock_->Now() + std::chrono::seconds(20));
  }
  TestRows& Rows(ContextId id, uint16_t head) {
    return rows_.try_emplace({id.value, head}, id.value * 31 + head, kShape.dtype, kShape.head_dim)
        .first->second;
  }
  Status Put(ContextId id, uint32_t first, uint32_t count) {
    for (uint16_t head = 0; head < kShape.kv_heads; ++head) {
      TestRows& rows = Rows(id, head);
      KV_RETURN_IF_ERROR(shard_->FindContext(id)->PutRows(
          kLayer, KvHeadId(head), first, count, rows.K(first, count), rows.V(first, count)));
    }
    return OkStatus();
  }
  Status Build(ContextId id, uint32_t tokens) {
    Status status;
    uint32_t missing = kShape.kv_heads;
    for (uint16_t head = 0; head < kShape.kv_heads; ++head) {
      shard_->Build(id, kLayer, KvHeadId(head), tokens, {}, nullptr,
                    [&](const Result<uint32_t>& pages) {
                      if (!pages.ok()) status = pages.status();
                      --missing;
                    });
    }
    EXPECT_TRUE(Until([&] { return missing == 0; }));
    return status;
  }
  ContextId Create(uint32_t tenant = 0, PolicyKind policy = PolicyKind::kClusterTree) {
    ContextSpec spec;
    spec.id = ContextId(next_++);
    spec.segment = SegmentId(next_++);
    spec.tenant = TenantId(tenant);
    spec.shape = kShape;
    spec.sink_tokens = kSinks;
    spec.window_tokens = kWindow;
    spec.policy = policy;
    EXPECT_TRUE(shard_->CreateContext(spec).ok());
    return spec.id;
  }
  ContextId Sealed(uint32_t tokens, PolicyKind policy = PolicyKind::kClusterTree) {
    const ContextId id = Create(0, policy);
    EXPECT_TRUE(Put(id, 0, tokens).ok());
    EXPECT_TRUE(Build(id, tokens).ok());
    EXPECT_TRUE(Seal(id).ok());
    return id;
  }
  Status Seal(ContextId id) {
    KV_ASSIGN_OR_RETURN(const std::optional<uint32_t> end, shard_->CheckSealable(id));
    return shard_->SealContext(id, end).status();
  }
  // tokens: of a context of one segment; 0: all.
  Status Fork(ContextId parent, ContextId child, uint32_t tokens = 0, uint32_t tenant = 0) {
    if (tokens > 0) return ForkAt(parent, child, 0, tokens, tenant);
    return ForkAt(parent, child, static_cast<uint32_t>(shard_->FindContext(parent)->chain().size()),
                  0, tenant);
  }
  // Shares `keep` segments; tokens > 0: and cuts the next one there.
  Status ForkAt(ContextId parent, ContextId child, uint32_t keep, uint32_t tokens,
                uint32_t tenant = 0) {
    ForkSpec fork{.parent = parent,
                  .child = child,
                  .tenant = TenantId(tenant),
                  .segment = SegmentId(next_++),
                  .keep = keep,
                  .cut = {}};
    if (tokens > 0) {
      const uint32_t tail_first =
          std::max(std::min(kSinks, tokens), tokens - std::min(kWindow, tokens));
      fork.cut = {SegmentId(next_++), {tail_first, tokens}};
    }
    std::optional<Status> done;
    shard_->ForkContext(fork, [&](const Status& status) { done = status; });
    EXPECT_TRUE(Until([&] { return done.has_value(); }));
    return done.value_or(Internal("no answer"));
  }
  Status Store(ContextId id) {
    std::optional<Status> stored;
    shard_->tier().Store(shard_->FindContext(id)->chain().back()->id(),
                         [&](const Status& status) { stored = status; });
    EXPECT_TRUE(Until([&] { return stored.has_value(); }));
    return *stored;
  }
  void EvictAll(ContextId id) {
    const Segment& segment = *shard_->FindContext(id)->chain().back();
    for (size_t i = 0; i < segment.slice_count(); ++i) {
      PageTable& table = segment.stored_slice(i).table();
      for (uint32_t p = 0; p < table.page_count(); ++p) {
        if (table.residency(PageId(p)) == Residency::kWarm) table.Evict(PageId(p));
      }
    }
  }
  struct Answer {
    Status status;
    std::string text;
    int rounds = 0;  // of loading
  };
  Answer Select(ContextId id, uint16_t head, uint64_t seed, uint32_t tokens, uint32_t pages = 6) {
    const std::vector<float> queries = Rows(id, head).Queries(seed, kShape.group(), tokens);
    SelectRequest request;
    request.queries = queries.data();
    request.group = kShape.group();
    request.max_pages = pages;
    request.read_cap = 512;
    Answer answer;
    for (;; ++answer.rounds) {
      Misses misses;
      wire::HeadSelection out;
      answer.status =
          shard_->FindContext(id)->Select(kLayer, KvHeadId(head), request, {}, &out, &misses);
      if (!answer.status.ok()) return answer;
      if (misses.empty()) {
        for (const wire::PagePayload& page : out.pages) {
          answer.text +=
              std::to_string(page.page.value) + "#" + std::to_string(page.checksum) + " ";
          EXPECT_EQ(page.checksum, PageChecksum({page.segment.value, page.page.value, page.version},
                                                page.k_rows, page.v_rows, page.positions));
        }
        return answer;
      }
      std::optional<Status> loaded;
      shard_->tier().Load(misses, [&](const Status& status) { loaded = status; });
      EXPECT_TRUE(Until([&] { return loaded.has_value(); }));
      answer.status = *loaded;
      if (!loaded->ok()) return answer;
    }
  }

  std::unique_ptr<Clock> clock_ = MakeSteadyClock();
  MetricsRegistry metrics_;
  Reactor reactor_{*clock_, Duration::zero()};
  BuildPool builds_{1};
  std::function<Status(std::string_view)> fault_;
  std::unique_ptr<ColdPool> cold_;
  std::unique_ptr<Shard> shard_;
  std::map<std::pair<uint64_t, uint16_t>, TestRows> rows_;
  uint64_t next_ = 1;
};

}  // namespace icecache::tier_test
