#include "cacheserver/ctl/table.h"

#include <gtest/gtest.h>

namespace icecache {
namespace {

TEST(Table, AlignsTextAtTheLeftAndNumbersAtTheRight) {
  Table table({"NAME", "TOKENS", "STATE"});
  table.Add({"doc", "16384", "published"});
  table.Add({"a longer name", "7", "open"});
  EXPECT_EQ(table.Render(),
            "NAME           TOKENS  STATE\n"
            "doc             16384  published\n"
            "a longer name       7  open\n");
}

TEST(Table, CountsLettersNotBytes) {
  Table table({"NAME", "STATE"});
  table.Add({"\xc3\xa4\xc3\xb6", "x"});
  table.Add({"abc", "y"});
  EXPECT_EQ(table.Render(), "NAME  STATE\n\xc3\xa4\xc3\xb6    x\nabc   y\n");
}

TEST(Table, WithoutRowsThereAreHeaders) { EXPECT_EQ(Table({"A", "B"}).Render(), "A  B\n"); }

}  // namespace
}  // namespace icecache
