// Conformance suite of SelectionPolicy: what every policy promises, whatever its structure.
//
// SliceModel is the model-based driver: it holds a policy and a PageStore that applies the policy's
// own layouts and plans, and knows every token's row, so that each answer can be checked against
// exact attention.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <ostream>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "cacheserver/select/selection_policy.h"
#include "kernels/attention.h"
#include "kernels/distance.h"
#include "tests/support/page_store.h"

namespace icecache {

// What a policy answers with when the residual is asked for.
enum class Answers : uint8_t {
  kPagesAndRest,      // pages, and a residual that makes them full attention when all may be read
  kPagesAndEstimate,  // pages, and a residual that never becomes exact
  kPages,             // pages; the residual is empty by design
  kTokens,            // no pages: at most 16 * max_pages tokens, attended to, in the residual
};

struct PolicyCase {
  PolicyKind kind;
  Answers answers;
  bool keeps_cap = true;     // false: it reads keys to search, beyond read_cap by design
  bool sees_queries = true;  // false: what it keeps does not depend on the query
  float own_mass = 1;        // below 1: it stops at this share of the mass on its own
};
inline std::ostream& operator<<(std::ostream& out, const PolicyCase& c) {
  return out << PolicyKindName(c.kind);
}

// Random rows of one slice: `clusters` Gaussian centres plus noise.
class RowSource {
 public:
  RowSource(uint64_t seed, uint32_t dim, uint32_t clusters)
      : rng_(seed), dim_(dim), centres_(size_t{clusters} * dim) {
    std::normal_distribution<float> normal;
    for (float& x : centres_) x = normal(rng_);
  }
  // Appends `count` K and V rows.
  void Append(uint32_t count, DType dtype, std::vector<std::byte>* k, std::vector<std::byte>* v) {
    std::normal_distribution<float> normal;
    std::vector<float> key(dim_), value(dim_);
    const size_t row_bytes = size_t{dim_} * DTypeBytes(dtype);
    for (uint32_t t = 0; t < count; ++t) {
      const size_t c = rng_() % (centres_.size() / dim_);
      for (uint32_t j = 0; j < dim_; ++j) {
        key[j] = centres_[c * dim_ + j] + 0.6f * normal(rng_);
        value[j] = 0.7f * centres_[c * dim_ + (j + 7) % dim_] + 0.7f * normal(rng_);
      }
      k->resize(k->size() + row_bytes);
      v->resize(v->size() + row_bytes);
      FromF32(key.data(), dim_, dtype, k->data() + k->size() - row_bytes);
      FromF32(value.data(), dim_, dtype, v->data() + v->size() - row_bytes);
    }
  }
  std::vector<float> Queries(uint32_t group, float scale) {
    std::normal_distribution<float> normal;
    std::vector<float> q(size_t{group} * dim_);
    const size_t c = rng_() % (centres_.size() / dim_);
    for (uint32_t h = 0; h < group; ++h)
      for (uint32_t j = 0; j < dim_; ++j)
        q[h * dim_ + j] = scale * (centres_[c * dim_ + j] + 0.6f * normal(rng_)) /
                          std::sqrt(static_cast<float>(dim_));
    return q;
  }
  std::mt19937_64& rng() { return rng_; }

 private:
  std::mt19937_64 rng_;
  uint32_t dim_;
  std::vector<float> centres_;
};

class SliceModel {
 public:
  SliceModel(PolicyKind kind, DType dtype, uint32_t dim, uint64_t seed = 1)
      : kind_(kind),
        options_{dtype, dim, seed},
        policy_(MakePolicy(kind, options_)),
        store_(dtype, dim) {}

