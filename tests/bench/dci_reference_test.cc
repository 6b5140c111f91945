// dci_tree is the paper's structure and not a straw man: with its defaults it covers
// what the reference covers (M-DCI, f32, 12 pages, one query, `clustered` trace:
// notes/index_design.md 3.1 and icecache.md 5.4).
#include <gtest/gtest.h>

#include "cacheserver/select/dci_tree.h"
#include "tests/bench/select_truth.h"

namespace icecache {
namespace {

struct Covered {
  double top16 = 0, top256 = 0;
};

Covered Measure(uint32_t keys, std::vector<uint64_t> seeds, const DciTreeOptions& options) {
  Covered mean;
  int count = 0;
  for (const uint64_t seed : seeds) {
    const Trace trace =
        MakeTrace({.name = "clustered", .keys = keys, .group = 1, .query_count = 100, .seed = seed})
            .value();
    auto policy = MakeDciTree({trace.dtype, trace.dim, seed}, options);
    PageStore store(trace.dtype, trace.dim);
    const TokenRows rows = trace.Rows(0, keys);
    EXPECT_TRUE(store.ApplyLayout(rows, policy->Build(rows, {}).value()).ok());
    SelectTruth truth(trace);
    Selection got;
    for (uint32_t q = 0; q < trace.query_count; ++q, ++count) {
      policy->Select({.queries = trace.Query(q), .group = 1, .max_pages = 12}, store.kv(), &got);
      truth.Assign(q, store);
      mean.top16 += truth.Coverage(0, 16, got.pages);
      mean.top256 += truth.Coverage(0, 256, got.pages);
    }
  }
  return {mean.top16 / count, mean.top256 / count};
}

// Bands: the reference's value +- .03, and .01 for the sampling error of 400 queries.
TEST(DciReference, CoversWhatTheReferenceCoversAt8k) {
  const Covered got = Measure(8192, {1, 4, 5, 6}, {});
  EXPECT_NEAR(got.top16, .828, .04);
  EXPECT_NEAR(got.top256, .111, .02);
}

TEST(DciReference, CoversWhatTheReferenceCoversAt32k) {
  const Covered got = Measure(32768, {1, 2, 3, 4}, {});
  EXPECT_NEAR(got.top16, .721, .04);
  EXPECT_NEAR(got.top256, .140, .02);
}

TEST(DciReference, CoversWhatTheReferenceCoversAt131k) {
  const Covered got = Measure(131072, {1}, {});
  EXPECT_NEAR(got.top16, .935, .04);
  EXPECT_NEAR(got.top256, .565, .04);
}

TEST(DciReference, ItsOwnWeaknessesExplainTheRest) {
  const Covered got = Measure(8192, {1, 2}, DciTreeOptions::Improved());
  EXPECT_GT(got.top16, .83);
  EXPECT_GT(got.top256, .115);
}

}  // namespace
}  // namespace icecache
