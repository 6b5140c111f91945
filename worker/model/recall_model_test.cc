// The model shipped in tests/models/recall, through the tokenizer, the forward pass and dense
// attention.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>

#include "tests/models/dense_attention.h"
#include "worker/model/model.h"
#include "worker/model/model_config.h"
#include "worker/model/tokenizer.h"

namespace icecache {
namespace {

constexpr char kPreamble[] =
    "The licenses for most software are designed to take away your freedom to share and change it. "
    "By contrast, "
    "the general public license is intended to guarantee your freedom to share and change free "
    "software. ";
constexpr char kTerms[] =
    "You may copy and distribute verbatim copies of the program as you receive it, in any medium, "
    "provided that you "
    "conspicuously and appropriately publish on each copy an appropriate copyright notice and "
    "disclaimer of warranty. ";

class RecallModel : public ::testing::Test {
 protected:
  void SetUp() override {
    const char* root = std::getenv("ICECACHE_SOURCE_DIR");
    const std::string directory =
        (root == nullptr ? std::string(".") : root) + std::string("/tests/models/recall");
    auto model = LoadModel(directory, {DType::kF16, 2});
    ASSERT_TRUE(model.ok()) << model.status().ToString();
    model_ = std::move(model).value();
    auto tokenizer = Tokenizer::Load(directory);
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status().ToString();
    tokenizer_ = std::move(tokenizer).value();
  }

  // The likeliest word after `text`.
  std::string NextWord(const std::string& text) {
    const auto ids = tokenizer_->Encode(text, true);
    if (!ids.ok()) return ids.status().ToString();
    DenseAttention attention(model_->shape(), 2);
    const auto logits = RunBlock(*model_, attention, *ids, 0);
    if (!logits.ok()) return logits.status().ToString();
    const std::vector<float>& last = logits->back();
    return std::string(tokenizer_->TokenText(
        static_cast<int32_t>(std::max_element(last.begin(), last.end()) - last.begin())));
  }

  std::unique_ptr<Model> model_;
  std::unique_ptr<Tokenizer> tokenizer_;
};

TEST_F(RecallModel, AnswersFromFactsScatteredInText) {
  std::string document = "<bos> ";
  const std::pair<const char*, const char*> facts[] = {{"amberfalcon", "oslo tokyo"},
                                                       {"silverotter", "lima cairo"},
                                                       {"jadewalrus", "quito oslo"},
                                                       {"cobaltlemur", "dakar paris"}};
  for (const auto& [name, cities] : facts) {
    document += std::string(kPreamble) + "<fact> " + name + " " + cities + " <end> " + kTerms;
  }
  for (const auto& [name, cities] : facts) {
    const std::string first = std::string(cities).substr(0, std::string(cities).find(' '));
    EXPECT_EQ(NextWord(document + "<ask> " + name), first) << name;
  }
}

TEST_F(RecallModel, TokenizerAndModelBelongTogether) {
  EXPECT_EQ(tokenizer_->vocab_size(), model_->vocab_size());
  EXPECT_EQ(model_->shape(), (ModelShape{4, 2, 8, 64, DType::kF16}));
  const auto ids = tokenizer_->Encode("<bos> The <fact> AmberFalcon Oslo <end>", true);
  ASSERT_TRUE(ids.ok());
  EXPECT_EQ(tokenizer_->Decode(*ids, false), "<bos> the <fact> amberfalcon oslo <end>");
  EXPECT_EQ(tokenizer_->Decode(*ids, true), "the amberfalcon oslo");
}

}  // namespace
}  // namespace icecache
