// The calibrated trace is only worth something while it looks like attention: these bands are the
// targets of notes/sparse.md section 4 (the numbers in the names), and a change that leaves one
// fails here.
#include "tests/bench/trace.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <numeric>
#include <set>

#include "kernels/distance.h"
#include "worker/trace_file.h"

namespace icecache {
namespace {

Trace Make(const std::string& name, uint32_t keys, uint32_t queries = 24) {
  Result<Trace> trace = MakeTrace({.name = name, .keys = keys, .query_count = queries, .seed = 5});
  EXPECT_TRUE(trace.ok()) << trace.status().ToString();
  return std::move(trace).value();
}

std::vector<float> Keys(const Trace& trace, uint32_t first, uint32_t count) {
  std::vector<float> keys(size_t{count} * trace.dim);
  ToF32(trace.Rows(first, count).k, trace.dtype, keys.size(), keys.data());
  return keys;
}

double Cosine(const float* a, const float* b, uint32_t dim) {
  double ab = 0, aa = 0, bb = 0;
  for (uint32_t j = 0; j < dim; ++j) {
    ab += a[j] * b[j];
    aa += a[j] * a[j];
    bb += b[j] * b[j];
  }
  return ab / std::sqrt(aa * bb);
}

// Share of the variance in the `top` largest principal components, by Jacobi rotations.
double VarianceShare(const std::vector<float>& rows, uint32_t dim, uint32_t top) {
  const size_t count = rows.size() / dim;
  std::vector<double> mean(dim), a(size_t{dim} * dim);
  for (size_t r = 0; r < count; ++r)
    for (uint32_t j = 0; j < dim; ++j) mean[j] += rows[r * dim + j] / static_cast<double>(count);
  for (size_t r = 0; r < count; ++r)
    for (uint32_t i = 0; i < dim; ++i)
      for (uint32_t j = 0; j < dim; ++j)
        a[i * dim + j] += (rows[r * dim + i] - mean[i]) * (rows[r * dim + j] - mean[j]);
  for (int sweep = 0; sweep < 6; ++sweep) {
    for (uint32_t p = 0; p < dim; ++p) {
      for (uint32_t q = p + 1; q < dim; ++q) {
        if (std::abs(a[p * dim + q]) < 1e-12) continue;
        const double theta = (a[q * dim + q] - a[p * dim + p]) / (2 * a[p * dim + q]);
        const double t = (theta >= 0 ? 1 : -1) / (std::abs(theta) + std::sqrt(theta * theta + 1));
        const double c = 1 / std::sqrt(t * t + 1), s = t * c;
        for (uint32_t k = 0; k < dim; ++k) {
          const double x = a[k * dim + p], y = a[k * dim + q];
          a[k * dim + p] = c * x - s * y;
          a[k * dim + q] = s * x + c * y;
        }
        for (uint32_t k = 0; k < dim; ++k) {
          const double x = a[p * dim + k], y = a[q * dim + k];
          a[p * dim + k] = c * x - s * y;
          a[q * dim + k] = s * x + c * y;
        }
      }
    }
  }
  std::vector<double> values;
  for (uint32_t i = 0; i < dim; ++i) values.push_back(a[i * dim + i]);
  std::sort(values.begin(), values.end(), std::greater<>());
  return std::accumulate(values.begin(), values.begin() + top, 0.0) /
         std::accumulate(values.begin(), values.end(), 0.0);
}

TEST(CalibratedTrace, Target3TopMassOfEveryClassIsInItsBand) {
  struct Band {
    const char* head;
    double low, high;
  };
  for (const Band& band :
       {Band{"retrieval", .95, 1.0}, Band{"sinky", .95, 1.0}, Band{"topic", .8, .95},
        Band{"broad", .5, .8}, Band{"diffuse", .1, .5}}) {
    const double mass = TopMass(Make(std::string("calibrated:") + band.head, 32768), 256, 24);
    EXPECT_GE(mass, band.low - 0.02) << band.head;
    EXPECT_LE(mass, band.high) << band.head;
  }
}

constexpr const char* kClasses[] = {"retrieval", "sinky", "topic", "broad", "diffuse"};

// Targets that every head class must meet, whatever its queries look for.
class CalibratedClass : public testing::TestWithParam<const char*> {
 protected:
  std::string name() const { return std::string("calibrated:") + GetParam(); }
};
INSTANTIATE_TEST_SUITE_P(All, CalibratedClass, testing::ValuesIn(kClasses),
                         [](const auto& param) { return std::string(param.param); });

TEST_P(CalibratedClass, Target5KeysAreLowRankBeforeRopeAndFlatterAfter) {
  const Trace trace = Make(name(), 4096, 8);
  const double before = VarianceShare(trace.keys_before_rope, trace.dim, 32);
  const double after = VarianceShare(Keys(trace, 0, 2048), trace.dim, 32);
  EXPECT_GT(before, 0.85);
  EXPECT_LT(after, before - 0.02);
}

TEST_P(CalibratedClass, Target6NeighbouringKeysAreAlike) {
  const Trace trace = Make(name(), 8192, 8);
  const std::vector<float> keys = Keys(trace, 0, 8192);
  double sum = 0;
  std::vector<float> mean(trace.dim);
  for (uint32_t chunk = 0; chunk < 1024; ++chunk) {
    std::fill(mean.begin(), mean.end(), 0.0f);
    for (uint32_t t = 0; t < 8; ++t)
      for (uint32_t j = 0; j < trace.dim; ++j) mean[j] += keys[(chunk * 8 + t) * trace.dim + j] / 8;
    double least = 1;
    for (uint32_t t = 0; t < 8; ++t)
      least = std::min(least, Cosine(&keys[(chunk * 8 + t) * trace.dim], mean.data(), trace.dim));
    sum += least / 1024;
  }
  EXPECT_GT(sum, 0.78);
  EXPECT_LT(sum, 0.96);
}

TEST_P(CalibratedClass, Target8QueriesPointAwayFromTheMeanKey) {
  const Trace trace = Make(name(), 8192);
  const std::vector<float> keys = Keys(trace, 0, trace.keys);
  std::vector<float> mean(trace.dim, 0.0f);
  for (size_t i = 0; i < keys.size(); ++i)
    mean[i % trace.dim] += keys[i] / static_cast<float>(trace.keys);
  double sum = 0;
  const uint32_t rows = trace.query_count * trace.group;
  for (uint32_t r = 0; r < rows; ++r)
    sum += Cosine(&trace.queries[size_t{r} * trace.dim], mean.data(), trace.dim) / rows;
  EXPECT_GT(sum, -0.6);
  EXPECT_LT(sum, 0.1);
  // A key, taken for a query, looks at its own cone instead.
  double own = 0;
  for (uint32_t t = 0; t < 500; ++t)
    own += Cosine(&keys[size_t{t} * trace.dim], mean.data(), trace.dim) / 500;
  EXPECT_GT(own, 0.5);
}

TEST(CalibratedTrace, Target9AttentionMovesSlowlyWithJumps) {
  const Trace trace = Make("calibrated:topic", 32768, 40);
  double cosine = 0, reuse = 0;
  std::vector<float> scores(size_t{trace.group} * trace.keys), chunk(trace.keys / 8);
  std::set<uint32_t> previous;
  double least_cosine = 1;
  for (uint32_t q = 0; q < trace.query_count; ++q) {
    DotRows(trace.Query(q), 1, trace.k.data(), trace.dtype, trace.keys, trace.dim, scores.data(),
            trace.keys);
    for (size_t c = 0; c < chunk.size(); ++c) chunk[c] = MaxOf(scores.data() + 8 * c, 8);
    std::vector<uint32_t> order(chunk.size());
    std::iota(order.begin(), order.end(), 0u);
    std::nth_element(order.begin(), order.begin() + 256, order.end(),
                     [&](uint32_t a, uint32_t b) { return chunk[a] > chunk[b]; });
    std::set<uint32_t> now(order.begin(), order.begin() + 256);
    if (q > 0) {
      const double c = Cosine(trace.Query(q), trace.Query(q - 1), trace.dim);
      cosine += c / (trace.query_count - 1);
      least_cosine = std::min(least_cosine, c);
      for (const uint32_t i : now) reuse += previous.count(i) / 256.0 / (trace.query_count - 1);
    }
    previous = std::move(now);
  }
  EXPECT_GT(cosine, 0.65);
  EXPECT_LT(cosine, 0.95);
  EXPECT_LT(least_cosine, 0.6) << "no jump at all";
  EXPECT_GT(reuse, 0.45);
  EXPECT_LT(reuse, 0.82);
}

TEST(CalibratedTrace, Target12HeadsOfAGroupDisagreeInPart) {
  const Trace trace = Make("calibrated:topic", 32768);
  std::vector<float> scores(size_t{trace.group} * trace.keys);
  double overlap = 0;
  int pairs = 0;
  for (uint32_t q = 0; q < trace.query_count; ++q) {
    DotRows(trace.Query(q), trace.group, trace.k.data(), trace.dtype, trace.keys, trace.dim,
            scores.data(), trace.keys);
    std::vector<std::set<uint32_t>> top;
    for (uint32_t h = 0; h < trace.group; ++h) {
      const float* x = scores.data() + size_t{h} * trace.keys;
      std::vector<uint32_t> order(trace.keys);
      std::iota(order.begin(), order.end(), 0u);
      std::nth_element(order.begin(), order.begin() + 256, order.end(),
                       [x](uint32_t a, uint32_t b) { return x[a] > x[b]; });
      top.emplace_back(order.begin(), order.begin() + 256);
    }
    for (uint32_t a = 0; a < trace.group; ++a)
      for (uint32_t b = 0; b < a; ++b, ++pairs)
        for (const uint32_t t : top[a]) overlap += top[b].count(t) / 256.0;
  }
  overlap /= pairs;
  EXPECT_GT(overlap, 0.25);
  EXPECT_LT(overlap, 0.75);
}

TEST(Trace, EqualSpecsGiveEqualTraces) {
  for (const char* name : {"clustered", "runs", "weak", "calibrated:broad"}) {
    const Trace a = Make(name, 2048, 4), b = Make(name, 2048, 4);
    EXPECT_EQ(a.k, b.k);
    EXPECT_EQ(a.queries, b.queries);
    EXPECT_EQ(a.local_lse, b.local_lse);
  }
}

TEST(CalibratedTrace, QueriesFollowTheTextAsItGrows) {
  TraceSpec spec{.name = "calibrated:topic", .keys = 4096, .extra_keys = 1024, .query_count = 64,
                 .seed = 5, .follow = true, .drift = 0.5};
  Result<Trace> trace = MakeTrace(spec);
  ASSERT_TRUE(trace.ok()) << trace.status().ToString();
  ASSERT_EQ(trace->asked_after.size(), 64u);
  EXPECT_EQ(trace->asked_after.front(), 4096u + 16);
  EXPECT_EQ(trace->asked_after.back(), 4096u + 1024);
  // Attention goes to what was added, and more so the more there is of it.
  std::vector<float> scores(size_t{trace->group} * 5120);
  double early = 0, late = 0;
  for (uint32_t q = 0; q < 64; ++q) {
    const uint32_t tokens = trace->asked_after[q];
    DotRows(trace->Query(q), trace->group, trace->k.data(), trace->dtype, tokens, trace->dim,
            scores.data(), tokens);
    for (uint32_t h = 0; h < trace->group; ++h) {
      float* x = scores.data() + size_t{h} * tokens;
      const double all = ExpShifted(x, tokens, MaxOf(x, tokens), x);
      const double added = std::accumulate(x + 4096, x + tokens, 0.0) / all;
      (q < 32 ? early : late) += added / 32 / trace->group;
    }
  }
  EXPECT_GT(early, 0.05);
  EXPECT_GT(late, early);
  EXPECT_LT(late, 0.9);
  EXPECT_NEAR(TopMass(*trace, 256, 64), 0.9, 0.15) << "over the first keys alone";
  spec.name = "clustered";
  spec.follow = true;
  spec.extra_keys = 10;
  EXPECT_EQ(MakeTrace(spec).status().code(), StatusCode::kInvalidArgument);
}

TEST(Trace, ClusteredQueriesOfAGroupShareTheirCluster) {
  const Trace trace = Make("clustered", 8192);
  const Result<Trace> apart =
      MakeTrace({.name = "clustered", .keys = 8192, .seed = 5, .group_spread = 1});
  ASSERT_TRUE(apart.ok());
  EXPECT_GT(Cosine(trace.Query(0), trace.Query(0) + trace.dim, trace.dim), 0.4);
  EXPECT_LT(Cosine(apart->Query(0), apart->Query(0) + trace.dim, trace.dim), 0.4);
}

// Two layers of two heads with two query heads each; every element says where it belongs.
struct Dump {
  static constexpr uint32_t kTokens = 200, kQueries = 48, kDim = 16;
  TraceExtent extent{{2, 2, 4, kDim, DType::kF32}, kTokens, kQueries};
  std::string path = testing::TempDir() + "/trace_test.ickv";

