#include "cacheserver/context/head_slice.h"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <thread>

#include "cacheserver/context/test_rows.h"
#include "common/checksum.h"

namespace icecache {
namespace {

constexpr uint32_t kDim = 32;
constexpr uint32_t kGroup = 2;
constexpr uint32_t kSinks = 4;
constexpr uint32_t kWindow = 24;
const TenantId kTenant(3);

SliceOptions Options(PolicyKind policy) {
  SliceOptions options;
  options.segment = SegmentId(9);
  options.tenant = kTenant;
  options.head_dim = kDim;
  options.policy = policy;
  options.seed = 5;
  return options;
}

// A slice with the worker that feeds it: rows by position, and what the worker holds in its window.
class HeadSliceTest : public testing::TestWithParam<PolicyKind> {
 protected:
  PagePool pool_{64 * limits::kExtentBytes};
  TestRows source_{1234, DType::kF16, kDim};
  std::unique_ptr<AttentionBackend> attention_ = MakeReferenceAttention();
  std::unique_ptr<HeadSlice> slice_ = std::make_unique<HeadSlice>(pool_, Options(Policy()));

  virtual PolicyKind Policy() const { return GetParam(); }

  Status Put(uint32_t first, uint32_t count) {
    return slice_->PutRows(first, source_.Rows(first, count));
  }
  Status Append(uint32_t first, uint32_t count) {
    return slice_->Append(first, source_.Rows(first, count));
  }
  Status Build(uint32_t tokens, std::span<const float> query_energy = {}) {
    auto job = slice_->PrepareBuild(tokens, kSinks, kWindow, query_energy);
    KV_RETURN_IF_ERROR(job.status());
    if (*job == nullptr) return OkStatus();
    (*job)->Run();
    return slice_->Install(std::move(*job));
  }
  Status PutAndBuild(uint32_t tokens) {
    for (uint32_t first = 0; first < tokens; first += 100) {
      KV_RETURN_IF_ERROR(Put(first, std::min(100u, tokens - first)));
    }
    return Build(tokens);
  }
  Status Recluster() {
    auto job = slice_->PrepareRecluster();
    KV_RETURN_IF_ERROR(job.status());
    (*job)->Run();
    return slice_->Install(std::move(*job));
  }

  // Sinks + selection + residual + the worker's rows [next_append, tokens) against full attention
  // over [0, tokens).
  void ExpectFullAttention(uint32_t tokens, uint32_t max_pages, uint64_t seed) {
    const std::vector<float> queries = source_.Queries(seed, kGroup, tokens);
    SelectRequest request;
    request.queries = queries.data();
    request.group = kGroup;
    request.max_pages = max_pages;
    request.read_cap = limits::kReadCapMax;
    Selection selection;
    slice_->Select(request, *attention_, &selection);
    EXPECT_LE(selection.pages.size(), max_pages);
    AttentionStates states(kGroup, kDim);
    attention_->AttendRows(queries.data(), slice_->sinks().rows, states.ref());
    std::vector<PageId> pages;
    for (const SelectedPage& page : selection.pages) pages.push_back(page.page);
    attention_->AttendPages(queries.data(), slice_->pages(), pages, states.ref());
    MergeStates(selection.residual.ref(), states.ref());
    const uint32_t window = slice_->next_append();
    attention_->AttendRows(queries.data(), source_.Rows(window, tokens - window), states.ref());
    ExpectAttention(states, source_.FullAttention(queries, kGroup, tokens));
  }

  void ExpectValid() {
    const Status valid = slice_->Validate();
    EXPECT_TRUE(valid.ok()) << valid.ToString();
    EXPECT_TRUE(pool_.Validate().ok());
    EXPECT_LE(slice_->kv_bytes(),
              pool_.usage(kTenant).frame_bytes + pool_.usage(kTenant).row_bytes);
  }

