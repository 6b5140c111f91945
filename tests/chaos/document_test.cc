// The model must notice what it is there for: a chaos run that cannot fail shows nothing.
#include "tests/chaos/document.h"

#include <gtest/gtest.h>

#include <map>

#include "tests/chaos/registry.h"
#include "tests/chaos/schedule.h"
#include "tests/support/process.h"

namespace icecache::chaos {
namespace {

Document Two() {
  Document document{.name = "doc", .tokens = 30, .parts = {{0, 7}}};
  document = document.Extended(10, 8);
  document.durable = true;
  document.answers = 12345;
  document.segments = 678;
  return document;
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
  EXPECT_TRUE(again->durable);
  EXPECT_EQ(again->answers, 12345u);
  EXPECT_EQ(again->segments, 678u);
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

TEST(ChaosRegistry, SaysWhatMayBeThereAndWhatMust) {
  test::TempDir dir;
  Registry registry(dir.path("registry"));
  const Document document = Two();
  const uint64_t asked = registry.Publishing(document);
  EXPECT_FALSE(registry.Entries().at("doc").published);
  registry.Published(document, asked);
  EXPECT_TRUE(registry.Entries().at("doc").published);
  EXPECT_EQ(registry.Entries().at("doc").asked_ms, asked);
  EXPECT_EQ(registry.Entries().at("doc").document.ToLine(), document.ToLine());
  registry.Dropping("doc");
  EXPECT_TRUE(registry.Entries().at("doc").dropping);
  EXPECT_FALSE(registry.Entries().at("doc").dropped);
  registry.Dropped("doc");
  EXPECT_TRUE(registry.Entries().at("doc").dropped);
}

TEST(ChaosSchedule, IsAFunctionOfItsSeedAndHasEveryTrouble) {
  Schedule one(7, 3), again(7, 3), other(8, 3);
  std::map<Trouble, int> seen;
  bool differs = false;
  for (int i = 0; i < 500; ++i) {
    const Turn turn = one.Next();
    EXPECT_EQ(turn.ToString(), again.Next().ToString());
    differs |= turn.ToString() != other.Next().ToString();
    EXPECT_LT(turn.worker, 3u);
    ++seen[turn.trouble];
  }
  EXPECT_TRUE(differs);
  EXPECT_EQ(seen.size(), kTroubleNames.size());
}

}  // namespace
}  // namespace icecache::chaos
