// For tests: a context of one slice whose rows are a function of their position (test_rows.h),
// clustered and ready to be asked; and chains of such segments.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <span>
#include <vector>

#include "cacheserver/context/context.h"
#include "cacheserver/context/test_rows.h"

namespace icecache {

class OneSliceTest : public testing::Test {
 protected:
  static constexpr uint32_t kSinks = 4, kWindow = 16, kTokens = 300, kGroup = 2, kDim = 32, kEach = 400;
  static constexpr LayerId kLayer{0};
  static constexpr KvHeadId kHead{0};

  std::unique_ptr<Context> Make(uint64_t id, PolicyKind policy) {
    ContextSpec spec;
    spec.id = ContextId(id);
    spec.segment = SegmentId(id);
    spec.tenant = TenantId(1);
    spec.shape = {.layers = 1, .kv_heads = 1, .query_heads = kGroup, .head_dim = kDim};
    spec.sink_tokens = kSinks;
    spec.window_tokens = kWindow;
    spec.policy = policy;
    return Context::Create(spec, pool_, *attention_).value();
  }
  // With kTokens tokens; sets queries_.
  std::unique_ptr<Context> Built(PolicyKind policy) {
    auto context = Make(1, policy);
    KV_CHECK(
        context->PutRows(kLayer, kHead, 0, kTokens, rows_.K(0, kTokens), rows_.V(0, kTokens)).ok());
    auto job = context->PrepareBuild(kLayer, kHead, kTokens, {}).value();
    job->Run();
    KV_CHECK(context->Install(kLayer, kHead, std::move(job)).ok());
    queries_ = rows_.Queries(3, kGroup, kTokens);
    return context;
  }
  wire::HeadSelection Ask(const Context& context, uint32_t pages, bool residual,
                          std::span<const wire::ResidentPage> resident = {},
                          const AnswerOptions& options = {}) {
    SelectRequest request;
    request.queries = queries_.data();
    request.group = kGroup;
    request.max_pages = pages;
    request.read_cap = limits::kReadCapMax;
    request.residual = residual;
    wire::HeadSelection selection;
    Misses misses;
    const Status status =
        context.Select(kLayer, kHead, request, resident, &selection, &misses, options);
    EXPECT_TRUE(status.ok()) << status.ToString();
    EXPECT_TRUE(misses.empty());
    return selection;
  }

  // Of `segments` segments of kEach tokens, each a fork of the one before, all sealed; sets queries_.
  std::unique_ptr<Context> Chain(uint32_t segments, PolicyKind policy = PolicyKind::kClusterTree,
                                 uint32_t each = kEach) {
    auto context = Make(1, policy);
    for (uint32_t i = 0; i < segments; ++i) {
      if (i > 0) {
        ContextSpec spec = context->spec();
        spec.id = ContextId(1 + i);
        spec.segment = SegmentId(1 + i);
        context = Context::Fork(*context, spec).value();
      }
      const uint32_t first = *context->NextPosition(kLayer, kHead);
      KV_CHECK(
          context->PutRows(kLayer, kHead, first, each, rows_.K(first, each), rows_.V(first, each))
              .ok());
      auto job = context->PrepareBuild(kLayer, kHead, each, {}).value();
      job->Run();
      KV_CHECK(context->Install(kLayer, kHead, std::move(job)).ok());
      KV_CHECK(context->Seal().ok());
    }
    queries_ = rows_.Queries(3, kGroup, segments * each / 2);
    return context;
  }
  wire::HeadSelection AskWithin(const Context& context, uint32_t pages, uint32_t read_cap) {
    SelectRequest request;
    request.queries = queries_.data();
    request.group = kGroup;
    request.max_pages = pages;
    request.read_cap = read_cap;
    wire::HeadSelection selection;
    Misses misses;
    EXPECT_TRUE(context.Select(kLayer, kHead, request, {}, &selection, &misses).ok());
    return selection;
  }

  PagePool pool_{64 * limits::kExtentBytes};
  std::unique_ptr<AttentionBackend> attention_ = MakeReferenceAttention();
  TestRows rows_{77, DType::kF16, kDim};
  std::vector<float> queries_;
};

}  // namespace icecache
