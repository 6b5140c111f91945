#include "cacheserver/context/context.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>

#include "cacheserver/context/test_rows.h"
#include "common/checksum.h"

namespace icecache {
namespace {

constexpr uint32_t kSinks = 4;
constexpr uint32_t kWindow = 16;
const TenantId kTenant(1);

ModelShape Shape() {
  ModelShape shape;
  shape.layers = 2;
  shape.kv_heads = 2;
  shape.query_heads = 4;
  shape.head_dim = 32;
  return shape;
}

// One shard (or one of several) with the worker's side of the protocol: rows by slice and position.
class ContextTest : public testing::Test {
 protected:
  static constexpr uint32_t kGroup = 2;
  PagePool pool_{64 * limits::kExtentBytes};
  std::unique_ptr<AttentionBackend> attention_ = MakeReferenceAttention();
  std::map<std::pair<uint16_t, uint16_t>, TestRows> sources_;
  uint64_t next_id_ = 1;

  TestRows& Source(LayerId layer, KvHeadId head) {
    const uint64_t seed = 1000 * layer.value + 100 * head.value + 7;
    return sources_.try_emplace({layer.value, head.value}, seed, DType::kF16, Shape().head_dim)
        .first->second;
  }
  ContextSpec Spec(PolicyKind policy = PolicyKind::kExact) {
    ContextSpec spec;
    spec.id = ContextId(next_id_);
    spec.segment = SegmentId(100 + next_id_++);
    spec.tenant = kTenant;
    spec.shape = Shape();
    spec.sink_tokens = kSinks;
    spec.window_tokens = kWindow;
    spec.policy = policy;
    return spec;
  }
  std::unique_ptr<Context> Create(const ContextSpec& spec) {
    auto context = Context::Create(spec, pool_, *attention_);
    EXPECT_TRUE(context.ok()) << context.status().ToString();
    return std::move(*context);
  }
  std::unique_ptr<Context> Fork(const Context& parent) {
    auto context = Context::Fork(parent, Spec(parent.spec().policy));
    EXPECT_TRUE(context.ok()) << context.status().ToString();
    return std::move(*context);
  }
  template <typename Visit>
  static void EachSlice(const Visit& visit) {
    for (uint16_t layer = 0; layer < Shape().layers; ++layer) {
      for (uint16_t head = 0; head < Shape().kv_heads; ++head)
        visit(LayerId(layer), KvHeadId(head));
    }
  }
  void Put(Context& context, uint32_t first, uint32_t count) {
    EachSlice([&](LayerId layer, KvHeadId head) {
      TestRows& source = Source(layer, head);
      const Status status = context.PutRows(layer, head, first, count, source.K(first, count),
                                            source.V(first, count));
      ASSERT_TRUE(status.ok()) << status.ToString();
    });
  }
  static void Build(Context& context, uint32_t tokens) {
    EachSlice([&](LayerId layer, KvHeadId head) {
      auto job = context.PrepareBuild(layer, head, tokens, {});
      ASSERT_TRUE(job.ok()) << job.status().ToString();
      (*job)->Run();
      ASSERT_TRUE(context.Install(layer, head, std::move(*job)).ok());
    });
  }
  // Decodes: positions [next, next + count) leave the window, one a step.
  void Append(Context& context, uint32_t count) {
    EachSlice([&](LayerId layer, KvHeadId head) {
      TestRows& source = Source(layer, head);
      for (uint32_t i = 0; i < count; ++i) {
        const uint32_t next = *context.NextPosition(layer, head);
        const Status status =
            context.Append(layer, head, next, 1, source.K(next, 1), source.V(next, 1));
        ASSERT_TRUE(status.ok()) << status.ToString();
        ASSERT_TRUE(context.IndexPending(layer, head, i % 3 == 0 ? 8 : 0).ok());
      }
    });
  }
  static uint32_t Next(const Context& context) {
    return *context.NextPosition(LayerId(0), KvHeadId(0));
  }
  // The worker's window goes in as the tail.
  void SealWithWindow(Context& context, uint32_t window) {
    Put(context, Next(context), window);
    const Status status = context.Seal();
    ASSERT_TRUE(status.ok()) << status.ToString();
  }

