// Attention on every device beyond what the AttentionBackend suite asks: batches of ragged tasks,
// shares of one list, causal tiles, merges of many terms.
#include <algorithm>
#include <cmath>
#include <random>

#include "kernels/attention.h"
#include "kernels/gpu/attention_gpu.h"
#include "tests/conformance/attention_case.h"
#include "tests/conformance/device_suite.h"

namespace icecache::gpu {
namespace {

class DeviceAttentionSuite : public DeviceSuite {
 protected:
  // The pages of a case on the device.
  std::vector<PageView> UploadPages(const AttentionCase& c) {
    const std::byte* const k = Upload(c.k);
    const std::byte* const v = Upload(c.v);
    std::vector<PageView> pages;
    for (const PageView& page : c.views) {
      pages.push_back({k + (page.k - c.k.data()), v + (page.v - c.v.data()), page.fill});
    }
    return pages;
  }
  AttentionStates DownloadStates(const float* states, uint32_t heads, uint32_t dim) {
    AttentionStates result(heads, dim);
    const auto flat = Download(states, AttentionStates::FlatFloats(heads, dim));
    std::copy(flat.begin(), flat.end(), result.flat().begin());
    return result;
  }
};

// Sequences of different lengths (also none) in one launch, their pages shared out among blocks,
// and the shares merged into result and state.
TEST_P(DeviceAttentionSuite, RaggedBatchIsSharedOutAndMerged) {
  const uint32_t dim = 128, group = 4, heads = 5 * group;
  std::vector<float> queries;
  std::vector<PageView> pages;
  std::vector<AttendTask> tasks;
  AttentionStates expected(heads, dim);
  uint64_t seed = 900;
  for (const uint32_t count : {1u, 40u, 0u, 7u, 23u}) {
    const AttentionCase c(seed++, DType::kBF16, dim, group, std::max(1u, count), 3.0f);
    AttendTask task;
    task.head = static_cast<uint32_t>(tasks.size()) * group;
    task.rows = group;
    task.page_begin = static_cast<uint32_t>(pages.size());
    if (count > 0) {
      for (const PageView& page : UploadPages(c)) pages.push_back(page);
      const AttentionStateRef all = expected.ref();
      MakeReferenceAttention()->AttendRows(
          c.queries.data(), c.rows,
          {group, dim, all.max + task.head, all.denom + task.head, all.row(task.head)});
    }
    task.page_end = static_cast<uint32_t>(pages.size());
    tasks.push_back(task);
    queries.insert(queries.end(), c.queries.begin(), c.queries.end());
  }
  const size_t floats = AttentionStates::FlatFloats(heads, dim);
  for (const uint32_t splits : {1u, 3u, 11u}) {
    SCOPED_TRACE(splits);
    AttendArgs args;
    args.queries = Upload(queries);
    args.pages = Upload(pages);
    args.tasks = Upload(tasks);
    args.states = Room<float>(splits * floats);
    args.dtype = DType::kBF16;
    args.task_count = static_cast<uint32_t>(tasks.size());
    args.heads = heads;
    args.group = group;
    args.query_heads = group;
    args.head_dim = dim;
    args.splits = splits;
    device_->Launch(args);
    MergeArgs merge;
    merge.terms[0] = {args.states, splits};
    merge.term_count = 1;
    merge.heads = heads;
    merge.head_dim = dim;
    merge.state = Room<float>(floats);
    merge.result = Room<float>(size_t{heads} * dim);
    device_->Launch(merge);
    AttentionStates actual = DownloadStates(merge.state, heads, dim);
    ExpectStatesNear(actual, expected, 2e-5f);
    std::vector<float> out(size_t{heads} * dim);
    FinishStates(expected.ref(), out.data());
    const std::vector<float> result = Download(merge.result, out.size());
    for (size_t i = 0; i < out.size(); ++i) ASSERT_NEAR(result[i], out[i], 2e-5f) << i;
  }
}

TEST_P(DeviceAttentionSuite, AddsToWhatTheStatesHold) {
  for (const DType dtype : {DType::kF16, DType::kF32}) {
    SCOPED_TRACE(DTypeName(dtype));
    const AttentionCase a(50, dtype, 64, 2, 3, 3.0f), b(51, dtype, 64, 2, 9, 30.0f);
    AttentionStates expected(2, 64);
    const auto reference = MakeReferenceAttention();
    reference->AttendRows(a.queries.data(), a.rows, expected.ref());
    reference->AttendRows(a.queries.data(), b.rows, expected.ref());
    AttendArgs args;
    args.queries = Upload(a.queries);
    args.states = Room<float>(AttentionStates::FlatFloats(2, 64));
    args.dtype = dtype;
    args.task_count = 1;
    args.heads = args.group = args.query_heads = 2;
    args.head_dim = 64;
    for (const AttentionCase* c : {&a, &b}) {
      const std::vector<PageView> pages = UploadPages(*c);
      args.pages = Upload(pages);
      args.tasks = Upload(
          std::vector<AttendTask>{{0, 2, 0, static_cast<uint32_t>(pages.size()), kAllVisible}});
      device_->Launch(args);
      args.add = true;
    }
    AttentionStates actual = DownloadStates(args.states, 2, 64);
    ExpectStatesNear(actual, expected, 2e-5f);
  }
}

// Prefill: tiles of several tokens, each of which sees one key more than the one before.
TEST_P(DeviceAttentionSuite, CausalTilesSeeNoFuture) {
  for (const DType dtype : {DType::kF16, DType::kF32}) {
    SCOPED_TRACE(DTypeName(dtype));
    const uint32_t dim = 64, group = 3, kv_heads = 2, query_heads = 6, past = 21, tokens = 13;
    const uint32_t total = past + tokens, page_count = (total + 15) / 16;
    std::vector<PageView> pages;
    std::vector<AttentionCase> heads;
    for (uint32_t h = 0; h < kv_heads; ++h) {
      AttentionCase c(60 + h, dtype, dim, group, 64, 1.0f);
      ASSERT_GE(c.rows.count, page_count * 16);
      const std::byte* const k = Upload(c.k);
      const std::byte* const v = Upload(c.v);
      for (uint32_t p = 0; p < page_count; ++p) {
        const size_t at = p * 16 * c.rows.row_bytes();
        pages.push_back({k + at, v + at, std::min(16u, total - p * 16)});
      }
      heads.push_back(std::move(c));
    }
    std::mt19937_64 rng(61);
    std::normal_distribution<float> normal;
    std::vector<float> queries(size_t{tokens} * query_heads * dim);
    for (float& q : queries) q = 3.0f * normal(rng) / 8;
    const uint32_t tile = kTaskRows / group;
    std::vector<AttendTask> tasks;
    for (uint32_t h = 0; h < kv_heads; ++h) {
      for (uint32_t t = 0; t < tokens; t += tile) {
        const uint32_t count = std::min(tile, tokens - t);
        const uint32_t seen = (past + t + count + 15) / 16;
        tasks.push_back({t * query_heads + h * group, count * group, h * page_count,
                         h * page_count + seen, past + t + 1});
      }
    }
    AttendArgs args;
    args.queries = Upload(queries);
    args.pages = Upload(pages);
    args.tasks = Upload(tasks);
    args.heads = tokens * query_heads;
    args.states = Room<float>(AttentionStates::FlatFloats(args.heads, dim));
    args.dtype = dtype;
    args.task_count = static_cast<uint32_t>(tasks.size());
    args.group = group;
    args.query_heads = query_heads;
    args.head_dim = dim;
    device_->Launch(args);
    AttentionStates actual = DownloadStates(args.states, args.heads, dim);
    AttentionStates expected(args.heads, dim);
    const auto reference = MakeReferenceAttention();
    for (uint32_t t = 0; t < tokens; ++t) {
      for (uint32_t h = 0; h < kv_heads; ++h) {
        const uint32_t head = t * query_heads + h * group;
        const AttentionStateRef all = expected.ref();
        TokenRows rows = heads[h].rows;
        rows.count = past + t + 1;
        reference->AttendRows(queries.data() + size_t{head} * dim, rows,
                              {group, dim, all.max + head, all.denom + head, all.row(head)});
      }
    }
    ExpectStatesNear(actual, expected, 2e-5f);
  }
}

TEST_P(DeviceAttentionSuite, MergeTakesTermsOfAllKinds) {
  const uint32_t heads = 6, dim = 80;
  const size_t floats = AttentionStates::FlatFloats(heads, dim);
  std::mt19937_64 rng(77);
  std::normal_distribution<float> normal;
  AttentionStates expected(heads, dim);
  std::vector<float> first, second;
  for (uint32_t i = 0; i < 5; ++i) {
    AttentionStates term(heads, dim);
    for (uint32_t h = 0; h < heads; ++h) {
      if ((h + i) % 3 == 0 || h == 5) continue;  // empty; head 5 in every term
      term.ref().max[h] = 40 * normal(rng);
      term.ref().denom[h] = 0.1f + std::abs(normal(rng));
      for (uint32_t j = 0; j < dim; ++j) term.ref().row(h)[j] = normal(rng);
    }
    MergeStates(term.ref(), expected.ref());
    auto& to = i < 3 ? first : second;
    to.insert(to.end(), term.flat().begin(), term.flat().end());
  }
  MergeArgs args;
  args.terms[0] = {Upload(first), 3};
  float* const last = Upload(second);
  args.terms[1] = {last, 2};
  args.term_count = 2;
  args.heads = heads;
  args.head_dim = dim;
  args.state = last;  // in place of a term
  args.result = Room<float>(size_t{heads} * dim);
  device_->Launch(args);
  AttentionStates actual = DownloadStates(last, heads, dim);
  ExpectStatesNear(actual, expected, 1e-5f);
  ASSERT_EQ(actual.flat().size(), floats);
  const auto result = Download(args.result, size_t{heads} * dim);
  for (uint32_t j = 0; j < dim; ++j) EXPECT_EQ(result[5 * dim + j], 0.0f);
}

INSTANTIATE_DEVICES(DeviceAttentionSuite);

TEST(SplitsFor, KeepsTheDeviceBusyWithoutTinyShares) {
  EXPECT_EQ(SplitsFor(132, 256, 16), 1u);   // a batch fills the device by itself
  EXPECT_EQ(SplitsFor(132, 8, 16), 2u);     // one sequence at budget 256: not below 8 pages each
  EXPECT_EQ(SplitsFor(132, 8, 2048), 33u);  // a long list: two blocks per processor
  EXPECT_EQ(SplitsFor(132, 1, 1u << 16), 64u);
  EXPECT_EQ(SplitsFor(132, 8, 0), 1u);
}

}  // namespace
}  // namespace icecache::gpu
