// The model must notice what it is there for: a chaos run that cannot fail shows nothing.
#include "tests/chaos/document.h"

#include <gtest/gtest.h>

namespace icecache::chaos {
namespace {

Document Two() {
  Document document{.name = "doc", .tokens = 30, .durable = true, .parts = {{0, 7}}};
  return document.Extended(10, 8);
}

// A page with the rows of positions 25 .. 34, as a server would send it.
struct PageBytes {
  explicit PageBytes(const Content& content) {
    const size_t row = kShape.row_bytes();
    for (uint32_t p = 25; p < 35; ++p) {
      const auto k = content.rows(LayerId(1)).k(KvHeadId(1)).subspan(p * row, row);
      const auto v = content.rows(LayerId(1)).v(KvHeadId(1)).subspan(p * row, row);
      ks.insert(ks.end(), k.begin(), k.end());
      vs.insert(vs.end(), v.begin(), v.end());
      positions.push_back(p);
    }
  }
  wire::PagePayload page() {
    wire::PagePayload page;
    page.fill = 10;
    page.k_rows = ks;
    page.v_rows = vs;
    page.positions = std::as_bytes(std::span(positions));
    return page;
  }
  std::vector<std::byte> ks, vs;
  std::vector<uint32_t> positions;
};

TEST(ChaosDocument, ItsLineComesBackAsItWas) {
  const Document document = Two();
  const auto again = Document::Parse(document.ToLine());
  ASSERT_TRUE(again.has_value());
  EXPECT_EQ(again->ToLine(), document.ToLine());
  EXPECT_EQ(again->tokens, 40u);
  EXPECT_FALSE(Document::Parse("doc 30").has_value());
}

TEST(ChaosDocument, APageAsWrittenPassesAndEveryDamageIsFound) {
  const Content content(Two());
  PageBytes bytes(content);
  EXPECT_TRUE(content.CheckPage(LayerId(1), KvHeadId(1), bytes.page()).ok());
  EXPECT_FALSE(content.CheckPage(LayerId(1), KvHeadId(0), bytes.page()).ok()) << "another head";
  EXPECT_FALSE(content.CheckPage(LayerId(0), KvHeadId(1), bytes.page()).ok()) << "another layer";
  bytes.ks[77] ^= std::byte{1};
  EXPECT_FALSE(content.CheckPage(LayerId(1), KvHeadId(1), bytes.page()).ok()) << "a bit of K";
  bytes.ks[77] ^= std::byte{1};
  bytes.vs.back() ^= std::byte{128};
  EXPECT_FALSE(content.CheckPage(LayerId(1), KvHeadId(1), bytes.page()).ok()) << "a bit of V";
  bytes.vs.back() ^= std::byte{128};
  bytes.positions[3] = 4000;
  EXPECT_FALSE(content.CheckPage(LayerId(1), KvHeadId(1), bytes.page()).ok()) << "a position";
}

TEST(ChaosDocument, TheSecondPartIsOfAnotherSeed) {
  Document other = Two();
  other.parts[1].seed = 9;
  const Content content(other);
  PageBytes bytes{Content(Two())};
  const Status status = content.CheckPage(LayerId(1), KvHeadId(1), bytes.page());
  EXPECT_EQ(status.code(), StatusCode::kDataLoss);
  EXPECT_NE(status.message().find("position 30"), std::string::npos) << status.ToString();
}

}  // namespace
}  // namespace icecache::chaos