  // Every page of the slice under its name, with its content in positions; a name seen before must
  // show what it showed then, perhaps with rows added.
  using Names = std::map<std::pair<uint32_t, uint32_t>, std::vector<uint32_t>>;
  void ExpectNamesKeepTheirMeaning(Names* names) {
    for (uint32_t p = 0; p < slice_->page_count(); ++p) {
      const PageContent content = slice_->page(PageId(p));
      const auto* positions = reinterpret_cast<const uint32_t*>(content.positions.data());
      const std::vector<uint32_t> rows(positions, positions + content.fill);
      for (uint32_t row = 0; row < content.fill; ++row) {
        ASSERT_EQ(std::memcmp(content.k_rows.data() + row * source_.RowBytes(),
                              source_.K(rows[row], 1).data(), source_.RowBytes()),
                  0);
        ASSERT_EQ(std::memcmp(content.v_rows.data() + row * source_.RowBytes(),
                              source_.V(rows[row], 1).data(), source_.RowBytes()),
                  0);
      }
      EXPECT_EQ(content.checksum, PageChecksum({9, p, content.version}, content.k_rows,
                                               content.v_rows, content.positions));
      auto& known = (*names)[{p, content.version}];
      ASSERT_LE(known.size(), rows.size());
      ASSERT_TRUE(std::equal(known.begin(), known.end(), rows.begin()))
          << "page " << p << " version " << content.version;
      known = rows;
    }
  }

