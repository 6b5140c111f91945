#include "worker/serve/recall_document.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <set>

namespace icecache {
namespace {

using ::testing::HasSubstr;

// The shipped model's tokenizer over a text of this test's own.
class RecallDocumentTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const char* const source = std::getenv("ICECACHE_SOURCE_DIR");
    const std::string root = source != nullptr ? source : ".";
    auto loaded = Tokenizer::Load(root + "/tests/models/recall");
    ASSERT_TRUE(loaded.ok()) << loaded.status().ToString();
    tokenizer_ = std::move(loaded).value();
    text_ = testing::TempDir() + "icecache_recall_text";
    std::ofstream file(text_);
    for (int i = 0; i < 500; ++i)
      file << "you may copy the library under the terms of version " << i << ".\n";
    options_.text_files = {text_};
    options_.tokens = 3000;
    options_.facts = 20;
  }
  void TearDown() override { std::filesystem::remove(text_); }

  std::unique_ptr<Tokenizer> tokenizer_;
  std::string text_;
  RecallDocumentOptions options_;
};

TEST_F(RecallDocumentTest, HoldsEveryFactWholeAtItsPlace) {
  const auto document = MakeRecallDocument(*tokenizer_, options_);
  ASSERT_TRUE(document.ok()) << document.status().ToString();
  EXPECT_EQ(document->tokens.size(), 3000u);
  EXPECT_EQ(document->tokens[0], *tokenizer_->TokenId("<bos>"));
  EXPECT_EQ(
      std::count(document->tokens.begin(), document->tokens.end(), *tokenizer_->TokenId("<fact>")),
      20);
  ASSERT_EQ(document->questions.size(), 20u);
  std::set<std::string> names;
  for (const RecallQuestion& question : document->questions) {
    names.insert(question.name);
    const int32_t* const fact = document->tokens.data() + question.fact_position;
    EXPECT_EQ(fact[0], *tokenizer_->TokenId("<fact>"));
    EXPECT_EQ(tokenizer_->TokenText(fact[1]), question.name);
    ASSERT_EQ(question.answer.size(), 1u);
    EXPECT_EQ(fact[2], question.answer[0]);
    EXPECT_EQ(fact[4], *tokenizer_->TokenId("<end>"));
    ASSERT_EQ(question.tokens.size(), 2u);
    EXPECT_EQ(question.tokens[0], *tokenizer_->TokenId("<ask>"));
    EXPECT_EQ(question.tokens[1], fact[1]);
  }
  EXPECT_EQ(names.size(), 20u);
}

TEST_F(RecallDocumentTest, IsTheSameInEveryProcessAndAnotherForAnotherSeed) {
  const auto a = MakeRecallDocument(*tokenizer_, options_);
  const auto b = MakeRecallDocument(*tokenizer_, options_);
  options_.seed = 2;
  const auto c = MakeRecallDocument(*tokenizer_, options_);
  ASSERT_TRUE(a.ok() && b.ok() && c.ok());
  EXPECT_EQ(a->tokens, b->tokens);
  EXPECT_NE(a->tokens, c->tokens);
}

TEST_F(RecallDocumentTest, MistakesAreNamed) {
  RecallDocumentOptions crowded = options_;
  crowded.tokens = 64;
  EXPECT_THAT(MakeRecallDocument(*tokenizer_, crowded).status().message(), HasSubstr("--facts"));
  RecallDocumentOptions many = options_;
  many.facts = 257;
  EXPECT_EQ(MakeRecallDocument(*tokenizer_, many).status().code(), StatusCode::kInvalidArgument);
  RecallDocumentOptions absent = options_;
  absent.text_files = {"/nonexistent/text"};
  const Status status = MakeRecallDocument(*tokenizer_, absent).status();
  EXPECT_EQ(status.code(), StatusCode::kNotFound);
  EXPECT_THAT(status.message(), HasSubstr("/nonexistent/text"));
}

}  // namespace
}  // namespace icecache
