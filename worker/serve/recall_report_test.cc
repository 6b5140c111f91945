#include "worker/serve/recall_report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "worker/serve/summary.h"

namespace icecache {
namespace {

using ::testing::HasSubstr;

RecallMethodReport Method(const std::string& name, const std::vector<std::string>& said) {
  RecallMethodReport report;
  report.name = name;
  report.budget = 256;
  for (size_t i = 0; i < said.size(); ++i) {
    report.answers.push_back({"name" + std::to_string(i), said[i], said[i] == "oslo", 7});
  }
  report.stats.tokens = 2 * said.size();
  report.stats.total = std::chrono::milliseconds(80);
  report.stats.kv_bytes = 1000;
  report.stats.attention.heads = 10;
  report.stats.attention.attended_tokens = 2560;
  report.stats.attention.bytes_moved = 16000;
  report.stats.attention.attention = std::chrono::milliseconds(20);
  return report;
}

TEST(RecallReport, JsonHasTheFieldsOfTheDemo) {
  RecallReport report;
  report.document_tokens = 16384;
  report.methods.push_back(Method("full_kv", {"oslo", "oslo", "lima", "oslo"}));
  report.methods.push_back(Method("icecache", {"oslo", "rome", "lima", "oslo"}));
  const auto json = nlohmann::json::parse(FormatRecallJson(report));
  EXPECT_EQ(json["document_tokens"], 16384);
  EXPECT_EQ(json["prefill_tokens"], 0);
  const auto& icecache = json["methods"][1];
  EXPECT_EQ(icecache["name"], "icecache");
  EXPECT_EQ(icecache["budget"], 256);
  EXPECT_DOUBLE_EQ(icecache["accuracy"], 0.5);
  EXPECT_EQ(icecache["questions"], 4);
  EXPECT_DOUBLE_EQ(icecache["tokens_attended_per_head"], 256);
  EXPECT_DOUBLE_EQ(icecache["bytes_per_token"], 2000);
  EXPECT_EQ(icecache["worker_kv_bytes"], 1000);
  EXPECT_DOUBLE_EQ(icecache["ms_per_token"], 10);
  EXPECT_DOUBLE_EQ(icecache["ms_split"]["model"], 7.5);
  EXPECT_DOUBLE_EQ(icecache["agreement_with_full_kv"], 0.75);
  EXPECT_THAT(FormatRecallTable(report), HasSubstr("icecache"));
}

TEST(Summary, SaysWhereTheTimeWentAndWarnsOfDegradedSteps) {
  GenerateSummary summary;
  summary.method = "icecache";
  summary.budget = 256;
  summary.prefill_tokens = 100;
  summary.prepare = std::chrono::seconds(2);
  summary.decode = Method("icecache", {"a", "b"}).stats;
  EXPECT_THAT(FormatSummary(summary), HasSubstr("100 tokens in 2.0 s (50 tokens/s)"));
  EXPECT_THAT(FormatSummary(summary), HasSubstr("256.0 tokens per head"));
  EXPECT_THAT(FormatSummary(summary), ::testing::Not(HasSubstr("caution")));
  summary.decode.attention.degraded_steps = 3;
  EXPECT_THAT(FormatSummary(summary), HasSubstr("3 layer steps"));
}

}  // namespace
}  // namespace icecache