  void ExpectNothingHeld() {
    slice_.reset();
    EXPECT_EQ(pool_.usage(kTenant).held_bytes(), 0u);
  }
};

class EnergySliceTest : public HeadSliceTest {
 protected:
  // Of K's element `dim`, mean over pages.
  double VarianceInPages(uint32_t dim) const {
    double sum = 0;
    const PagedKv view = slice_->pages();
    std::vector<float> rows(limits::kPageTokens * kDim);
    for (uint32_t p = 0; p < view.page_count; ++p) {
      const uint32_t fill = view.pages[p].fill;
      ToF32(view.pages[p].k, view.dtype, size_t{fill} * kDim, rows.data());
      double mean = 0, square = 0;
      for (uint32_t r = 0; r < fill; ++r) {
        mean += rows[r * kDim + dim] / fill;
        square += rows[r * kDim + dim] * rows[r * kDim + dim] / fill;
      }
      sum += (square - mean * mean) / view.page_count;
    }
    return sum;
  }
};

std::string KindName(const testing::TestParamInfo<PolicyKind>& info) {
  return std::string(PolicyKindName(info.param));
}
INSTANTIATE_TEST_SUITE_P(Policies, HeadSliceTest,
                         testing::Values(PolicyKind::kClusterTree, PolicyKind::kDciTree,
                                         PolicyKind::kExact, PolicyKind::kSequential),
                         KindName);

TEST_P(HeadSliceTest, BuildSplitsRowsIntoSinksIndexAndTail) {
  for (const uint32_t tokens : {0u, 1u, 4u, 5u, 28u, 29u, 44u, 45u, 300u}) {
    SCOPED_TRACE(tokens);
    slice_ = std::make_unique<HeadSlice>(pool_, Options(Policy()));
    ASSERT_TRUE(PutAndBuild(tokens).ok());
    const uint32_t sinks = std::min(tokens, kSinks), tail = std::min(tokens - sinks, kWindow);
    EXPECT_EQ(slice_->sink_count(), sinks);
    EXPECT_EQ(slice_->tail().rows.count, tail);
    EXPECT_EQ(slice_->tail().first_position, tokens - tail);
    EXPECT_EQ(slice_->indexed_count(), tokens - sinks - tail);
    EXPECT_EQ(slice_->next_append(), tokens - tail);
    EXPECT_EQ(slice_->end(), tokens);
    ExpectValid();
    if (tokens > 0) ExpectFullAttention(tokens, 1000, 1);
    EXPECT_TRUE(Build(tokens).ok()) << "a repeated request";
    EXPECT_EQ(Build(tokens + 1).code(), StatusCode::kFailedPrecondition);
  }
  ExpectNothingHeld();
}

TEST_P(HeadSliceTest, TheStagedRowsGoAndOnlyPagesSinksAndTailStay) {
  ASSERT_TRUE(PutAndBuild(1000).ok());
  const uint64_t row_pair = 2 * source_.RowBytes();
  EXPECT_EQ(pool_.usage(kTenant).row_bytes, (kSinks + kWindow) * row_pair);
  EXPECT_EQ(pool_.usage(kTenant).frames, slice_->page_count());
  EXPECT_EQ(slice_->kv_bytes(), pool_.usage(kTenant).row_bytes + pool_.usage(kTenant).frame_bytes);
  ExpectNothingHeld();
}

TEST_P(HeadSliceTest, PutRowsReplacesFromAPositionOnAndRefusesGaps) {
  ASSERT_TRUE(Put(0, 50).ok());
  EXPECT_EQ(Put(51, 1).code(), StatusCode::kOutOfRange);
  ASSERT_TRUE(slice_->PutRows(30, source_.Rows(0, 40)).ok());
  ASSERT_TRUE(Put(30, 40).ok()) << "a repeated or corrected request";
  EXPECT_EQ(slice_->end(), 70u);
  ASSERT_TRUE(Put(70, 30).ok());
  ASSERT_TRUE(Build(100).ok());
  ExpectFullAttention(100, 1000, 3);
  EXPECT_EQ(Put(75, 1).code(), StatusCode::kOutOfRange) << "position 75 is indexed";
  ASSERT_TRUE(Put(80, 20).ok()) << "within the tail";
  ExpectValid();
}

TEST_P(HeadSliceTest, RepeatedAppendsAreIgnoredAndGapsRefused) {
  ASSERT_TRUE(PutAndBuild(100).ok());
  ASSERT_TRUE(Append(76, 3).ok());
  ASSERT_TRUE(Append(76, 3).ok());
  ASSERT_TRUE(Append(70, 10).ok()) << "overlap with what is known, and one new row";
  EXPECT_EQ(slice_->next_append(), 80u);
  EXPECT_EQ(slice_->pending_count(), 4u);
  const Status gap = Append(81, 1);
  EXPECT_EQ(gap.code(), StatusCode::kOutOfRange);
  EXPECT_NE(gap.message().find("80"), std::string::npos);
  EXPECT_EQ(slice_->tail().first_position, 80u);
  EXPECT_EQ(slice_->tail().rows.count, 20u);
  ExpectValid();
  ExpectFullAttention(100, 1000, 4);
}

TEST_P(HeadSliceTest, PendingRowsAreBoundedAndPartOfEverySelection) {
  ASSERT_TRUE(PutAndBuild(100).ok());
  for (uint32_t p = 76; p < 76 + 3 * limits::kPendingTokensMax; ++p) {
    ASSERT_TRUE(Append(p, 1).ok());
    EXPECT_LE(slice_->pending_count(), limits::kPendingTokensMax);
    if (p % 16 == 0) ExpectFullAttention(p + 1, 1000, p);
  }
  EXPECT_EQ(Append(slice_->next_append(), limits::kPendingTokensMax + 1).code(),
            StatusCode::kInvalidArgument);
  const Result<bool> more = slice_->IndexPending(10);
  ASSERT_TRUE(more.ok());
  EXPECT_TRUE(*more);
  EXPECT_EQ(slice_->pending_count(), limits::kPendingTokensMax - 10);
  ExpectValid();
  ASSERT_FALSE(*slice_->IndexPending(1000));
  ExpectValid();
  ExpectFullAttention(slice_->next_append(), 1000, 5);
}

TEST_P(HeadSliceTest, NonFiniteRowsAreRefusedAndNothingChanges) {
  ASSERT_TRUE(PutAndBuild(100).ok());
  for (const uint16_t bad : {0x7c00, 0xfc00, 0x7e01}) {
    for (const bool in_k : {true, false}) {
      TokenRows rows = source_.Rows(76, 2);
      std::vector<std::byte> broken(in_k ? source_.K(76, 2).begin() : source_.V(76, 2).begin(),
                                    in_k ? source_.K(76, 2).end() : source_.V(76, 2).end());
      std::memcpy(broken.data() + broken.size() - 2, &bad, 2);
      (in_k ? rows.k : rows.v) = broken.data();
      const Status append = slice_->Append(76, rows);
      EXPECT_EQ(append.code(), StatusCode::kInvalidArgument);
      EXPECT_NE(append.message().find(in_k ? "K rows" : "V rows"), std::string::npos)
          << append.ToString();
      EXPECT_EQ(slice_->PutRows(76, rows).code(), StatusCode::kInvalidArgument);
    }
  }
  EXPECT_EQ(slice_->next_append(), 76u);
  EXPECT_EQ(slice_->pending_count(), 0u);
  EXPECT_EQ(slice_->end(), 100u);
  ExpectFullAttention(100, 1000, 6);
}

TEST_P(HeadSliceTest, AQuotaRefusalLeavesTheSliceAsItWas) {
  // Room for the staged rows, but not for the pages beside them.
  pool_.SetQuota(kTenant, limits::kExtentBytes);
  ASSERT_TRUE(PutAndBuild(100).code() == StatusCode::kResourceExhausted);
  EXPECT_FALSE(slice_->built());
  EXPECT_FALSE(slice_->job_running());
  EXPECT_EQ(slice_->end(), 100u);
  pool_.SetQuota(kTenant, 2 * limits::kExtentBytes);
  ASSERT_TRUE(Build(100).ok());
  ExpectFullAttention(100, 1000, 7);

  // No byte more: an append is refused, what stands goes on answering.
  const uint64_t held = pool_.usage(kTenant).held_bytes();
  pool_.SetQuota(kTenant, held);
  EXPECT_EQ(Append(76, 1).code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(Put(100, 10).code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(slice_->PrepareRecluster().status().code(), StatusCode::kResourceExhausted);
  EXPECT_FALSE(slice_->job_running());
  EXPECT_EQ(pool_.usage(kTenant).held_bytes(), held);
  EXPECT_EQ(slice_->next_append(), 76u);
  EXPECT_EQ(slice_->end(), 100u);
  ExpectValid();
  ExpectFullAttention(100, 1000, 8);
  ExpectNothingHeld();
}

TEST_P(HeadSliceTest, ReclusteringTakesWhatCameMeanwhile) {
  ASSERT_TRUE(PutAndBuild(400).ok());
  Names names;
  ExpectNamesKeepTheirMeaning(&names);
  auto job = slice_->PrepareRecluster();
  ASSERT_TRUE(job.ok()) << job.status().ToString();
  EXPECT_EQ(slice_->PrepareRecluster().status().code(), StatusCode::kFailedPrecondition);
  ASSERT_TRUE(Append(376, 40).ok());
  ASSERT_TRUE(slice_->IndexPending(30).ok());
  ExpectNamesKeepTheirMeaning(&names);
  (*job)->Run();
  ASSERT_TRUE(slice_->Install(std::move(*job)).ok());
  EXPECT_EQ(slice_->pending_count(), 10u);
  ExpectNamesKeepTheirMeaning(&names);
  ExpectValid();
  ExpectFullAttention(416, 1000, 9);
  ExpectNothingHeld();
}

TEST_P(HeadSliceTest, ReclusteringIsDueAfterManyInserts) {
  ASSERT_TRUE(PutAndBuild(100).ok());
  for (uint32_t p = 76; p < 76 + limits::kReclusterTokens; p += 64) {
    EXPECT_FALSE(slice_->wants_recluster());
    ASSERT_TRUE(Append(p, 64).ok());
    ASSERT_TRUE(slice_->IndexPending(64).ok());
  }
  EXPECT_TRUE(slice_->wants_recluster());
  ASSERT_TRUE(Recluster().ok());
  EXPECT_FALSE(slice_->wants_recluster());
  ExpectValid();
  ExpectFullAttention(slice_->next_append(), 1000, 10);
}

INSTANTIATE_TEST_SUITE_P(ClusterTree, EnergySliceTest, testing::Values(PolicyKind::kClusterTree),
                         KindName);
// Whatever the build was told, pages are for what queries look at now: the variance inside pages goes
// down in the dimension that was asked for, and up in the one that was not.
TEST_P(EnergySliceTest, ReclusteringIsForTheQueriesThatCame) {
  std::vector<float> energy(kDim, 1e-3f);
  energy[0] = 1;
  ASSERT_TRUE(Put(0, 1500).ok());
  ASSERT_TRUE(Build(1500, energy).ok());
  EXPECT_LT(VarianceInPages(0), 0.5 * VarianceInPages(1));
  ASSERT_TRUE(Recluster().ok());
  EXPECT_LT(VarianceInPages(0), 0.5 * VarianceInPages(1)) << "the build's energy is kept";

  std::vector<float> queries(size_t{kGroup} * kDim, 0.0f);
  for (uint32_t g = 0; g < kGroup; ++g) queries[g * kDim + 1] = 1;
  for (int i = 0; i < 3000; ++i) slice_->ObserveQueries(queries.data(), kGroup);
  EXPECT_LT(VarianceInPages(0), 0.5 * VarianceInPages(1)) << "nothing moves before a clustering";
  ASSERT_TRUE(Recluster().ok());
  EXPECT_LT(VarianceInPages(1), 0.5 * VarianceInPages(0));
}

TEST_P(HeadSliceTest, AJobOutlivesItsSliceAndGivesItsMemoryBack) {
  ASSERT_TRUE(Put(0, 300).ok());
  auto build = slice_->PrepareBuild(300, kSinks, kWindow, {});
  ASSERT_TRUE(build.ok());
  EXPECT_EQ(Put(0, 10).code(), StatusCode::kFailedPrecondition);
  slice_.reset();
  (*build)->Run();
  EXPECT_GT(pool_.usage(kTenant).held_bytes(), 0u);
  build->reset();
  EXPECT_EQ(pool_.usage(kTenant).held_bytes(), 0u);
}

TEST_P(HeadSliceTest, ASealedSliceRefusesChangesAndLateJobs) {
  ASSERT_TRUE(PutAndBuild(200).ok());
  ASSERT_TRUE(Append(176, 10).ok());
  auto job = slice_->PrepareRecluster();
  ASSERT_TRUE(job.ok());
  (*job)->Run();
  ASSERT_TRUE(Put(186, 20).ok()) << "the worker's window";
  ASSERT_TRUE(slice_->Seal().ok());
  EXPECT_EQ(slice_->Install(std::move(*job)).code(), StatusCode::kCancelled);
  EXPECT_EQ(slice_->pending_count(), 0u);
  EXPECT_EQ(slice_->tail().first_position, 186u);
  EXPECT_EQ(slice_->tail().rows.count, 20u);
  EXPECT_EQ(Append(186, 1).code(), StatusCode::kFailedPrecondition);
  EXPECT_EQ(Put(186, 1).code(), StatusCode::kFailedPrecondition);
  EXPECT_EQ(slice_->PrepareRecluster().status().code(), StatusCode::kFailedPrecondition);
  EXPECT_TRUE(slice_->Seal().ok());
  ExpectValid();
  ExpectFullAttention(206, 1000, 11);
  ExpectNothingHeld();
}

TEST_P(HeadSliceTest, AnUnbuiltPrefillTooLongForAWindowIsNotSealed) {
  ASSERT_TRUE(Put(0, limits::kWindowTokensMax + 1).ok());
  const Status status = slice_->Seal();
  EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition);
  EXPECT_NE(status.message().find("Build"), std::string::npos);
  EXPECT_FALSE(slice_->sealed());
}

TEST_P(HeadSliceTest, RowsOnTheirWayOutAreNotOverwritten) {
  ASSERT_TRUE(PutAndBuild(100).ok());
  const RowsView view = slice_->tail();
  const std::vector<std::byte> before(view.rows.k,
                                      view.rows.k + view.rows.count * source_.RowBytes());
  ASSERT_TRUE(slice_->PutRows(76, source_.Rows(500, 40)).ok());
  EXPECT_EQ(std::memcmp(view.rows.k, before.data(), before.size()), 0);
  EXPECT_EQ(slice_->tail().rows.count, 40u);
}

// The sanitizer's test: clustering on another thread while the owner appends, indexes and selects.
TEST_P(HeadSliceTest, JobsRunBesideTheOwner) {
  ASSERT_TRUE(PutAndBuild(600).ok());
  uint32_t next = slice_->next_append();
  for (int round = 0; round < 3; ++round) {
    auto job = slice_->PrepareRecluster();
    ASSERT_TRUE(job.ok());
    std::thread builder([&] { (*job)->Run(); });
    for (int i = 0; i < 40; ++i, ++next) {
      ASSERT_TRUE(Append(next, 1).ok());
      if (i % 8 == 0) ExpectFullAttention(next + 1, 1000, next);
      ASSERT_TRUE(slice_->IndexPending(4).ok());
    }
    builder.join();
    ASSERT_TRUE(slice_->Install(std::move(*job)).ok());
    ExpectValid();
  }
}

TEST_P(HeadSliceTest, RandomSequencesKeepEveryTokenInOnePlace) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 rng(seed);
  for (int run = 0; run < 6 && !HasFailure(); ++run) {
    slice_ = std::make_unique<HeadSlice>(pool_, Options(Policy()));
    Names names;
    uint32_t tokens = 0;  // what worker and slice have seen
    if (rng() % 4 != 0) {
      const auto n = static_cast<uint32_t>(rng() % 700);
      for (uint32_t first = 0; first < n;) {
        const uint32_t overlap = std::min<uint32_t>(first, static_cast<uint32_t>(rng() % 5));
        const auto count = std::min<uint32_t>(n - first + overlap,
                                              static_cast<uint32_t>(1 + overlap + rng() % 200));
        ASSERT_TRUE(Put(first - overlap, count).ok());
        first += count - overlap;
      }
      ASSERT_TRUE(Build(n).ok());
      tokens = n;
    }
    std::unique_ptr<SliceJob> job;
    for (int step = 0; step < 150 && !HasFailure(); ++step) {
      const uint32_t next = slice_->next_append();
      switch (rng() % 8) {
        case 0:
        case 1:
        case 2: {
          const auto back = static_cast<uint32_t>(rng() % 3);
          const auto count = static_cast<uint32_t>(1 + rng() % 20);
          ASSERT_TRUE(Append(next - std::min(back, next), count).ok());
          break;
        }
        case 3:
        case 4:
          ASSERT_TRUE(slice_->IndexPending(static_cast<uint32_t>(rng() % 30)).ok());
          break;
        case 5:
          if (job == nullptr) {
            auto prepared = slice_->PrepareRecluster();
            ASSERT_TRUE(prepared.ok()) << prepared.status().ToString();
            job = std::move(*prepared);
          } else {
            if (!job->done()) job->Run();
            ASSERT_TRUE(slice_->Install(std::move(job)).ok());
          }
          break;
        case 6:
          if (job != nullptr && !job->done()) job->Run();
          break;
        case 7:
          ASSERT_TRUE(Put(next, static_cast<uint32_t>(rng() % 30)).ok());
          break;
      }
      tokens = std::max(tokens, slice_->end());
      ExpectValid();
      ExpectNamesKeepTheirMeaning(&names);
      if (step % 10 == 0 && tokens > 0) ExpectFullAttention(tokens, 100000, rng());
    }
    ASSERT_TRUE(slice_->Seal().ok());
    if (job != nullptr && job->done()) {
      EXPECT_EQ(slice_->Install(std::move(job)).code(), StatusCode::kCancelled);
    }
    job.reset();
    ExpectValid();
    ExpectNamesKeepTheirMeaning(&names);
    ExpectNothingHeld();
  }
}

// Few pages, everything else in the residual: the oracle gives full attention at any budget.
class ExactSliceTest : public HeadSliceTest {
  PolicyKind Policy() const override { return PolicyKind::kExact; }
};
INSTANTIATE_TEST_SUITE_P(Exact, ExactSliceTest, testing::Values(PolicyKind::kExact), KindName);

TEST_P(ExactSliceTest, ResidualHoldsWhatThePagesDoNot) {
  ASSERT_TRUE(PutAndBuild(500).ok());
  ASSERT_TRUE(Append(476, 30).ok());
  for (const uint32_t max_pages : {0u, 1u, 3u, 12u, 1000u}) {
    SCOPED_TRACE(max_pages);
    ExpectFullAttention(506, max_pages, max_pages);
  }
  ASSERT_TRUE(slice_->IndexPending(20).ok());
  ExpectFullAttention(506, 3, 1);
  ASSERT_TRUE(Recluster().ok());
  ExpectFullAttention(506, 3, 2);
}

}  // namespace
}  // namespace icecache
