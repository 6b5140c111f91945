// Scores against values worked out by hand from the published definitions.
#include "tests/bench/tasks/task_metrics.h"

#include <gtest/gtest.h>

namespace icecache {
namespace {

TEST(Metrics, AnswersAreComparedWithoutCaseArticlesAndPunctuation) {
  EXPECT_EQ(NormalizeAnswer("  The Quick, brown fox! An  a-b."), "quick brown fox ab");
  EXPECT_EQ(WordF1("The Eiffel Tower.", "eiffel tower"), 1.0);
}

TEST(Metrics, WordF1CountsRepeatedWordsOnce) {
  // Said 4 words of which 2 are right, of 3 expected: p = 1/2, r = 2/3.
  EXPECT_NEAR(WordF1("paris paris london rome", "paris rome oslo"),
              2 * 0.5 * (2.0 / 3) / (0.5 + 2.0 / 3), 1e-12);
  EXPECT_EQ(WordF1("", "x"), 0.0);
  EXPECT_EQ(WordF1("the", "x"), 0.0) << "nothing is left of an article";
}

TEST(Metrics, RougeLFollowsTheLongestCommonSubsequence) {
  // "police killed the gunman" / "police kill the gunman": 3 of 4 and 3 of 4.
  EXPECT_NEAR(RougeL("police kill the gunman", "police killed the gunman"), 0.75, 1e-12);
  EXPECT_NEAR(RougeL("the gunman kill police", "police killed the gunman"), 0.5, 1e-12);
  EXPECT_EQ(RougeL("", "a"), 0.0);
}

TEST(Metrics, EditSimilarityIsTwiceTheCommonBytesOverAll) {
  EXPECT_NEAR(EditSimilarity("kitten", "sitting"), 2.0 * 4 / 13, 1e-12);
  EXPECT_EQ(EditSimilarity("return x", "return x"), 1.0);
  EXPECT_EQ(EditSimilarity("", ""), 1.0);
}

TEST(Metrics, CodeIsJudgedByItsFirstLineOfCode) {
  EXPECT_EQ(FirstCodeLine("\n\n```python\n# note\n// note\nreturn x\nmore"), "return x");
  EXPECT_EQ(FirstCodeLine("# only\n"), "");
  EXPECT_EQ(Score(Metric::kCode, "# first\nreturn x\n", {"return x"}, {}), 1.0);
}

TEST(Metrics, ClassesAreSharedOutAmongThoseNamed) {
  const std::vector<std::string> classes = {"Date", "Location", "Country", "Country code"};
  EXPECT_EQ(ClassScore("It is a Date", "Date", classes), 1.0);
  EXPECT_EQ(ClassScore("Date or Location", "Date", classes), 0.5);
  EXPECT_EQ(ClassScore("Location", "Date", classes), 0.0);
  EXPECT_EQ(ClassScore("Country code", "Country code", classes), 1.0)
      << "a label inside the right one is no second answer";
}

TEST(Metrics, NumbersAreSharedOutAmongThoseSaid) {
  EXPECT_EQ(CountScore("there are 12, or 7", "12"), 0.5);
  EXPECT_EQ(CountScore("there are 123", "12"), 0.0);
  EXPECT_EQ(RetrievalScore("Paragraph 4", "Paragraph 4"), 1.0);
  EXPECT_EQ(RetrievalScore("none", "Paragraph 4"), 0.0);
}

TEST(Metrics, AllCountsEveryReferenceAnyTakesTheBest) {
  EXPECT_EQ(Score(Metric::kAll, "ALPHA, gamma", {"alpha", "beta"}, {}), 0.5);
  EXPECT_EQ(Score(Metric::kAny, "ALPHA, gamma", {"alpha", "beta"}, {}), 1.0);
  EXPECT_EQ(Score(Metric::kF1, "oslo", {"lima", "Oslo."}, {}), 1.0);
  EXPECT_EQ(Score(Metric::kAll, "x", {}, {}), 0.0);
}

}  // namespace
}  // namespace icecache
