#include "common/page_layout.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <numeric>
#include <string>

namespace icecache {
namespace {

using ::testing::HasSubstr;

// 100 tokens in 7 pages and two groups, backwards.
Packing Sound() {
  Packing packing;
  packing.layout.tokens.resize(100);
  std::iota(packing.layout.tokens.rbegin(), packing.layout.tokens.rend(), 0u);
  packing.layout.page_begin = {0, 16, 32, 48, 64, 80, 96, 100};
  packing.super_begin = {0, 5, 7};
  return packing;
}

TEST(PageLayout, ASoundPackingPasses) {
  EXPECT_TRUE(CheckPacking(Sound(), 100).ok());
  EXPECT_TRUE(CheckPacking({}, 0).ok());
  Packing one;
  one.layout = {{0}, {0, 1}};
  one.super_begin = {0, 1};
  EXPECT_TRUE(CheckPacking(one, 1).ok());
}

TEST(PageLayout, WhatIsBrokenIsRefusedByName) {
  const struct {
    const char* says;
    std::function<void(Packing*)> damage;
  } cases[] = {
      {"covers 100 tokens, expected 101", [](Packing* p) { (void)p; }},
      {"token 7 is there twice", [](Packing* p) { p->layout.tokens[3] = 7; }},
      {"token 100 is", [](Packing* p) { p->layout.tokens[3] = 100; }},
      {"token 4294967295", [](Packing* p) { p->layout.tokens[99] = ~0u; }},
      {"page 1 spans [16, 33)", [](Packing* p) { p->layout.page_begin[2] = 33; }},
      {"page 2 spans [32, 32)", [](Packing* p) { p->layout.page_begin[3] = 32; }},
      {"page 0 spans [0, 4294967295)", [](Packing* p) { p->layout.page_begin[1] = ~0u; }},
      {"covers", [](Packing* p) { p->layout.page_begin[0] = 1; }},
      {"covers", [](Packing* p) { p->layout.page_begin.pop_back(); }},
      {"covers", [](Packing* p) { p->layout.page_begin.clear(); }},
      {"covers", [](Packing* p) { p->layout.tokens.pop_back(); }},
      {"groups do not cover", [](Packing* p) { p->super_begin.clear(); }},
      {"groups do not cover", [](Packing* p) { p->super_begin.back() = 6; }},
      {"group 0 spans pages [0, 0)", [](Packing* p) { p->super_begin[1] = 0; }},
      {"groups of 7 pages, expected at most 2",
       [](Packing* p) {
         p->super_begin = {0, 1, 2, 7};
       }},
  };
  for (const auto& c : cases) {
    Packing packing = Sound();
    c.damage(&packing);
    const bool unharmed = std::string(c.says).find("101") != std::string::npos;
    const Status status = CheckPacking(packing, unharmed ? 101 : 100);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << c.says;
    EXPECT_THAT(status.message(), HasSubstr(c.says));
  }
}

// What would take several times the memory of its rows.
TEST(PageLayout, PagesOfFewTokensAreRefused) {
  Packing thin;
  for (uint32_t i = 0; i <= 100; ++i) thin.layout.page_begin.push_back(i);
  for (uint32_t i = 0; i < 100; ++i) thin.layout.tokens.push_back(i);
  thin.super_begin = {0, 50, 100};
  const Status status = CheckPacking(thin, 100);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), HasSubstr("100 pages for 100 tokens, expected at most 13"));
}

TEST(PageLayout, ASuperHoldsSoManyPagesAtMost) {
  Packing wide;
  for (uint32_t i = 0; i <= 65; ++i) wide.layout.page_begin.push_back(16 * i);
  wide.layout.tokens.resize(16 * 65);
  std::iota(wide.layout.tokens.begin(), wide.layout.tokens.end(), 0u);
  wide.super_begin = {0, 65};
  EXPECT_THAT(CheckPacking(wide, 16 * 65).message(), HasSubstr("expected 1 to 64"));
  wide.super_begin = {0, 64, 65};
  EXPECT_TRUE(CheckPacking(wide, 16 * 65).ok());
}

}  // namespace
}  // namespace icecache
