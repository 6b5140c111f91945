#include "common/size.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <random>

namespace icecache {
namespace {

TEST(Size, ParsesBinaryAndDecimalUnits) {
  const std::pair<const char*, uint64_t> cases[] = {
      {"0", 0},
      {"65536", 65536},
      {"1B", 1},
      {"4KiB", 4096},
      {"512MiB", 512ull << 20},
      {"4GiB", 4ull << 30},
      {"2TiB", 2ull << 40},
      {"1kB", 1000},
      {"1MB", 1000000},
      {"3GB", 3000000000ull},
      {"1TB", 1000000000000ull},
      {"1.5GiB", 3ull << 29},
      {"0.5kib", 512},
      {"4 GiB", 4ull << 30},
      {"4gib", 4ull << 30},
      {"4K", 4096},
      {"4m", 4ull << 20},
      {"4G", 4ull << 30},
  };
  for (const auto& [text, bytes] : cases) {
    const auto parsed = ParseSize(text);
    ASSERT_TRUE(parsed.ok()) << text;
    EXPECT_EQ(*parsed, bytes) << text;
  }
}

TEST(Size, RefusesWhatIsNoSize) {
  for (const char* text : {"", " ", "GiB", "-1", "-1GiB", "4 gigs", "4PiB", "1.5", "1e30", "nan",
                           "inf", "4GiBx", "4G iB", "0x10", "10000000TiB", "1,5GiB", "+4"}) {
    const auto parsed = ParseSize(text);
    EXPECT_FALSE(parsed.ok()) << text;
    if (parsed.ok()) continue;
    EXPECT_EQ(parsed.status().code(), StatusCode::kInvalidArgument);
    EXPECT_NE(parsed.status().message().find("4GiB"), std::string::npos) << "an example helps";
  }
}

TEST(Size, FormatsShortestExactForm) {
  EXPECT_EQ(FormatSize(0), "0B");
  EXPECT_EQ(FormatSize(1023), "1023B");
  EXPECT_EQ(FormatSize(1024), "1KiB");
  EXPECT_EQ(FormatSize(3ull << 29), "1.5GiB");
  EXPECT_EQ(FormatSize(4ull << 30), "4GiB");
  EXPECT_EQ(FormatSize(1ull << 50), "1024TiB");
  EXPECT_EQ(FormatSize(1025), "1.0KiB");
}

TEST(Size, ExactFormsReadBackTheSame) {
  const uint64_t seed = std::random_device{}();
  std::mt19937_64 random(seed);
  for (int i = 0; i < 10000; ++i) {
    const uint64_t bytes = (random() % 1000 + 1) << (10 * (random() % 5));
    const auto back = ParseSize(FormatSize(bytes));
    ASSERT_TRUE(back.ok()) << "seed " << seed;
    ASSERT_EQ(*back, bytes) << "seed " << seed;
  }
}

}  // namespace
}  // namespace icecache
