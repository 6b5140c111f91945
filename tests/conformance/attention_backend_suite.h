// Conformance suite of AttentionBackend: what every implementation must do, checked against the
// float64 reference. attention_backend_test.cc instantiates it.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <memory>
#include <ostream>
#include <string>
#include <vector>

#include "tests/conformance/attention_case.h"

namespace icecache {

struct BackendCase {
  std::string name;
  std::function<std::unique_ptr<AttentionBackend>()> make;
};
inline std::ostream& operator<<(std::ostream& out, const BackendCase& c) { return out << c.name; }

class AttentionBackendSuite : public testing::TestWithParam<BackendCase> {
 protected:
  void SetUp() override {
    if (backend_ == nullptr) GTEST_SKIP() << "no device for " << GetParam().name;
  }

  std::unique_ptr<AttentionBackend> backend_ = GetParam().make();  // null: not on this machine
  std::unique_ptr<AttentionBackend> reference_ = MakeReferenceAttention();
};

TEST_P(AttentionBackendSuite, PagesAndRowsEqualTheReferenceForEveryShape) {
  uint64_t seed = 1;
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const uint32_t dim : {64u, 80u, 96u, 128u, 256u}) {
      for (const uint32_t group : {1u, 2u, 4u, 6u, 8u, 16u}) {
        const uint32_t page_count = 1 + seed % 7;
        SCOPED_TRACE(testing::Message()
                     << "seed " << seed << " " << DTypeName(dtype) << " head_dim " << dim
                     << " group " << group << " pages " << page_count);
        const AttentionCase c(seed++, dtype, dim, group, page_count, 3.0f);
        AttentionStates by_page(group, dim), by_row(group, dim), expected(group, dim);
        backend_->AttendPages(c.queries.data(), c.kv, c.ids, by_page.ref());
        backend_->AttendRows(c.queries.data(), c.rows, by_row.ref());
        reference_->AttendRows(c.queries.data(), c.rows, expected.ref());
        ExpectStatesNear(by_page, expected, 2e-5f);
        ExpectStatesNear(by_row, expected, 2e-5f);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(AttentionBackendSuite, CallsAddUpInAnyOrderAndSplit) {
  for (uint64_t seed = 100; seed < 110; ++seed) {
    SCOPED_TRACE(seed);
    const AttentionCase c(seed, DType::kF16, 128, 4, 23, seed % 2 == 0 ? 3.0f : 30.0f);
    AttentionStates expected(4, 128), pieces(4, 128);
    reference_->AttendRows(c.queries.data(), c.rows, expected.ref());
    std::vector<PageId> ids = c.ids;
    std::mt19937_64 rng(seed);
    std::shuffle(ids.begin(), ids.end(), rng);
    for (size_t at = 0; at < ids.size();) {
      const size_t count = std::min<size_t>(ids.size() - at, 1 + rng() % 6);
      if (rng() % 2 == 0) {  // straight into the sum
        backend_->AttendPages(c.queries.data(), c.kv, {ids.data() + at, count}, pieces.ref());
      } else {  // as a term that is merged
        AttentionStates term(4, 128);
        backend_->AttendPages(c.queries.data(), c.kv, {ids.data() + at, count}, term.ref());
        MergeStates(term.ref(), pieces.ref());
      }
      at += count;
    }
    ExpectStatesNear(pieces, expected, 1e-4f);
  }
}

// What is started piece by piece, with other states and sizes between, is there after one Finish;
// what the caller did to queries and rows meanwhile does not matter.
TEST_P(AttentionBackendSuite, FinishAddsAllThatWasStarted) {
  AttentionCase c(111, DType::kF16, 64, 4, 9, 3.0f), other(112, DType::kBF16, 128, 2, 30, 3.0f);
  AttentionStates expected(4, 64), expected_other(2, 128), actual(4, 64), actual_other(2, 128);
  reference_->AttendRows(c.queries.data(), c.rows, expected.ref());
  reference_->AttendRows(other.queries.data(), other.rows, expected_other.ref());
  for (size_t at = 0; at < c.ids.size(); at += 3) {
    const AttentionItem item{
        c.queries.data(), actual.ref(), {}, c.kv, std::span(c.ids).subspan(at, 3)};
    ASSERT_TRUE(backend_->Start({&item, 1}).ok());
    if (at != 3) continue;
    const AttentionItem rows{other.queries.data(), actual_other.ref(), other.rows, {}, {}};
    ASSERT_TRUE(backend_->Start({&rows, 1}).ok());
    ASSERT_TRUE(backend_->Start({}).ok());
  }
  std::fill(c.queries.begin(), c.queries.end(), 1e9f);
  std::fill(other.k.begin(), other.k.end(), std::byte{0x7f});
  ASSERT_TRUE(backend_->Finish().ok());
  ExpectStatesNear(actual, expected, 1e-4f);
  ExpectStatesNear(actual_other, expected_other, 1e-4f);
  ASSERT_TRUE(backend_->Finish().ok());  // nothing is started any more
  ExpectStatesNear(actual, expected, 1e-4f);
}

// What a layer step does: windows first, pages as they come, some of it for states that are not
// asked for in the end, and what the states hold already.
TEST_P(AttentionBackendSuite, FinishToWritesTheResultOfAllTerms) {
  const uint32_t dim = 64, group = 4;
  for (int round = 0; round < 2; ++round) {
    SCOPED_TRACE(round);
    const AttentionCase a(120, DType::kF16, dim, group, 24, 3.0f),
        b(121, DType::kF16, dim, group, 5, 9.0f), rest(122, DType::kF16, dim, group, 3, 3.0f);
    AttentionStates both(2 * group, dim), dropped(group, dim), empty(3, dim);
    AttentionStates expected(2 * group, dim);
    const auto half = [&](AttentionStates& states, uint32_t first) {
      const AttentionStateRef all = states.ref();
      return AttentionStateRef{group, dim, all.max + first, all.denom + first, all.row(first)};
    };
    for (AttentionStates* states : {&both, &expected}) {  // a residual: the first group has one
      reference_->AttendRows(a.queries.data(), rest.rows, half(*states, 0));
    }
    reference_->AttendRows(a.queries.data(), a.rows, half(expected, 0));
    reference_->AttendRows(b.queries.data(), b.rows, half(expected, group));
    const std::vector<AttentionItem> local = {
        {b.queries.data(), half(both, group), {}, b.kv, std::span(b.ids).first(2)},
        {a.queries.data(), dropped.ref(), a.rows, {}, {}}};
    const std::vector<AttentionItem> came = {
        {b.queries.data(), half(both, group), {}, b.kv, std::span(b.ids).subspan(2)},
        {a.queries.data(), half(both, 0), {}, a.kv, a.ids}};
    ASSERT_TRUE(backend_->Start(local).ok());
    ASSERT_TRUE(backend_->Start(came).ok());
    std::vector<float> out(2 * group * dim), none(3 * dim, 7.0f), truth(out.size());
    const std::vector<AttentionResult> results = {{empty.ref(), none.data()},
                                                  {both.ref(), out.data()}};
    ASSERT_TRUE(backend_->FinishTo(results).ok());
    FinishStates(expected.ref(), truth.data());
    for (size_t i = 0; i < out.size(); ++i) ASSERT_NEAR(out[i], truth[i], 2e-5f) << i;
    for (const float x : none) ASSERT_EQ(x, 0.0f);
    ASSERT_TRUE(backend_->FinishTo({&results[0], 1}).ok());  // nothing is left over
    for (const float x : none) ASSERT_EQ(x, 0.0f);
  }
}

TEST_P(AttentionBackendSuite, EmptySetsChangeNothing) {
  const AttentionCase c(7, DType::kBF16, 64, 2, 3, 1.0f);
  AttentionStates states(2, 64);
  TokenRows none = c.rows;
  none.count = 0;
  backend_->AttendRows(c.queries.data(), none, states.ref());
  backend_->AttendPages(c.queries.data(), c.kv, {}, states.ref());
  EXPECT_EQ(states.ref().denom[0], 0.0f);
  EXPECT_EQ(states.ref().max[1], kEmptyMax);
  backend_->AttendRows(c.queries.data(), c.rows, states.ref());
  const std::vector<float> before(states.flat().begin(), states.flat().end());
  backend_->AttendRows(c.queries.data(), none, states.ref());
  backend_->AttendPages(c.queries.data(), c.kv, {}, states.ref());
  EXPECT_TRUE(std::equal(before.begin(), before.end(), states.flat().begin()));
}

TEST_P(AttentionBackendSuite, HugeLogitsPickTheLargest) {
  for (const float scale : {300.0f, 3e4f, 1e8f}) {
    SCOPED_TRACE(scale);
    const AttentionCase c(31, DType::kF32, 128, 4, 9, scale);
    AttentionStates actual(4, 128), expected(4, 128);
    backend_->AttendPages(c.queries.data(), c.kv, c.ids, actual.ref());
    reference_->AttendRows(c.queries.data(), c.rows, expected.ref());
    // One token wins outright; rounding of logits of 1e9 must not matter to the output.
    ExpectStatesNear(actual, expected, 2e-3f);
  }
}

TEST_P(AttentionBackendSuite, OverflowingLogitsStayFinite) {
  const uint32_t dim = 64;
  std::vector<float> k(3 * dim, 3e38f), v(3 * dim, 1.0f), q(dim, 3e38f), out(dim);
  for (uint32_t j = 0; j < dim; ++j) k[dim + j] = j % 2 == 0 ? 3e38f : -3e38f;
  const TokenRows rows{DType::kF32, dim, 3, reinterpret_cast<const std::byte*>(k.data()),
                       reinterpret_cast<const std::byte*>(v.data())};
  AttentionStates states(1, dim);
  backend_->AttendRows(q.data(), rows, states.ref());
  FinishStates(states.ref(), out.data());
  for (const float x : out) EXPECT_NEAR(x, 1.0f, 1e-5f);
}

TEST_P(AttentionBackendSuite, ZeroQueryAveragesTheValues) {
  const AttentionCase c(5, DType::kF16, 96, 1, 5, 0.0f);
  AttentionStates states(1, 96);
  backend_->AttendPages(c.queries.data(), c.kv, c.ids, states.ref());
  std::vector<float> out(96), v(size_t{c.rows.count} * 96);
  FinishStates(states.ref(), out.data());
  ToF32(c.rows.v, c.dtype, v.size(), v.data());
  for (uint32_t j = 0; j < 96; ++j) {
    double mean = 0;
    for (uint32_t r = 0; r < c.rows.count; ++r) mean += v[size_t{r} * 96 + j];
    EXPECT_NEAR(out[j], mean / c.rows.count, 1e-5);
  }
  EXPECT_NEAR(LogSumExp(states.ref(), 0), std::log(static_cast<float>(c.rows.count)), 1e-5);
}

}  // namespace icecache