  static float Key(uint32_t slice, uint32_t token, uint32_t j) {
    return std::sin(static_cast<float>(slice * 1000 + token * 3 + j));
  }
  void Write() const {
    Result<TraceWriter> writer = TraceWriter::Create(path, extent);
    ASSERT_TRUE(writer.ok()) << writer.status().ToString();
    for (uint16_t slice = 0; slice < 4; ++slice) {
      std::vector<float> k, v, q;
      for (uint32_t t = 0; t < kTokens; ++t) {
        for (uint32_t j = 0; j < kDim; ++j) k.push_back(Key(slice, t, j));
        for (uint32_t j = 0; j < kDim; ++j) v.push_back(Key(slice, t, 100 + j));
        for (uint32_t j = 0; j < 2 * kDim; ++j) q.push_back(Key(slice, t, 200 + j));
      }
      const TokenRows rows{DType::kF32, kDim, kTokens, reinterpret_cast<const std::byte*>(k.data()),
                           reinterpret_cast<const std::byte*>(v.data())};
      const LayerId layer(slice / 2);
      const KvHeadId head(slice % 2);
      ASSERT_TRUE(writer->WriteRows(layer, head, TokenPos(0), rows).ok());
      ASSERT_TRUE(writer->WriteQueries(layer, head, TokenPos(0), q).ok());
    }
    ASSERT_TRUE(writer->Finish().ok());
  }
  ~Dump() { std::remove(path.c_str()); }
};

TEST(Trace, DumpsAreAskedTokenByToken) {
  const Dump dump;
  dump.Write();
  const Result<Trace> trace = MakeTrace({.name = "file:" + dump.path + "@1.0", .keys = 100,
                                         .extra_keys = 8, .query_count = 8, .follow = true});
  ASSERT_TRUE(trace.ok()) << trace.status().ToString();
  EXPECT_EQ(trace->keys, 100u);
  EXPECT_EQ(trace->extra_keys, 7u);
  EXPECT_EQ(trace->asked_after.front(), 100u);
  EXPECT_EQ(trace->asked_after.back(), 107u);
  // The first query is that of token 192; its window begins at 177, its keys end before it.
  const auto* k = reinterpret_cast<const float*>(trace->k.data());
  EXPECT_EQ(k[0], Dump::Key(2, 77, 0));
  EXPECT_EQ(k[size_t{106} * Dump::kDim], Dump::Key(2, 183, 0));
  EXPECT_EQ(trace->Query(0)[0], Dump::Key(2, 192, 200));
}

TEST(Trace, DumpsAreReadSliceBySlice) {
  const Dump dump;
  dump.Write();
  const Result<Trace> trace =
      MakeTrace({.name = "file:" + dump.path + "@1.0", .keys = 1000, .query_count = 8});
  ASSERT_TRUE(trace.ok()) << trace.status().ToString();
  EXPECT_EQ(trace->group, 2u);
  // 16 sinks, then what lies before the 16 tokens that end with the first of the 8 asked.
  EXPECT_EQ(trace->keys, Dump::kTokens - 8 + 1 - 16 - 16);
  const auto* k = reinterpret_cast<const float*>(trace->Rows(3, 1).k);
  EXPECT_EQ(k[5], Dump::Key(2, 16 + 3, 5));
  EXPECT_EQ(trace->Query(7)[0], Dump::Key(2, Dump::kTokens - 1, 200));
  EXPECT_EQ(trace->energy.size(), Dump::kDim);

  const Result<Trace> few =
      MakeTrace({.name = "file:" + dump.path, .keys = 40, .extra_keys = 10, .query_count = 8});
  ASSERT_TRUE(few.ok());
  EXPECT_EQ(few->keys + few->extra_keys, 50u);
  const auto* last = reinterpret_cast<const float*>(few->Rows(49, 1).k);
  EXPECT_EQ(last[0], Dump::Key(0, Dump::kTokens - 8 + 1 - 16 - 1, 0)) << "the last ones count";
}

// Indexed and local tokens together are everything the query sees: with all of both, attention is
// full.
TEST(Trace, DumpsLeaveTheWorkersTokensToTheWorker) {
  const Dump dump;
  dump.Write();
  const Result<Trace> trace = MakeTrace({.name = "file:" + dump.path + "@0.1", .query_count = 8});
  ASSERT_TRUE(trace.ok());
  const uint32_t asked = 3, position = Dump::kTokens - 8 + asked;
  for (uint32_t h = 0; h < 2; ++h) {
    const float* q = trace->Query(asked) + h * Dump::kDim;
    double indexed = 0, all = 0;
    for (uint32_t t = 0; t <= position; ++t) {
      double logit = 0;
      for (uint32_t j = 0; j < Dump::kDim; ++j) logit += q[j] * Dump::Key(1, t, j);
      all += std::exp(logit);
      if (t >= 16 && t < 16 + trace->keys) indexed += std::exp(logit);
    }
    const double local = std::exp(trace->local_lse[asked * 2 + h]);
    EXPECT_NEAR((local + indexed) / all, 1.0, 1e-4);
  }
}

TEST(Trace, WhatIsNoDumpIsRefusedByName) {
  const Dump dump;
  EXPECT_EQ(MakeTrace({.name = "file:" + dump.path}).status().code(), StatusCode::kNotFound);
  dump.Write();
  EXPECT_EQ(MakeTrace({.name = "file:" + dump.path + "@2.0"}).status().code(),
            StatusCode::kOutOfRange);
  EXPECT_EQ(MakeTrace({.name = "file:" + dump.path, .query_count = 190}).status().code(),
            StatusCode::kInvalidArgument)
      << "asks for more queries than were recorded";
}

TEST(Trace, UnknownNamesAreRefusedWithTheKnownOnes) {
  EXPECT_NE(MakeTrace({.name = "random"}).status().message().find("clustered"), std::string::npos);
  EXPECT_NE(MakeTrace({.name = "calibrated:odd"}).status().message().find("diffuse"),
            std::string::npos);
  EXPECT_EQ(MakeTrace({.dim = 100}).status().code(), StatusCode::kInvalidArgument);
}

// Layers of one model look at much the same tokens (0.82-0.96 of the mass, notes/sparse.md), though
// their keys are their own; unrelated traces do not.
TEST(CalibratedTrace, LayersOfOneModelLookAtTheSameTokens) {
  const auto mass = [](uint64_t seed, uint64_t text, uint64_t look) {
    TraceSpec spec{.name = "calibrated:topic", .keys = 4096, .query_count = 8, .seed = seed};
    spec.text_seed = text;
    spec.look_seed = look;
    spec.local = false;
    const Trace trace = MakeTrace(spec).value();
    EXPECT_TRUE(trace.local_lse.empty());
    std::vector<float> sum(trace.keys), x(size_t{trace.group} * trace.keys);
    DotRows(trace.Query(7), trace.group, trace.k.data(), trace.dtype, trace.keys, trace.dim,
            x.data(), trace.keys);
    for (uint32_t h = 0; h < trace.group; ++h) {
      float* row = x.data() + size_t{h} * trace.keys;
      const float all = ExpShifted(row, trace.keys, MaxOf(row, trace.keys), row);
      for (uint32_t t = 0; t < trace.keys; ++t) sum[t] += row[t] / all;
    }
    return sum;
  };
  const auto shared = [](const std::vector<float>& before, const std::vector<float>& now) {
    const auto best = [](const std::vector<float>& m) {
      std::vector<uint32_t> order(m.size());
      std::iota(order.begin(), order.end(), 0u);
      std::partial_sort(order.begin(), order.begin() + 128, order.end(),
                        [&](uint32_t a, uint32_t b) { return m[a] > m[b]; });
      order.resize(128);
      return order;
    };
    double found = 0, most = 0;
    for (const uint32_t t : best(before)) found += now[t];
    for (const uint32_t t : best(now)) most += now[t];
    return found / most;
  };
  const std::vector<float> layer = mass(1, 11, 21);
  EXPECT_NE(layer, mass(2, 11, 21));
  EXPECT_GT(shared(layer, mass(2, 11, 21)), 0.7);
  EXPECT_LT(shared(layer, mass(2, 12, 22)), 0.4);
}

}  // namespace
}  // namespace icecache