  struct Selected {
    wire::HeadSelection reply;
    std::vector<float> queries;
  };
  Selected Select(const Context& context, LayerId layer, KvHeadId head, uint32_t max_pages,
                  uint64_t seed, std::span<const wire::ResidentPage> resident = {},
                  uint32_t tokens = 200) {
    Selected selected;
    selected.queries = Source(layer, head).Queries(seed, kGroup, tokens);
    SelectRequest request;
    request.queries = selected.queries.data();
    request.group = kGroup;
    request.max_pages = max_pages;
    request.read_cap = limits::kReadCapMax;
    Misses misses;
    const Status status = context.Select(layer, head, request, resident, &selected.reply, &misses);
    EXPECT_TRUE(misses.empty());
    EXPECT_TRUE(status.ok()) << status.ToString();
    EXPECT_LE(selected.reply.pages.size(), max_pages);
    return selected;
  }

  // What a worker computes: sinks, its window [next, tokens), whole pages, residual. Checks the
  // pages' checksums too.
  void ExpectFullAttention(const Context& context, uint32_t tokens, uint32_t max_pages,
                           uint64_t seed) {
    EachSlice([&](LayerId layer, KvHeadId head) {
      const Selected s = Select(context, layer, head, max_pages, seed, {}, tokens);
      TestRows& source = Source(layer, head);
      AttentionStates states(kGroup, Shape().head_dim);
      const Result<RowsView> sinks = context.FetchRows(layer, head, wire::RowsPart::kSinks);
      ASSERT_TRUE(sinks.ok());
      attention_->AttendRows(s.queries.data(), sinks->rows, states.ref());
      for (const wire::PagePayload& page : s.reply.pages) {
        EXPECT_EQ(page.checksum, PageChecksum({page.segment.value, page.page.value, page.version},
                                              page.k_rows, page.v_rows, page.positions));
        attention_->AttendRows(
            s.queries.data(),
            {DType::kF16, Shape().head_dim, page.fill, page.k_rows.data(), page.v_rows.data()},
            states.ref());
      }
      AttentionStates residual(kGroup, Shape().head_dim);
      ASSERT_EQ(s.reply.residual.size(), residual.flat().size());
      std::copy(s.reply.residual.begin(), s.reply.residual.end(), residual.flat().begin());
      MergeStates(residual.ref(), states.ref());
      const uint32_t next = *context.NextPosition(layer, head);
      attention_->AttendRows(s.queries.data(), source.Rows(next, tokens - next), states.ref());
      ExpectAttention(states, source.FullAttention(s.queries, kGroup, tokens));
    });
  }
  static void ExpectValid(const Context& context) {
    const Status valid = context.Validate();
    EXPECT_TRUE(valid.ok()) << valid.ToString();
  }
};

TEST_F(ContextTest, AChainOfForksAnswersLikeOneContext) {
  auto root = Create(Spec());
  Put(*root, 0, 150);
  Build(*root, 150);
  ExpectFullAttention(*root, 150, 4, 1);
  Append(*root, 30);
  ExpectFullAttention(*root, 165, 4, 2);
  SealWithWindow(*root, 10);
  ExpectValid(*root);

  auto child = Fork(*root);
  EXPECT_EQ(Next(*child), Next(*root));
  EXPECT_EQ(child->segment_count(), 2u);
  const Result<RowsView> tail = child->FetchRows(LayerId(1), KvHeadId(0), wire::RowsPart::kTail);
  ASSERT_TRUE(tail.ok());
  EXPECT_EQ(tail->first_position, Next(*child));
  EXPECT_EQ(tail->rows.count, 10u);
  EXPECT_EQ(std::memcmp(tail->rows.v, Source(LayerId(1), KvHeadId(0)).V(Next(*child), 10).data(),
                        10 * Shape().row_bytes()),
            0);
  ExpectFullAttention(*child, Next(*child) + 10, 4, 3);
  Append(*child, 50);
  ExpectFullAttention(*child, Next(*child) + 16, 4, 4);
  ExpectFullAttention(*child, Next(*child) + 16, 0, 5);
  ExpectFullAttention(*child, Next(*child) + 16, 1000, 6);
  SealWithWindow(*child, 16);

  // A second prefill inside a fork: no sinks of its own, the parent's window is indexed anew.
  auto grandchild = Fork(*child);
  const uint32_t first = Next(*grandchild);
  Put(*grandchild, first, 90);
  Build(*grandchild, 90);
  EXPECT_EQ(Next(*grandchild), first + 90 - kWindow);
  ExpectFullAttention(*grandchild, first + 90, 5, 7);
  Append(*grandchild, 20);
  ExpectFullAttention(*grandchild, first + 106, 5, 8);
  ExpectValid(*grandchild);
  const Result<RowsView> sinks =
      grandchild->FetchRows(LayerId(0), KvHeadId(0), wire::RowsPart::kSinks);
  EXPECT_EQ(sinks->rows.count, kSinks);
}

TEST_F(ContextTest, OneBudgetAndOneRankingOverTheChain) {
  auto root = Create(Spec());
  Put(*root, 0, 200);
  Build(*root, 200);
  SealWithWindow(*root, kWindow);
  auto child = Fork(*root);
  Append(*child, 120);
  const uint32_t tokens = Next(*child);

  // The truth: every page of both segments, ranked by exact mass.
  const Selected all = Select(*child, LayerId(0), KvHeadId(1), 1000, 11, {}, tokens);
  ASSERT_GT(all.reply.pages.size(), 12u);
  EXPECT_NEAR(all.reply.covered_mass, 1, 1e-3) << "pending rows are not part of the index";
  for (size_t i = 1; i < all.reply.pages.size(); ++i) {
    EXPECT_GE(all.reply.pages[i - 1].log_mass, all.reply.pages[i].log_mass);
  }
  const Selected few = Select(*child, LayerId(0), KvHeadId(1), 6, 11, {}, tokens);
  ASSERT_EQ(few.reply.pages.size(), 6u);
  size_t same = 0;
  for (const auto& page : few.reply.pages) {
    for (size_t i = 0; i < 6; ++i) {
      same += page.segment == all.reply.pages[i].segment && page.page == all.reply.pages[i].page;
    }
  }
  // The best by mass over all segments; within one segment the policy ranks by the sum over the
  // group, so the last may differ.
  EXPECT_GE(same, 5u);

  // The estimate of the covered share against its definition.
  double covered = 0;
  for (uint32_t h = 0; h < kGroup; ++h) {
    double kept = 0, total = 0;
    for (const auto& page : all.reply.pages) {
      AttentionStates state(kGroup, Shape().head_dim);
      attention_->AttendRows(
          few.queries.data(),
          {DType::kF16, Shape().head_dim, page.fill, page.k_rows.data(), page.v_rows.data()},
          state.ref());
      const double mass = std::exp(double{LogSumExp(state.ref(), h)});
      total += mass;
      for (const auto& p : few.reply.pages) {
        if (p.segment == page.segment && p.page == page.page) kept += mass;
      }
    }
    covered += kept / total / kGroup;
  }
  EXPECT_NEAR(few.reply.covered_mass, covered, 0.05);
}

TEST_F(ContextTest, OnlyWhatTheWorkerLacksHasContent) {
  auto context = Create(Spec());
  Put(*context, 0, 100);
  Build(*context, 100);  // 80 indexed: 5 full pages
  Append(*context, 5);
  EachSlice([&](LayerId l, KvHeadId h) { ASSERT_TRUE(context->IndexPending(l, h, 64).ok()); });
  const LayerId layer(1);
  const KvHeadId head(1);
  const Selected first = Select(*context, layer, head, 1000, 3);
  std::vector<wire::ResidentPage> resident;
  for (const auto& p : first.reply.pages)
    resident.push_back({p.segment, p.page, p.version, p.fill});

  const Selected again = Select(*context, layer, head, 1000, 3, resident);
  ASSERT_EQ(again.reply.pages.size(), first.reply.pages.size());
  for (const auto& page : again.reply.pages) {
    EXPECT_EQ(page.from, page.fill);
    EXPECT_TRUE(page.k_rows.empty() && page.v_rows.empty() && page.positions.empty());
  }

  Append(*context, 3);
  EachSlice([&](LayerId l, KvHeadId h) { ASSERT_TRUE(context->IndexPending(l, h, 64).ok()); });
  const auto full =
      std::find_if(resident.begin(), resident.end(), [](const auto& r) { return r.fill == 16; });
  ASSERT_NE(full, resident.end());
  full->version += 1000;  // a name that does not stand
  const Selected grown = Select(*context, layer, head, 1000, 3, resident);
  size_t tails = 0;
  for (const auto& page : grown.reply.pages) {
    if (page.page == full->page) {
      EXPECT_EQ(page.from, 0);
      EXPECT_EQ(page.k_rows.size(), page.fill * Shape().row_bytes());
    } else if (page.from < page.fill) {
      ++tails;
      EXPECT_GT(page.from, 0);
      const size_t rows = page.fill - page.from;
      ASSERT_EQ(page.k_rows.size(), rows * Shape().row_bytes());
      ASSERT_EQ(page.positions.size(), rows * sizeof(uint32_t));
      uint32_t position = 0;
      std::memcpy(&position, page.positions.data(), sizeof position);
      EXPECT_EQ(std::memcmp(page.v_rows.data(), Source(layer, head).V(position, 1).data(),
                            Shape().row_bytes()),
                0);
    }
  }
  EXPECT_EQ(tails, 1u);
}

TEST_F(ContextTest, FetchPagesGivesWholePagesAndLeavesOutOldNames) {
  auto context = Create(Spec());
  Put(*context, 0, 120);
  Build(*context, 120);
  const Selected s = Select(*context, LayerId(0), KvHeadId(0), 2, 5);
  ASSERT_EQ(s.reply.pages.size(), 2u);
  const auto& page = s.reply.pages[0];
  const std::vector<wire::ResidentPage> names = {
      {page.segment, page.page, page.version, page.fill},
      {page.segment, page.page, page.version + 1, page.fill},
      {page.segment, PageId(1000), page.version, page.fill},
      {SegmentId(5), page.page, page.version, page.fill}};
  wire::HeadSelection out;
  Misses misses;
  ASSERT_TRUE(context->FetchPages(LayerId(0), KvHeadId(0), names, &out, &misses).ok());
  ASSERT_EQ(out.pages.size(), 1u);
  EXPECT_EQ(out.pages[0].k_rows.data(), page.k_rows.data());
  EXPECT_EQ(out.pages[0].checksum, page.checksum);
  EXPECT_EQ(out.pages[0].from, 0);
}

TEST_F(ContextTest, ForksShareTheirParentAndOutliveIt) {
  auto root = Create(Spec());
  Put(*root, 0, 2000);
  Build(*root, 2000);
  SealWithWindow(*root, kWindow);
  const uint64_t before = pool_.usage(kTenant).frame_bytes + pool_.usage(kTenant).row_bytes;
  std::vector<std::unique_ptr<Context>> forks;
  for (int i = 0; i < 16; ++i) forks.push_back(Fork(*root));
  EXPECT_EQ(pool_.usage(kTenant).frame_bytes + pool_.usage(kTenant).row_bytes, before);
  EXPECT_EQ(forks[0]->usage().kv_bytes, root->usage().kv_bytes);
  EXPECT_EQ(forks[0]->usage().private_kv_bytes, 0u);
  Append(*forks[3], 20);
  ExpectFullAttention(*forks[3], Next(*forks[3]) + 8, 4, 2);
  root.reset();
  ExpectFullAttention(*forks[3], Next(*forks[3]) + 8, 4, 3);
  ExpectFullAttention(*forks[9], Next(*forks[9]) + 8, 4, 4);
  forks.clear();
  EXPECT_EQ(pool_.usage(kTenant).held_bytes(), 0u);
}

TEST_F(ContextTest, AReplyKeepsItsFramesWhenTheContextGoes) {
  auto context = Create(Spec());
  Put(*context, 0, 200);
  Build(*context, 200);
  const Selected s = Select(*context, LayerId(0), KvHeadId(0), 3, 5);
  auto pin = pool_.Pin();
  context.reset();
  auto other = Create(Spec());
  Put(*other, 0, 400);
  Build(*other, 400);
  for (const auto& page : s.reply.pages) {
    EXPECT_EQ(page.checksum, PageChecksum({page.segment.value, page.page.value, page.version},
                                          page.k_rows, page.v_rows, page.positions));
  }
  pin.reset();
  other.reset();
  EXPECT_EQ(pool_.usage(kTenant).held_bytes(), 0u);
}

TEST_F(ContextTest, SealRefusesSlicesThatEndApartAndSaysWhich) {
  auto context = Create(Spec());
  Put(*context, 0, 60);
  Build(*context, 60);
  TestRows& source = Source(LayerId(1), KvHeadId(0));
  const uint32_t next = Next(*context);
  ASSERT_TRUE(
      context->Append(LayerId(1), KvHeadId(0), next, 1, source.K(next, 1), source.V(next, 1)).ok());
  const Status status = context->Seal();
  EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition);
  EXPECT_NE(status.message().find("layer 1 kv head 0"), std::string::npos) << status.ToString();
  EXPECT_FALSE(context->sealed());
  EXPECT_EQ(Context::Fork(*context, Spec()).status().code(), StatusCode::kFailedPrecondition);