  TokenRows Rows(const std::vector<std::byte>& k, const std::vector<std::byte>& v) const {
    const size_t row_bytes = size_t{options_.head_dim} * DTypeBytes(options_.dtype);
    return {options_.dtype, options_.head_dim, static_cast<uint32_t>(k.size() / row_bytes),
            k.data(), v.data()};
  }
  Status Build(const TokenRows& rows, const BuildHints& hints = {}) {
    KV_ASSIGN_OR_RETURN(const PageLayout layout, policy_->Build(rows, hints));
    KV_RETURN_IF_ERROR(store_.ApplyLayout(rows, layout));
    return Check();
  }
  Status Insert(const TokenRows& row) {
    KV_ASSIGN_OR_RETURN(const InsertPlan plan, policy_->Insert(row, store_.kv()));
    return store_.ApplyInsert(plan, row);
  }
  // Drops each row with probability `share`; a page may lose all of its rows.
  Status RetainRandom(std::mt19937_64& rng, double share) {
    std::vector<uint16_t> masks;
    for (uint32_t p = 0; p < store_.page_count(); ++p) {
      uint16_t mask = 0;
      const bool whole = rng() % 4 == 0;
      for (uint32_t r = 0; r < store_.kv().pages[p].fill; ++r)
        if (!whole && std::uniform_real_distribution<>()(rng) >= share)
          mask |= static_cast<uint16_t>(1u << r);
      masks.push_back(mask);
    }
    KV_RETURN_IF_ERROR(policy_->Retain(masks, store_.kv()));
    return store_.ApplyRetain(masks);
  }
  Status Check() const { return policy_->Validate(store_.kv()); }
  Selection Select(const std::vector<float>& queries, SelectRequest request) const {
    request.queries = queries.data();
    request.group = static_cast<uint32_t>(queries.size() / options_.head_dim);
    Selection out;
    policy_->Select(request, store_.kv(), &out);
    return out;
  }
  std::string Image() const {
    std::string image;
    policy_->Save(&image);
    return image;
  }

  SelectionPolicy& policy() { return *policy_; }
  PageStore& store() { return store_; }
  const PageStore& store() const { return store_; }
  const PolicyOptions& options() const { return options_; }
  PolicyKind kind() const { return kind_; }

 private:
  PolicyKind kind_;
  PolicyOptions options_;
  std::unique_ptr<SelectionPolicy> policy_;
  PageStore store_;
};

// What holds for every answer: no repeats, known pages, the budgets, shares within [0, 1], finite
// sums.
inline void CheckSelection(const SliceModel& slice, const SelectRequest& request,
                           const Selection& got, uint32_t group, const PolicyCase& policy) {
  ASSERT_LE(got.pages.size(), request.max_pages);
  if (policy.answers == Answers::kTokens && request.residual) {
    ASSERT_TRUE(got.pages.empty());
  } else if (request.min_mass <= 0 && policy.own_mass == 1) {
    ASSERT_EQ(got.pages.size(), std::min(request.max_pages, slice.store().page_count()));
  }
  std::set<uint32_t> distinct;
  uint32_t returned_tokens = 0;
  for (const SelectedPage& page : got.pages) {
    ASSERT_LT(page.page.value, slice.store().page_count());
    ASSERT_TRUE(distinct.insert(page.page.value).second) << "page " << page.page.value << " twice";
    ASSERT_TRUE(std::isfinite(page.log_mass));
    returned_tokens += slice.store().kv().pages[page.page.value].fill;
  }
  ASSERT_GE(got.covered_mass, 0.0f);
  ASSERT_LE(got.covered_mass, 1.0f);
  ASSERT_LE(got.tokens_read, slice.store().token_count());
  if (policy.keeps_cap) {
    const bool tokens = policy.answers == Answers::kTokens && request.residual;
    const uint32_t shipped = request.min_mass > 0 || tokens || policy.own_mass < 1
                                 ? request.max_pages * limits::kPageTokens
                                 : returned_tokens;
    ASSERT_LE(got.tokens_read, shipped + request.read_cap);
  }
  ASSERT_EQ(got.residual.heads(), group);
  ASSERT_EQ(got.residual.head_dim(), slice.options().head_dim);
  for (const float x : got.residual.flat()) ASSERT_FALSE(std::isnan(x));
}

inline void ExpectSameSelection(const Selection& a, const Selection& b) {
  ASSERT_EQ(a.pages.size(), b.pages.size());
  for (size_t i = 0; i < a.pages.size(); ++i) {
    EXPECT_EQ(a.pages[i].page, b.pages[i].page);
    EXPECT_EQ(a.pages[i].log_mass, b.pages[i].log_mass);
  }
  EXPECT_EQ(a.covered_mass, b.covered_mass);
  EXPECT_EQ(a.tokens_read, b.tokens_read);
  EXPECT_TRUE(std::equal(a.residual.flat().begin(), a.residual.flat().end(),
                         b.residual.flat().begin(), b.residual.flat().end()));
}

}  // namespace icecache
