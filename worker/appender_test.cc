#include "worker/appender.h"

#include <gtest/gtest.h>

#include "common/limits.h"
#include "worker/test_rows.h"

namespace icecache {
namespace {

TEST(Appender, KeepsTokensUntilTheyAreConfirmed) {
  const ModelShape shape = test::SmallShape();
  Appender appender(shape);
  const LayerRows token(shape, TokenPos(0), 1);
  for (uint32_t p = 40; p < 43; ++p) {
    ASSERT_TRUE(appender.Push(LayerId(1), token, TokenPos(p)).ok());
  }
  EXPECT_TRUE(appender.tokens(LayerId(0)).empty());
  appender.Confirm(LayerId(1), TokenPos(40));
  EXPECT_EQ(appender.tokens(LayerId(1)).size(), 3u);
  appender.Confirm(LayerId(1), TokenPos(42));
  EXPECT_EQ(appender.tokens(LayerId(1)).size(), 1u);
  EXPECT_EQ(appender.first(LayerId(1)).value, 42u);
  appender.Confirm(LayerId(1), TokenPos(43));
  EXPECT_TRUE(appender.tokens(LayerId(1)).empty());
  ASSERT_TRUE(appender.Push(LayerId(1), token, TokenPos(43)).ok());
  EXPECT_EQ(appender.first(LayerId(1)).value, 43u);
}

TEST(Appender, GivesUpOnAServerThatTakesNothing) {
  const ModelShape shape = test::SmallShape();
  Appender appender(shape);
  const LayerRows token(shape, TokenPos(0), 1);
  for (uint32_t p = 0; p < limits::kPendingTokensMax; ++p) {
    ASSERT_TRUE(appender.Push(LayerId(0), token, TokenPos(p)).ok());
  }
  EXPECT_EQ(appender.Push(LayerId(0), token, TokenPos(limits::kPendingTokensMax)).code(),
            StatusCode::kUnavailable);
}

}  // namespace
}  // namespace icecache