  EachSlice([&](LayerId layer, KvHeadId head) {
    if (layer == LayerId(1) && head == KvHeadId(0)) return;
    TestRows& rows = Source(layer, head);
    ASSERT_TRUE(context->Append(layer, head, next, 1, rows.K(next, 1), rows.V(next, 1)).ok());
  });
  ASSERT_TRUE(context->Seal().ok());
  EXPECT_EQ(context->sealed_ends(), (SegmentEnds{next + 1, 60}));
  EXPECT_TRUE(context->Seal().ok());
  EXPECT_EQ(context->Append(LayerId(0), KvHeadId(0), next + 1, 0, {}, {}).code(),
            StatusCode::kFailedPrecondition);
}

TEST_F(ContextTest, RefusesSlicesOfOtherShardsAndBodiesOfTheWrongLength) {
  ContextSpec spec = Spec();
  spec.shard = ShardId(1);
  spec.shard_count = 3;
  auto context = Create(spec);
  TestRows& source = Source(LayerId(0), KvHeadId(1));
  EXPECT_TRUE(context->PutRows(LayerId(0), KvHeadId(1), 0, 5, source.K(0, 5), source.V(0, 5)).ok());
  const Status elsewhere =
      context->PutRows(LayerId(0), KvHeadId(0), 0, 5, source.K(0, 5), source.V(0, 5));
  EXPECT_EQ(elsewhere.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(elsewhere.message().find("shard 0"), std::string::npos) << elsewhere.ToString();
  EXPECT_EQ(context->PutRows(LayerId(7), KvHeadId(0), 0, 5, source.K(0, 5), source.V(0, 5)).code(),
            StatusCode::kInvalidArgument);
  EXPECT_EQ(context->PutRows(LayerId(0), KvHeadId(1), 5, 5, source.K(0, 4), source.V(0, 5)).code(),
            StatusCode::kInvalidArgument);
}

TEST_F(ContextTest, TheSlicesOfAllShardsTogetherAreTheShape) {
  for (const uint32_t shards : {1u, 2u, 3u, 4u, 7u}) {
    size_t slices = 0;
    for (uint32_t shard = 0; shard < shards; ++shard) {
      ContextSpec spec = Spec();
      spec.shard = ShardId(static_cast<uint16_t>(shard));
      spec.shard_count = shards;
      const auto context = Create(spec);
      context->VisitPrivateSlices([&](LayerId layer, KvHeadId head, const HeadSlice& slice) {
        EXPECT_EQ(ShardOf(layer, head, spec.shape, shards), spec.shard);
        EXPECT_EQ(slice.next_append(), 0u);
        ++slices;
      });
      ASSERT_TRUE(context->Seal().ok());
      EXPECT_EQ(context->sealed_ends().has_value(), shard < Shape().layers * Shape().kv_heads);
    }
    EXPECT_EQ(slices, size_t{Shape().layers} * Shape().kv_heads);
  }
}

TEST_F(ContextTest, AChainHasAMaximum) {
  auto context = Create(Spec());
  Put(*context, 0, 10);
  for (uint32_t n = 1; n < limits::kSegmentsPerContextMax; ++n) {
    ASSERT_TRUE(context->Seal().ok());
    context = Fork(*context);
    Put(*context, Next(*context), 10);
  }
  ASSERT_TRUE(context->Seal().ok());
  EXPECT_EQ(Context::Fork(*context, Spec()).status().code(), StatusCode::kResourceExhausted);
}

TEST_F(ContextTest, AnEmptyContextAnswersWithNothing) {
  auto context = Create(Spec());
  const Selected s = Select(*context, LayerId(0), KvHeadId(0), 8, 1);
  EXPECT_TRUE(s.reply.pages.empty());
  EXPECT_EQ(s.reply.covered_mass, 1);
  AttentionStates residual(kGroup, Shape().head_dim);
  std::copy(s.reply.residual.begin(), s.reply.residual.end(), residual.flat().begin());
  EXPECT_EQ(LogSumExp(residual.ref(), 0), kEmptyMax);
}

// Random trees of contexts, built, forked and dropped in any order: answers are full attention,
// memory ends at zero.
TEST_F(ContextTest, RandomTreesOfForksStayRight) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 rng(seed);
  std::vector<std::unique_ptr<Context>> contexts;
  for (int step = 0; step < 60 && !HasFailure(); ++step) {
    const uint64_t action = rng() % 6;
    if (contexts.empty() || (action == 0 && contexts.size() < 6)) {
      contexts.push_back(
          Create(Spec(rng() % 2 == 0 ? PolicyKind::kExact : PolicyKind::kSequential)));
      const auto tokens = static_cast<uint32_t>(rng() % 120);
      Put(*contexts.back(), 0, tokens);
      Build(*contexts.back(), tokens);
      continue;
    }
    auto& context = contexts[rng() % contexts.size()];
    if (action == 1 && contexts.size() > 3) {
      std::swap(context, contexts.back());
      contexts.pop_back();
    } else if (action <= 3 && !context->sealed()) {
      Append(*context, static_cast<uint32_t>(rng() % 25));
    } else if (action == 4 && !context->sealed()) {
      SealWithWindow(*context, static_cast<uint32_t>(rng() % kWindow));
    } else if (context->sealed() && contexts.size() < 8) {
      contexts.push_back(Fork(*context));
      Append(*contexts.back(), static_cast<uint32_t>(rng() % 40));
    }
    const Context& check = *contexts[rng() % contexts.size()];
    ExpectValid(check);
    ExpectFullAttention(check, Next(check) + 5,
                        check.spec().policy == PolicyKind::kExact ? 3 : 1000, rng());
  }
  contexts.clear();
  EXPECT_EQ(pool_.usage(kTenant).held_bytes(), 0u);
  EXPECT_TRUE(pool_.Validate().ok());
}

}  // namespace
}  // namespace icecache
