#include "common/address.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace icecache {
namespace {

TEST(Address, HostAndPortAreSplitAndJoined) {
  for (const char* text : {"127.0.0.1:7400", "host:0", "[::1]:80", "[fe80::1]:65535"}) {
    const auto parsed = ParseHostPort(text);
    ASSERT_TRUE(parsed.ok()) << text;
    EXPECT_EQ(FormatHostPort(*parsed), text);
  }
  EXPECT_EQ(ParseHostPort("[::1]:80")->host, "::1");
  EXPECT_EQ(ParseHostPort("a:65535")->port, 65535);
}

TEST(Address, NonsenseIsRefusedWithTheFormExpected) {
  for (const char* text :
       {"", ":", "a", "a:", ":1", "a:b", "a:65536", "a:-1", "a:1 ", "::1:80", "[]:80", "a:0x10"}) {
    const auto parsed = ParseHostPort(text);
    ASSERT_FALSE(parsed.ok()) << text;
    EXPECT_EQ(parsed.status().code(), StatusCode::kInvalidArgument);
    EXPECT_THAT(parsed.status().message(), testing::HasSubstr("host:port"));
  }
}

}  // namespace
}  // namespace icecache
