#include "tests/conformance/selection_policy_suite.h"

#include <thread>

namespace icecache {
namespace {

class SelectionPolicySuite : public testing::TestWithParam<PolicyCase> {
 protected:
  PolicyKind kind() const { return GetParam().kind; }

  // Builds `count` clustered tokens.
  void Build(SliceModel* slice, RowSource* source, uint32_t count) {
    k_.clear();
    v_.clear();
    source->Append(count, slice->options().dtype, &k_, &v_);
    const Status status = slice->Build(slice->Rows(k_, v_));
    ASSERT_TRUE(status.ok()) << status.ToString();
    ASSERT_EQ(slice->store().token_count(), count);
  }
  Status InsertOne(SliceModel* slice, RowSource* source) {
    k_.clear();
    v_.clear();
    source->Append(1, slice->options().dtype, &k_, &v_);
    return slice->Insert(slice->Rows(k_, v_));
  }

  std::vector<std::byte> k_, v_;
};

// Relative error of finished outputs: pages + residual against full attention.
double MergedError(const SliceModel& slice, const std::vector<float>& queries, Selection* got) {
  const uint32_t dim = slice.options().head_dim;
  const auto group = static_cast<uint32_t>(queries.size() / dim);
  auto reference = MakeReferenceAttention();
  AttentionStates full(group, dim);
  std::vector<PageId> all, chosen;
  for (uint32_t p = 0; p < slice.store().page_count(); ++p) all.emplace_back(p);
  for (const SelectedPage& page : got->pages) chosen.push_back(page.page);
  reference->AttendPages(queries.data(), slice.store().kv(), all, full.ref());
  reference->AttendPages(queries.data(), slice.store().kv(), chosen, got->residual.ref());
  std::vector<float> x(queries.size()), y(queries.size());
  FinishStates(full.ref(), x.data());
  FinishStates(got->residual.ref(), y.data());
  double difference = 0, norm = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    difference += (x[i] - y[i]) * (x[i] - y[i]);
    norm += x[i] * x[i];
  }
  return std::sqrt(difference / norm);
}

TEST_P(SelectionPolicySuite, EveryShapeBuildsSelectsAndGrows) {
  uint64_t seed = 1;
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const uint32_t dim : {64u, 80u, 96u, 128u, 256u}) {
      for (const uint32_t group : {1u, 2u, 4u, 6u, 8u}) {
        SCOPED_TRACE(testing::Message() << "seed " << seed << " " << DTypeName(dtype) << " dim "
                                        << dim << " group " << group);
        RowSource source(seed, dim, 12);
        SliceModel slice(kind(), dtype, dim, seed++);
        Build(&slice, &source, 300);
        for (int i = 0; i < 20; ++i) ASSERT_TRUE(InsertOne(&slice, &source).ok());
        const Status status = slice.Check();
        ASSERT_TRUE(status.ok()) << status.ToString();
        const SelectRequest request{.max_pages = 6, .read_cap = 64};
        const Selection got = slice.Select(source.Queries(group, 4.0f), request);
        CheckSelection(slice, request, got, group, GetParam());
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(SelectionPolicySuite, NeverOverBudgetWhateverIsAsked) {
  RowSource source(5, 64, 20);
  SliceModel slice(kind(), DType::kF16, 64);
  Build(&slice, &source, 700);
  for (const uint32_t max_pages : {0u, 1u, 4u, 12u, 1000u}) {
    for (const uint32_t read_cap : {0u, 15u, 100u, 1024u, 1u << 16}) {
      for (const float min_mass : {0.0f, 0.3f, 0.999f}) {
        for (const GroupRank rank :
             {GroupRank::kMassSum, GroupRank::kMassMax, GroupRank::kMaxToken}) {
          for (const bool residual : {true, false}) {
            SCOPED_TRACE(testing::Message() << max_pages << " pages, cap " << read_cap << ", mass "
                                            << min_mass << ", rank " << int(rank));
            const SelectRequest request{.max_pages = max_pages,
                                        .read_cap = read_cap,
                                        .min_mass = min_mass,
                                        .rank = rank,
                                        .residual = residual};
            const Selection got = slice.Select(source.Queries(4, 4.0f), request);
            CheckSelection(slice, request, got, 4, GetParam());
            if (HasFatalFailure()) return;
            if (residual && GetParam().answers != Answers::kPages) continue;
            for (uint32_t h = 0; h < 4; ++h) EXPECT_EQ(got.residual.flat()[4 + h], 0.0f);
          }
        }
      }
    }
  }
}

TEST_P(SelectionPolicySuite, ModelStaysValidUnderRandomOperations) {
  for (uint64_t seed = 1; seed <= 12; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    RowSource source(seed, 64, 1 + seed * 3);
    SliceModel slice(kind(), seed % 2 == 0 ? DType::kF16 : DType::kF32, 64, seed);
    Build(&slice, &source, static_cast<uint32_t>(source.rng()() % 500));
    for (int op = 0; op < 40; ++op) {
      const uint64_t dice = source.rng()() % 10;
      Status status;
      if (dice == 0) {
        status = slice.RetainRandom(source.rng(), 0.3);
      } else if (dice < 8) {
        for (uint64_t n = source.rng()() % 12; n > 0 && status.ok(); --n)
          status = InsertOne(&slice, &source);
      } else {
        const SelectRequest request{.max_pages = 5, .read_cap = 32};
        CheckSelection(slice, request, slice.Select(source.Queries(2, 4.0f), request), 2,
                       GetParam());
      }
      ASSERT_TRUE(status.ok()) << "operation " << op << ": " << status.ToString();
      status = slice.Check();
      ASSERT_TRUE(status.ok()) << "operation " << op << ": " << status.ToString();
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(SelectionPolicySuite, RetainingNothingThenGrowingAgainWorks) {
  RowSource source(3, 64, 4);
  SliceModel slice(kind(), DType::kF16, 64);
  Build(&slice, &source, 100);
  const std::vector<uint16_t> none(slice.store().page_count(), 0);
  ASSERT_TRUE(slice.policy().Retain(none, slice.store().kv()).ok());
  ASSERT_TRUE(slice.store().ApplyRetain(none).ok());
  ASSERT_TRUE(slice.Check().ok());
  EXPECT_TRUE(slice.Select(source.Queries(1, 1.0f), {.max_pages = 3}).pages.empty());
  for (int i = 0; i < 50; ++i) ASSERT_TRUE(InsertOne(&slice, &source).ok());
  const Status status = slice.Check();
  EXPECT_TRUE(status.ok()) << status.ToString();
  EXPECT_EQ(slice.store().token_count(), 50u);
}

TEST_P(SelectionPolicySuite, ASealedSliceAnswersTheSameForEverAndOnEveryThread) {
  RowSource source(9, 128, 16);
  SliceModel slice(kind(), DType::kBF16, 128);
  Build(&slice, &source, 600);
  const std::vector<float> queries = source.Queries(4, 4.0f), other = source.Queries(4, 2.0f);
  const SelectRequest request{.max_pages = 8, .read_cap = 128};
  const Selection first = slice.Select(queries, request);
  (void)slice.Select(other, {.max_pages = 30});  // must leave no trace
  ExpectSameSelection(first, slice.Select(queries, request));
  std::vector<Selection> got(4);
  std::vector<std::thread> threads;
  for (Selection& one : got) threads.emplace_back([&] { one = slice.Select(queries, request); });
  for (std::thread& thread : threads) thread.join();
  for (const Selection& one : got) ExpectSameSelection(first, one);
}

TEST_P(SelectionPolicySuite, EqualInputAndSeedGiveEqualStructures) {
  std::string images[2];
  for (std::string& image : images) {
    RowSource source(21, 96, 10);
    SliceModel slice(kind(), DType::kF16, 96, 77);
    Build(&slice, &source, 500);
    for (int i = 0; i < 100; ++i) ASSERT_TRUE(InsertOne(&slice, &source).ok());
    image = slice.Image();
  }
  EXPECT_EQ(images[0], images[1]);
}

// As the build threads of a server do it: slices at the same time, on any number of threads.
TEST_P(SelectionPolicySuite, BuildsAtTheSameTimeAreThoseOfOneThread) {
  const auto build = [&](uint32_t i) {
    RowSource source(31 + i, 64, 10);
    SliceModel slice(kind(), DType::kF16, 64, 5 + i);
    std::vector<std::byte> k, v;
    source.Append(700 + 40 * i, DType::kF16, &k, &v);
    const Status status = slice.Build(slice.Rows(k, v));
    EXPECT_TRUE(status.ok()) << status.ToString();
    return slice.Image();
  };
  constexpr uint32_t kSlices = 4;
  std::string alone[kSlices], together[kSlices];
  for (uint32_t i = 0; i < kSlices; ++i) alone[i] = build(i);
  std::vector<std::thread> threads;
  for (uint32_t i = 0; i < kSlices; ++i) threads.emplace_back([&, i] { together[i] = build(i); });
  for (std::thread& thread : threads) thread.join();
  for (uint32_t i = 0; i < kSlices; ++i) {
    EXPECT_TRUE(alone[i] == together[i]) << "slice " << i;
  }
}

TEST_P(SelectionPolicySuite, SaveAndRestoreAreExact) {
  for (const uint32_t count : {0u, 1u, 15u, 17u, 900u}) {
    SCOPED_TRACE(count);
    RowSource source(count + 1, 64, 10);
    SliceModel slice(kind(), DType::kF16, 64, 3);
    Build(&slice, &source, count);
    for (int i = 0; i < 30; ++i) ASSERT_TRUE(InsertOne(&slice, &source).ok());
    const std::string image = slice.Image();
    auto copy = MakePolicy(kind(), slice.options());
    const Status status = copy->Restore(image);
    ASSERT_TRUE(status.ok()) << status.ToString();
    std::string again;
    copy->Save(&again);
    EXPECT_EQ(image, again);
    ASSERT_TRUE(copy->Validate(slice.store().kv()).ok());
    const std::vector<float> queries = source.Queries(2, 4.0f);
    const SelectRequest request{
        .queries = queries.data(), .group = 2, .max_pages = 6, .read_cap = 64};
    Selection answer;
    copy->Select(request, slice.store().kv(), &answer);
    ExpectSameSelection(slice.Select(queries, request), answer);
    // A restored structure also grows in the same way.
    k_.clear();
    v_.clear();
    source.Append(1, DType::kF16, &k_, &v_);
    const InsertPlan a = slice.policy().Insert(slice.Rows(k_, v_), slice.store().kv()).value();
    const InsertPlan b = copy->Insert(slice.Rows(k_, v_), slice.store().kv()).value();
    EXPECT_EQ(a.page, b.page);
    EXPECT_EQ(a.move, b.move);
  }
}

TEST_P(SelectionPolicySuite, DamagedImagesAreRefused) {
  RowSource source(4, 64, 6);
  SliceModel slice(kind(), DType::kF16, 64);
  Build(&slice, &source, 200);
  const std::string image = slice.Image();
  std::mt19937_64 rng(8);
  for (int trial = 0; trial < 200; ++trial) {
    std::string bad = image;
    const size_t at = rng() % image.size();
    if (trial % 2 == 0) bad.resize(at);
    else bad[at] ^= static_cast<char>(1 + rng() % 255);
    auto policy = MakePolicy(kind(), slice.options());
    const Status status = policy->Restore(bad);
    // Bytes 4 and 5 are the version, and it may be a newer one.
    if ((at & ~1u) == 4 && status.code() == StatusCode::kFailedPrecondition) continue;
    ASSERT_EQ(status.code(), StatusCode::kDataLoss) << status.ToString();
  }
  auto other_shape = MakePolicy(kind(), {DType::kF32, 64, 1});
  EXPECT_EQ(other_shape->Restore(image).code(), StatusCode::kDataLoss);
  EXPECT_EQ(MakePolicy(kind(), slice.options())->Restore(image + "x").code(),
            StatusCode::kDataLoss);
}

TEST_P(SelectionPolicySuite, TinySlicesWork) {
  for (const uint32_t count : {0u, 1u, 2u, 15u, 16u, 17u, 33u}) {
    SCOPED_TRACE(count);
    RowSource source(count + 50, 64, 3);
    SliceModel slice(kind(), DType::kF16, 64);
    Build(&slice, &source, count);
    const SelectRequest request{.max_pages = 12, .read_cap = 1024};
    Selection got = slice.Select(source.Queries(4, 4.0f), request);
    CheckSelection(slice, request, got, 4, GetParam());
    if (count == 0) {
      EXPECT_TRUE(got.pages.empty());
    } else if (count <= 16) {
      EXPECT_GE(got.covered_mass, GetParam().own_mass - 1e-3f);
    }
  }
}

TEST_P(SelectionPolicySuite, IdenticalKeysDoNotBreakIt) {
  for (const float value : {1.0f, 0.0f}) {
    SliceModel slice(kind(), DType::kF16, 64);
    std::vector<float> x(300 * 64, value);
    std::vector<std::byte> k(x.size() * 2);
    FromF32(x.data(), x.size(), DType::kF16, k.data());
    const Status status = slice.Build(slice.Rows(k, k));
    ASSERT_TRUE(status.ok()) << status.ToString();
    const std::vector<std::byte> row(k.begin(), k.begin() + 128);
    for (int i = 0; i < 100; ++i) ASSERT_TRUE(slice.Insert(slice.Rows(row, row)).ok());
    ASSERT_TRUE(slice.Check().ok()) << slice.Check().ToString();
    const SelectRequest request{.max_pages = 5, .read_cap = 16};
    CheckSelection(slice, request, slice.Select(std::vector<float>(2 * 64, 0.5f), request), 2,
                   GetParam());
  }
}

TEST_P(SelectionPolicySuite, HugeValuesStayFinite) {
  std::mt19937_64 rng(6);
  std::normal_distribution<float> normal;
  for (const auto& [dtype, scale] :
       {std::pair{DType::kF16, 15000.0f}, std::pair{DType::kBF16, 1e15f},
        std::pair{DType::kF32, 1e18f}, std::pair{DType::kF32, 5e37f}}) {
    SCOPED_TRACE(scale);
    SliceModel slice(kind(), dtype, 64);
    std::vector<float> x(400 * 64), q(2 * 64);
    for (float& e : x) e = std::clamp(scale * normal(rng), -4 * scale, 4 * scale);
    for (float& e : q) e = normal(rng);
    std::vector<std::byte> k(x.size() * DTypeBytes(dtype)), v(k.size());
    FromF32(x.data(), x.size(), dtype, k.data());
    FromF32(std::vector<float>(x.size(), 1.0f).data(), x.size(), dtype, v.data());
    const Status status = slice.Build(slice.Rows(k, v));
    ASSERT_TRUE(status.ok()) << status.ToString();
    const size_t row = 64 * DTypeBytes(dtype);
    for (size_t i = 0; i < 50; ++i) {
      const std::vector<std::byte> one(k.begin() + i * row, k.begin() + (i + 1) * row);
      const std::vector<std::byte> ones(v.begin(), v.begin() + row);
      ASSERT_TRUE(slice.Insert(slice.Rows(one, ones)).ok());
    }
    const SelectRequest request{.max_pages = 5, .read_cap = 64};
    CheckSelection(slice, request, slice.Select(q, request), 2, GetParam());
    if (HasFatalFailure()) return;
  }
}

TEST_P(SelectionPolicySuite, NonFiniteRowsAreRefusedAndNothingChanges) {
  RowSource source(2, 64, 5);
  SliceModel slice(kind(), DType::kF32, 64);
  Build(&slice, &source, 100);
  const std::string before = slice.Image();
  for (const float bad : {std::nanf(""), std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity()}) {
    for (const bool in_key : {true, false}) {
      std::vector<float> good(64, 1.0f), broken(64, 1.0f);
      broken[17] = bad;
      const auto* g = reinterpret_cast<const std::byte*>(good.data());
      const auto* b = reinterpret_cast<const std::byte*>(broken.data());
      const TokenRows row{DType::kF32, 64, 1, in_key ? b : g, in_key ? g : b};
      const auto plan = slice.policy().Insert(row, slice.store().kv());
      ASSERT_EQ(plan.status().code(), StatusCode::kInvalidArgument);
      EXPECT_NE(plan.status().message().find("infinite"), std::string::npos);
      EXPECT_EQ(slice.Image(), before);
      auto fresh = MakePolicy(kind(), slice.options());
      EXPECT_EQ(fresh->Build(row, {}).status().code(), StatusCode::kInvalidArgument);
      EXPECT_TRUE(fresh->Build({DType::kF32, 64, 1, g, g}, {}).ok());  // still empty and usable
    }
  }
}

TEST_P(SelectionPolicySuite, PagesAndResidualAddUpToFullAttentionWhenAllMayBeRead) {
  if (GetParam().answers != Answers::kPagesAndRest) GTEST_SKIP() << "documented: no residual";
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const uint32_t group : {1u, 4u, 8u}) {
      for (const float scale : {0.5f, 4.0f, 20.0f}) {
        for (const uint32_t max_pages : {0u, 4u, 12u}) {
          RowSource source(group + max_pages, 128, 30);
          SliceModel slice(kind(), dtype, 128);
          Build(&slice, &source, 900);
          for (int i = 0; i < 60; ++i) ASSERT_TRUE(InsertOne(&slice, &source).ok());
          const std::vector<float> queries = source.Queries(group, scale);
          Selection got = slice.Select(queries, {.max_pages = max_pages, .read_cap = 1u << 16});
          EXPECT_LT(MergedError(slice, queries, &got), 2e-5)
              << "scale " << scale << " pages " << max_pages << " group " << group;
        }
      }
    }
  }
}

TEST_P(SelectionPolicySuite, TheResidualEstimateIsBetterThanLeavingTheRestOut) {
  if (GetParam().answers != Answers::kPagesAndRest &&
      GetParam().answers != Answers::kPagesAndEstimate)
    GTEST_SKIP() << "documented: no residual";
  // Flat attention over many tokens: four pages alone say nothing about the rest.
  RowSource source(31, 128, 40);
  SliceModel slice(kind(), DType::kF16, 128);
  Build(&slice, &source, 2000);
  const std::vector<float> queries = source.Queries(4, 0.1f);
  Selection with = slice.Select(queries, {.max_pages = 4, .read_cap = 0});
  Selection without = slice.Select(queries, {.max_pages = 4, .read_cap = 0, .residual = false});
  EXPECT_LT(MergedError(slice, queries, &with), 0.5 * MergedError(slice, queries, &without));
}

TEST_P(SelectionPolicySuite, TheBestTokenIsFound) {
  if (!GetParam().sees_queries) GTEST_SKIP() << "documented: blind to the query";
  // A needle: one key far along the query. Any policy must return its page, or attend to it.
  RowSource source(41, 64, 10);
  SliceModel slice(kind(), DType::kF32, 64);
  source.Append(1000, DType::kF32, &k_, &v_);
  std::vector<float> q = source.Queries(1, 1.0f), needle(64);
  float norm = 0;
  for (const float x : q) norm += x * x;
  for (uint32_t j = 0; j < 64; ++j) needle[j] = q[j] / std::sqrt(norm) * 30.0f;
  std::memcpy(k_.data() + 777 * 256, needle.data(), 256);
  ASSERT_TRUE(slice.Build(slice.Rows(k_, v_)).ok());
  Selection got = slice.Select(q, {.max_pages = 8, .read_cap = 256});
  if (GetParam().answers == Answers::kTokens) {
    EXPECT_LT(MergedError(slice, q, &got), 1e-3);
    return;
  }
  const uint32_t page = slice.store().PageOf()[777];
  EXPECT_TRUE(std::any_of(got.pages.begin(), got.pages.end(),
                          [&](const SelectedPage& p) { return p.page.value == page; }));
}

TEST_P(SelectionPolicySuite, PagesThatAreNotInMemoryAreNotRead) {
  RowSource source(61, 64, 10);
  SliceModel slice(kind(), DType::kF16, 64);
  Build(&slice, &source, 500);
  const std::vector<float> q = source.Queries(2, 4.0f);
  std::vector<PageView> views(slice.store().kv().pages,
                              slice.store().kv().pages + slice.store().page_count());
  for (size_t p = 0; p < views.size(); p += 2) views[p].k = views[p].v = nullptr;
  const PagedKv cold{DType::kF16, 64, static_cast<uint32_t>(views.size()), views.data()};
  const SelectRequest request{.queries = q.data(), .group = 2, .max_pages = 6, .read_cap = 128};
  Selection got;
  slice.policy().Select(request, cold, &got);  // a read of null would crash
  EXPECT_LE(got.pages.size(), 6u);
  for (const float x : got.residual.flat()) EXPECT_FALSE(std::isnan(x));
}

TEST_P(SelectionPolicySuite, CountersCountPagesAndTokens) {
  RowSource source(71, 64, 10);
  SliceModel slice(kind(), DType::kF16, 64);
  Build(&slice, &source, 300);
  std::set<std::string> seen;
  slice.policy().VisitCounters([&](std::string_view name, double value) {
    seen.emplace(name);
    if (name == "pages") {
      EXPECT_EQ(value, slice.store().page_count());
    }
    if (name == "tokens") {
      EXPECT_EQ(value, 300);
    }
    if (name == "index_bytes") {
      EXPECT_GT(value, 0);
    }
  });
  for (const char* name : {"pages", "tokens", "index_bytes"})
    EXPECT_EQ(seen.count(name), 1u) << name;
}

TEST(SelectionPolicyNames, ParseAndPrintAgree) {
  std::set<PolicyKind> distinct;
  for (const PolicyKind kind : AllPolicyKinds()) {
    EXPECT_EQ(ParsePolicyKind(PolicyKindName(kind)).value(), kind);
    EXPECT_TRUE(distinct.insert(kind).second) << PolicyKindName(kind) << " twice";
  }
  const auto unknown = ParsePolicyKind("hnsw");
  EXPECT_EQ(unknown.status().code(), StatusCode::kInvalidArgument);
  EXPECT_NE(unknown.status().message().find("dci_tree"), std::string::npos);
}

// How each policy answers, by what its header says.
PolicyCase CaseOf(PolicyKind kind) {
  switch (kind) {
    case PolicyKind::kClusterTree:
    case PolicyKind::kSequential:
    case PolicyKind::kRandomPages:
    case PolicyKind::kSequentialPages:
      return {kind, Answers::kPagesAndRest};
    case PolicyKind::kTreeNoRerank:
      return {kind, Answers::kPagesAndEstimate};
    case PolicyKind::kTreeNoResidual:
    case PolicyKind::kQuest:
    case PolicyKind::kArkVale:
    case PolicyKind::kLandmark:
    case PolicyKind::kExactPage:
      return {kind, Answers::kPages};
    case PolicyKind::kExact:
      return {kind, Answers::kPagesAndRest, false};
    case PolicyKind::kDciTree:
      return {kind, Answers::kPages, false};
    case PolicyKind::kInfLlm:  // reads its representatives; blind to a token that nobody looked at
      return {kind, Answers::kPages, false, false};
    case PolicyKind::kExactToken:
    case PolicyKind::kPqCache:
    case PolicyKind::kOmniKv:
    case PolicyKind::kShadowKv:
    case PolicyKind::kRetroInfer:
    case PolicyKind::kClusterKv:
    case PolicyKind::kSqueezed:
      return {kind, Answers::kTokens};
    case PolicyKind::kMagicPig:  // covers what chance gives it
      return {kind, Answers::kTokens, true, true, 0};
    case PolicyKind::kMass:
      return {kind, Answers::kTokens, true, true, 0.95f};
    case PolicyKind::kTwilight:
      return {kind, Answers::kTokens, true, true, 0.85f};
    case PolicyKind::kStreamingLlm:
    case PolicyKind::kH2o:
    case PolicyKind::kSnapKv:
      return {kind, Answers::kTokens, true, false};
  }
  return {kind, Answers::kPages};
}

std::vector<PolicyCase> AllCases() {
  std::vector<PolicyCase> cases;
  for (const PolicyKind kind : AllPolicyKinds()) cases.push_back(CaseOf(kind));
  return cases;
}

INSTANTIATE_TEST_SUITE_P(All, SelectionPolicySuite, testing::ValuesIn(AllCases()),
                         [](const auto& param) {
                           return std::string(PolicyKindName(param.param.kind));
                         });

}  // namespace
}  // namespace icecache
