// ClusterTree beyond the conformance suite: what its summaries, layouts and caps promise.
#include "cacheserver/select/cluster_tree.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>
#include <random>
#include <set>
#include <thread>

#include "cacheserver/select/cluster_tree_slice.h"

// Counts allocations, to see that a warm Select makes none.
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"
namespace {
std::atomic<uint64_t> allocations{0};
}
void* operator new(size_t bytes) {
  ++allocations;
  void* p = std::malloc(bytes);
  if (p == nullptr) std::abort();
  return p;
}
// std::stable_sort asks for memory that it can do without.
void* operator new(size_t bytes, const std::nothrow_t&) noexcept { return ::operator new(bytes); }
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }
void operator delete(void* p, const std::nothrow_t&) noexcept { std::free(p); }

namespace icecache {
namespace {

// A slice gives the same seed to policy and build: that must not make all slices alike.
TEST(ClusterTree, LayoutsFollowTheSeed) {
  Slice rows(64);
  rows.Draw(1000);
  const auto layout = [&](uint64_t seed) {
    BuildHints hints;
    hints.seed = seed;
    return MakeClusterTree({DType::kF16, 64, seed})->Build(rows.rows(), hints)->tokens;
  };
  EXPECT_EQ(layout(1), layout(1));
  EXPECT_NE(layout(1), layout(2));
}

TEST(ClusterTree, ReadingEverythingIsExact) {
  for (Sketch sketch : {Sketch::kOn, Sketch::kOff}) {
    ClusterTreeOptions options;
    options.sketch = sketch;
    Slice slice(64, options);
    slice.Draw(1500);
    ASSERT_TRUE(slice.Build().ok());
    for (float sharpness : {0.2f, 1.0f, 8.0f}) {
      const std::vector<float> queries = slice.Queries(4, sharpness);
      const Selection got = Ask(slice.policy(), slice.store().kv(), queries, 6, 1500);
      const Error error = ErrorOf(slice.store().kv(), queries, got);
      EXPECT_LT(error.output, 1e-4) << sharpness;
      EXPECT_LT(error.log_mass, 1e-4) << sharpness;
      EXPECT_EQ(got.tokens_read, 1500u);
    }
  }
}

TEST(ClusterTree, ExactReadsStayWithinTheCap) {
  for (uint64_t seed = 1; seed <= 40; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    std::mt19937_64 rng(seed);
    ClusterTreeOptions options;
    options.sketch = rng() % 2 == 0 ? Sketch::kOn : Sketch::kOff;
    options.scan_pages = rng() % 2 == 0 ? 16 : 8192;
    options.token_threshold = 1e-6f;
    Slice slice(64, options, DType::kF32, seed);
    slice.Draw(200 + rng() % 3000);
    ASSERT_TRUE(slice.Build().ok());
    for (int i = 0; i < 6; ++i) {
      const std::vector<float> queries =
          slice.Queries(1 + rng() % 8, 0.3f + 0.5f * static_cast<float>(i));
      SelectRequest request;
      request.queries = queries.data();
      request.group = static_cast<uint32_t>(queries.size() / 64);
      request.max_pages = rng() % 20;
      request.read_cap = i == 0 ? 0 : rng() % 400;
      request.min_mass = rng() % 2 == 0 ? 0.0f : 0.6f;
      request.rank = static_cast<GroupRank>(rng() % 3);
      Selection got;
      slice.policy().Select(request, slice.store().kv(), &got);
      EXPECT_LE(got.pages.size(), request.max_pages);
      EXPECT_LE(got.tokens_read, RowsOf(got, slice.store().kv()) + request.read_cap);
      EXPECT_GE(got.covered_mass, 0.0f);
      EXPECT_LE(got.covered_mass, 1.0f);
    }
  }
}

// Of a slice of so many pages, with more dimensions than are sketched, half are: those that tell.
TEST(ClusterTree, TheMostPromisingPagesAreSketched) {
  double errors[2] = {};
  int at = 0;
  for (uint32_t sketch_pages : {1u, ClusterTreeOptions().sketch_pages}) {
    ClusterTreeOptions options;
    options.sketch = Sketch::kOn;
    options.sketch_pages = sketch_pages;
    Slice slice(80, options);
    slice.Draw(40000, 1, 32);
    ASSERT_TRUE(slice.Build().ok());
    for (int i = 0; i < 8; ++i) {
      const std::vector<float> queries = slice.Queries(4, 4);
      errors[at] += ErrorOf(slice.store().kv(), queries,
                            Ask(slice.policy(), slice.store().kv(), queries, 8, 512))
                        .output /
                    8;
    }
    ++at;
  }
  EXPECT_LT(errors[1], 0.5 * errors[0]);
  EXPECT_LT(errors[1], 0.03);
}

TEST(ClusterTree, MoreReadingMeansLessError) {
  Slice slice(128);
  slice.Draw(8000);
  ASSERT_TRUE(slice.Build().ok());
  double errors[3] = {};
  for (int i = 0; i < 20; ++i) {
    const std::vector<float> queries = slice.Queries(4);
    int at = 0;
    for (uint32_t cap : {0u, 512u, 4096u}) {
      errors[at++] += ErrorOf(slice.store().kv(), queries,
                              Ask(slice.policy(), slice.store().kv(), queries, 8, cap))
                          .output /
                      20;
    }
  }
  EXPECT_LT(errors[1], errors[0]);
  EXPECT_LE(errors[2], errors[1]);
  EXPECT_LT(errors[0], 0.15);
}

TEST(ClusterTree, FindsTheHeaviestTokens) {
  Slice slice(128);
  slice.Draw(8000);
  ASSERT_TRUE(slice.Build().ok());
  const PagedKv kv = slice.store().kv();
  double found = 0;
  for (int i = 0; i < 30; ++i) {
    const std::vector<float> queries = slice.Queries(1);
    SelectRequest request;
    request.queries = queries.data();
    request.group = 1;
    request.max_pages = 12;
    request.read_cap = 1024;
    request.rank = GroupRank::kMaxToken;
    Selection got;
    slice.policy().Select(request, kv, &got);
    std::vector<std::pair<float, uint32_t>> scores;
    for (uint32_t p = 0; p < kv.page_count; ++p) {
      float logits[16];
      DotRows(queries.data(), 1, kv.pages[p].k, kv.dtype, kv.pages[p].fill, kv.head_dim, logits,
              16);
      for (uint32_t t = 0; t < kv.pages[p].fill; ++t) scores.emplace_back(-logits[t], p);
    }
    std::partial_sort(scores.begin(), scores.begin() + 16, scores.end());
    for (int t = 0; t < 16; ++t) {
      found += std::any_of(got.pages.begin(), got.pages.end(),
                           [&](const SelectedPage& x) { return x.page.value == scores[t].second; });
    }
  }
  EXPECT_GE(found / (30 * 16), 0.95);
}

TEST(ClusterTree, ManySupersAreSearchedWithoutScanningAllPages) {
  ClusterTreeOptions two_level;
  two_level.scan_pages = 128;
  Slice slice(128, two_level);
  slice.Draw(12000);
  ASSERT_TRUE(slice.Build().ok());
  ASSERT_GT(slice.Counter("supers"), 12);
  double error = 0, log_mass = 0;
  for (int i = 0; i < 20; ++i) {
    const std::vector<float> queries = slice.Queries(2);
    const Error e = ErrorOf(slice.store().kv(), queries,
                            Ask(slice.policy(), slice.store().kv(), queries, 12, 512));
    error += e.output / 20;
    log_mass += e.log_mass / 20;
  }
  EXPECT_LT(error, 0.1);
  EXPECT_LT(log_mass, 0.05);
}

// Looking near some pages ranks those as always, and knows the rest by coarser summaries; near all
// of them it is looking everywhere.
TEST(ClusterTree, LookingNearEverythingChangesNothingAndNearSomeFindsThose) {
  ClusterTreeOptions options;
  options.near_scan_pages = 0;
  Slice slice(64, options);
  slice.Draw(16384, 4);
  ASSERT_TRUE(slice.Build().ok());
  const PagedKv kv = slice.store().kv();
  std::vector<PageId> all;
  for (uint32_t p = 0; p < kv.page_count; ++p) all.emplace_back(p);
  for (int round = 0; round < 8; ++round) {
    const std::vector<float> q = slice.Queries(4);
    SelectRequest request;
    request.queries = q.data();
    request.group = 4;
    request.max_pages = 12;
    request.read_cap = 512;
    Selection everywhere, near;
    slice.policy().Select(request, kv, &everywhere);
    request.near = all;
    slice.policy().Select(request, kv, &near);
    ASSERT_EQ(near.pages.size(), everywhere.pages.size());
    for (size_t i = 0; i < near.pages.size(); ++i) {
      EXPECT_EQ(near.pages[i].page, everywhere.pages[i].page);
    }
    EXPECT_TRUE(std::equal(near.residual.flat().begin(), near.residual.flat().end(),
                           everywhere.residual.flat().begin()));
    // As an anchor would: the best few of what another layer has found. Ids out of range are no
    // harm.
    std::vector<PageId> some = {PageId(kv.page_count + 5)};
    for (const SelectedPage& page : everywhere.pages) some.push_back(page.page);
    request.near = some;
    slice.policy().Select(request, kv, &near);
    std::set<uint32_t> found;
    for (const SelectedPage& page : near.pages) found.insert(page.page.value);
    size_t both = 0;
    for (const SelectedPage& page : everywhere.pages) both += found.count(page.page.value);
    EXPECT_GE(both + 1, everywhere.pages.size()) << "round " << round;
    EXPECT_LT(ErrorOf(kv, q, std::move(near)).output, 0.2);
  }
}

TEST(ClusterTree, ColdPagesAreSelectedBySummaryAndNeverRead) {
  Slice slice(64);
  slice.Draw(1000);
  ASSERT_TRUE(slice.Build().ok());
  const PagedKv warm = slice.store().kv();
  std::vector<PageView> views(warm.pages, warm.pages + warm.page_count);
  for (PageView& view : views) view.k = view.v = nullptr;
  PagedKv cold = warm;
  cold.pages = views.data();
  const std::vector<float> queries = slice.Queries(4);
  const Selection got = Ask(slice.policy(), cold, queries, 5, 800);
  EXPECT_EQ(got.pages.size(), 5u);
  EXPECT_EQ(got.tokens_read, 0u);
  EXPECT_LT(ErrorOf(warm, queries, got).output, 0.3);
}

TEST(ClusterTree, SequentialPagesWinWhereNeighboursAreAlike) {
  Slice runs(128), scattered(128);
  runs.Draw(4096, 32);
  scattered.Draw(4096, 1);
  const auto is_identity = [](const PageLayout& layout) {
    return std::is_sorted(layout.tokens.begin(), layout.tokens.end());
  };
  EXPECT_TRUE(is_identity(*runs.policy().Build(runs.rows(), {})));
  EXPECT_FALSE(is_identity(*scattered.policy().Build(scattered.rows(), {})));
}

// A worker's proposal is a candidate like the tree's own: the same one gives the same tree, byte
// for byte; a bad one loses against the order of the text.
TEST(ClusterTree, AProposedLayoutIsACandidateLikeItsOwn) {
  for (const uint32_t run : {1u, 40u}) {
    SCOPED_TRACE(run);
    Slice slice(64);
    slice.Draw(3000, run);
    const TokenRows rows = slice.rows();
    const auto build = [&](const Packing* proposed, std::string* image) {
      const auto policy = slice.Make();
      BuildHints hints;
      hints.seed = 3;  // the policy's, as in a head slice
      hints.proposed = proposed;
      const auto layout = policy->Build(rows, hints);
      KV_CHECK(layout.ok());
      policy->Save(image);
      return *layout;
    };
    const Packing proposed = packing::Propose(rows, {}, 3, *MakeCpuAssigner()).value();
    EXPECT_TRUE(CheckPacking(proposed, 3000).ok()) << CheckPacking(proposed, 3000).ToString();
    std::string own, given;
    const PageLayout layout = build(nullptr, &own);
    EXPECT_EQ(build(&proposed, &given).tokens, layout.tokens);
    EXPECT_TRUE(own == given);

    Packing shuffled = proposed;
    std::mt19937_64 rng(5);
    std::shuffle(shuffled.layout.tokens.begin(), shuffled.layout.tokens.end(), rng);
    const PageLayout kept = build(&shuffled, &given);
    EXPECT_TRUE(run == 1 || std::is_sorted(kept.tokens.begin(), kept.tokens.end()));
    EXPECT_TRUE(CheckLayout(kept, 3000).ok());
  }
}

TEST(ClusterTree, EveryLayoutFillsItsPages) {
  for (Layout layout : {Layout::kContent, Layout::kSequential, Layout::kContentValue}) {
    ClusterTreeOptions options;
    options.layout = layout;
    Slice slice(64, options);
    slice.Draw(5000);
    ASSERT_TRUE(slice.Build().ok());
    ASSERT_TRUE(slice.Validate().ok()) << slice.Validate().ToString();
    EXPECT_GE(slice.Counter("page_fill"), 0.95);
  }
}

TEST(ClusterTree, QueryEnergyDecidesWhichDimensionsThePagesFollow) {
  // Keys cluster one way in the first half of the dimensions and another way in the second.
  Slice slice(64, {.layout = Layout::kContent});
  std::vector<float> centres(2 * 16 * 32);
  std::normal_distribution<float> normal;
  for (float& x : centres) x = normal(slice.rng());
  std::vector<uint32_t> second;
  for (int t = 0; t < 2048; ++t) {
    const uint32_t a = slice.rng()() % 16, b = slice.rng()() % 16;
    second.push_back(b);
    slice.Push([&](uint32_t j) {
      return (j < 32 ? centres[a * 32 + j] : centres[(16 + b) * 32 + j - 32]) +
             0.1f * normal(slice.rng());
    });
  }
  std::vector<float> energy(64, 0.01f);
  std::fill(energy.begin() + 32, energy.end(), 1.0f);
  BuildHints hints;
  hints.query_energy = energy;
  const PageLayout layout = slice.policy().Build(slice.rows(), hints).value();
  uint32_t mixed = 0;
  for (uint32_t p = 0; p < layout.page_count(); ++p) {
    for (uint32_t i = layout.page_begin[p] + 1; i < layout.page_begin[p + 1]; ++i) {
      mixed += second[layout.tokens[i]] != second[layout.tokens[i - 1]] ? 1 : 0;
    }
  }
  EXPECT_LT(mixed, 2048u / 20);
}

// Facts in a long text: a few keys far out in dimensions that text neither fills nor asks in. A
// query for one finds it by its sketch, though those are the last that variance would choose.
TEST(ClusterTree, FindsFarTokensInDimensionsThatVaryLittle) {
  constexpr uint32_t kTokens = 8192, kFacts = 16, kFirst = 56;
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    Slice slice(64, {}, DType::kF16, seed);
    std::normal_distribution<float> normal;
    std::vector<std::vector<float>> queries;
    std::vector<uint32_t> tokens;
    for (uint32_t t = 0; t < kTokens; ++t) {
      const bool fact = t % (kTokens / kFacts) == 100;
      std::vector<float> key(64);
      for (uint32_t j = 0; j < 64; ++j) {
        const float x = normal(slice.rng());
        key[j] = j < 32 ? x : 0.5f * x;
        if (fact && j >= kFirst) key[j] += x > 0 ? 3.0f : -3.0f;
      }
      slice.Push([&](uint32_t j) { return key[j]; });
      if (!fact) continue;
      tokens.push_back(t);
      // What else it asks for spreads the logits of text as far as a summary would spread a fact's.
      for (uint32_t j = 0; j < 64; ++j)
        key[j] = j < 32 ? 0.4f * normal(slice.rng()) : 0.2f * key[j];
      queries.push_back(key);
    }
    std::vector<float> energy(64, 0.2f);
    std::fill_n(energy.begin(), 32, 1.0f);
    BuildHints hints;
    hints.query_energy = energy;
    ASSERT_TRUE(slice.Build(hints).ok());
    for (uint32_t f = 0; f < kFacts; ++f) {
      const Selection got = Ask(slice.policy(), slice.store().kv(), queries[f], 2, 0);
      EXPECT_TRUE(std::any_of(got.pages.begin(), got.pages.end(),
                              [&](const SelectedPage& page) {
                                const auto& in = slice.store().tokens(page.page.value);
                                return std::find(in.begin(), in.end(), tokens[f]) != in.end();
                              }))
          << "fact " << f;
    }
  }
}

TEST(ClusterTree, NaNQueriesDoNotBreakTheSearch) {
  Slice slice(64);
  slice.Draw(500);
  ASSERT_TRUE(slice.Build().ok());
  std::vector<float> queries = slice.Queries(2);
  queries[5] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(Ask(slice.policy(), slice.store().kv(), queries, 4, 64).pages.size(), 4u);
}

TEST(ClusterTree, ThreadsGetTheSameAnswers) {
  Slice slice(64);
  slice.Draw(4000);
  ASSERT_TRUE(slice.Build().ok());
  std::vector<std::vector<float>> queries;
  std::vector<std::vector<float>> expected;
  for (int i = 0; i < 20; ++i) {
    queries.push_back(slice.Queries(4));
    const Selection got = Ask(slice.policy(), slice.store().kv(), queries.back(), 8, 256);
    expected.emplace_back(got.residual.flat().begin(), got.residual.flat().end());
  }
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&] {
      for (size_t i = 0; i < queries.size(); ++i) {
        const Selection got = Ask(slice.policy(), slice.store().kv(), queries[i], 8, 256);
        wrong +=
            std::equal(expected[i].begin(), expected[i].end(), got.residual.flat().begin()) ? 0 : 1;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST(ClusterTree, SelectDoesNotAllocateOnceWarm) {
  for (Sketch sketch : {Sketch::kOn, Sketch::kOff}) {
    Slice slice(64, {.sketch = sketch});
    slice.Draw(6000);
    ASSERT_TRUE(slice.Build().ok());
    std::vector<std::vector<float>> queries;
    for (int i = 0; i < 30; ++i) queries.push_back(slice.Queries(4, 0.5f));
    Selection out;
    SelectRequest request;
    request.group = 4;
    request.max_pages = 12;
    request.read_cap = 1024;
    uint64_t before = 0;
    for (int pass = 0; pass < 2; ++pass) {
      before = allocations;
      for (const auto& q : queries) {
        request.queries = q.data();
        slice.policy().Select(request, slice.store().kv(), &out);
      }
    }
    EXPECT_EQ(allocations - before, 0u);
  }
}

TEST(ClusterTree, MinMassReturnsNoMorePagesThanNeeded) {
  Slice slice(128);
  slice.Draw(6000);
  ASSERT_TRUE(slice.Build().ok());
  SelectRequest request;
  const std::vector<float> queries = slice.Queries(2, 2.0f);
  request.queries = queries.data();
  request.group = 2;
  request.max_pages = 200;
  request.read_cap = 512;
  size_t last = 0;
  for (float share : {0.1f, 0.5f, 0.9f}) {
    request.min_mass = share;
    Selection got;
    slice.policy().Select(request, slice.store().kv(), &got);
    EXPECT_GE(got.covered_mass, share - 0.02f);
    EXPECT_LT(got.pages.size(), 200u);
    EXPECT_GE(got.pages.size(), last);
    last = got.pages.size();
  }
}

TEST(ClusterTree, HeadsThatAttendLocallyHaveLittleSay) {
  Slice slice(128);
  slice.Draw(6000);
  ASSERT_TRUE(slice.Build().ok());
  std::vector<float> queries = slice.Queries(1, 2.0f);
  const std::vector<float> other = slice.Queries(1, 2.0f);
  queries.insert(queries.end(), other.begin(), other.end());
  const Selection alone = Ask(slice.policy(), slice.store().kv(), other, 6, 512);
  const float local[2] = {1e4f, -1e4f};  // everything the first head wants is at the worker
  SelectRequest request;
  request.queries = queries.data();
  request.group = 2;
  request.max_pages = 6;
  request.read_cap = 512;
  request.local_lse = local;
  Selection got;
  slice.policy().Select(request, slice.store().kv(), &got);
  std::vector<uint32_t> a, b;
  for (const SelectedPage& p : alone.pages) a.push_back(p.page.value);
  for (const SelectedPage& p : got.pages) b.push_back(p.page.value);
  std::sort(a.begin(), a.end());
  std::sort(b.begin(), b.end());
  EXPECT_EQ(a, b);
}

TEST(ClusterTree, StaysSmall) {
  ClusterTreeOptions options;
  options.sketch = Sketch::kOn;
  Slice slice(128, options);
  slice.Draw(20000);
  ASSERT_TRUE(slice.Build().ok());
  EXPECT_LE(slice.Counter("index_bytes") / 20000, 64.0);
}

}  // namespace
}  // namespace icecache
