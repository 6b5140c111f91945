// Every task is what its definition says, fits its length, and is equal for equal seeds.
#include "tests/bench/tasks/task.h"

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

// A letter is a token: text reads back as it was, and lengths are easy to see.
std::unique_ptr<Tokenizer> Letters() {
  std::string vocabulary = "\"[UNK]\": 0";
  int id = 1;
  for (char c = ' '; c <= '~'; ++c) {
    const std::string escaped = c == '"' || c == '\\' ? std::string("\\") + c : std::string(1, c);
    vocabulary += ", \"" + escaped + "\": " + std::to_string(id++);
  }
  vocabulary += ", \"\\n\": " + std::to_string(id);
  const std::string json = R"({"version": "1.0", "added_tokens": [], "normalizer": null,
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(?s)."}, "behavior": "Isolated",
    "invert": false}, "post_processor": null, "decoder": {"type": "Fuse"},
    "model": {"type": "WordLevel", "unk_token": "[UNK]", "vocab": {)" +
                           vocabulary + "}}}";
  auto tokenizer = Tokenizer::Parse(json, "letters");
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status().ToString();
  return std::move(tokenizer).value();
}

size_t Occurrences(const std::string& text, const std::string& part) {
  size_t count = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++count;
  return count;
}

class Task : public ::testing::Test {
 protected:
  const std::unique_ptr<Tokenizer> tokenizer_ = Letters();
  const std::string folder_ = testing::TempDir() + "/task_test";

  Task() {
    std::filesystem::create_directories(folder_);
    Write("text.txt", "One sentence stands here. Another one follows it.\nA third is long enough.");
  }
  ~Task() override { std::filesystem::remove_all(folder_); }

  void Write(const std::string& name, const std::string& text) const {
    std::ofstream(folder_ + "/" + name) << text;
  }
  TaskSpec Spec(const std::string& name, uint32_t length = 6000, uint32_t questions = 2) const {
    TaskSpec spec;
    spec.name = name;
    spec.length = length;
    spec.seed = 7;
    spec.questions = questions;
    spec.text_files = {folder_ + "/text.txt"};
    spec.data = folder_;
    return spec;
  }
  std::vector<TaskSample> Make(const TaskSpec& spec) const {
    auto samples = MakeTask(*tokenizer_, spec);
    EXPECT_TRUE(samples.ok()) << spec.name << ": " << samples.status().ToString();
    return samples.ok() ? std::move(samples).value() : std::vector<TaskSample>{};
  }
  std::string Text(const std::vector<int32_t>& tokens) const {
    return tokenizer_->Decode(tokens, false);
  }
};

TEST_F(Task, EveryRulerKindFitsItsLengthAndEqualsItself) {
  Write("squad.json", R"({"data": [{"paragraphs": [
    {"context": "Oslo is in Norway.", "qas": [{"question": "Where is Oslo?", "answers": [{"text": "Norway"}]}]},
    {"context": "Lima is in Peru.", "qas": [{"question": "Where is Lima?", "answers": [{"text": "Peru"}]}]}]}]})");
  Write("hotpotqa.json", R"([{"question": "Which came first?", "answer": "the egg",
    "context": [["Egg", ["First came the egg.", " Then it hatched."]], ["Hen", ["It came later."]]]}])");
  const std::vector<TaskKind> kinds = RulerTasks();
  ASSERT_EQ(kinds.size(), 14u) << "thirteen and passkey";
  for (const TaskKind& kind : kinds) {
    const TaskSpec spec = Spec(kind.name);
    const std::vector<TaskSample> samples = Make(spec), again = Make(spec);
    ASSERT_EQ(samples.size(), 2u) << kind.name;
    EXPECT_EQ(samples[1].document, again[1].document) << kind.name;
    const bool drawn = !std::string(kind.name).starts_with("qa_");  // else from few passages
    if (drawn) {
      EXPECT_NE(samples[0].document, samples[1].document) << kind.name;
    }
    for (const TaskSample& sample : samples) {
      const TaskTurn& turn = sample.turns.at(0);
      const size_t all = sample.document.size() + turn.tokens.size() + turn.new_tokens;
      EXPECT_LE(all, spec.length) << kind.name;
      if (drawn) {
        EXPECT_GT(all, spec.length * 8 / 10) << kind.name;
      }
      for (const std::string& answer : turn.answers) {
        EXPECT_THAT(Text(sample.document), HasSubstr(answer)) << kind.name;
        EXPECT_EQ(Text(turn.tokens).find(answer), std::string::npos) << "the question says it";
      }
      std::string all_answers;
      for (const std::string& answer : turn.answers) all_answers += answer + " ";
      EXPECT_EQ(ScoreTurn(sample, turn, all_answers, {}), 1.0) << kind.name;
      EXPECT_EQ(ScoreTurn(sample, turn, "nothing", {}), 0.0) << kind.name;
    }
  }
}

TEST_F(Task, NeedlesAreAsManyAsPublished) {
  const auto needles = [&](const std::string& name) {
    const TaskSample sample = Make(Spec(name))[0];
    return std::pair(Occurrences(Text(sample.document), "The special magic"),
                     sample.turns[0].answers.size());
  };
  EXPECT_EQ(needles("niah_single_1"), std::pair(size_t{1}, size_t{1}));
  EXPECT_EQ(needles("niah_multikey_1"), std::pair(size_t{4}, size_t{1}));
  EXPECT_EQ(needles("niah_multivalue"), std::pair(size_t{4}, size_t{4}));
  EXPECT_EQ(needles("niah_multiquery"), std::pair(size_t{4}, size_t{4}));
  EXPECT_GT(needles("niah_multikey_2").first, 40u) << "the haystack itself";
}

TEST_F(Task, VariablesFormOneChainInOrder) {
  const TaskSample sample = Make(Spec("vt"))[0];
  const std::string text = Text(sample.document);
  ASSERT_EQ(sample.turns[0].answers.size(), 5u);
  size_t at = 0;
  for (size_t i = 0; i < 5; ++i) {
    const std::string statement = "VAR " + sample.turns[0].answers[i] + " = " +
                                  (i == 0 ? "" : "VAR " + sample.turns[0].answers[i - 1] + ".");
    const size_t found = text.find(statement);
    ASSERT_NE(found, std::string::npos) << statement;
    EXPECT_GE(found, at);
    at = found;
  }
}

TEST_F(Task, CommonWordsStandThirtyTimesAllOthersThree) {
  const TaskSample sample = Make(Spec("cwe", 12000))[0];
  const std::string text = Text(sample.document);
  ASSERT_EQ(sample.turns[0].answers.size(), 10u);
  for (const std::string& word : sample.turns[0].answers)
    EXPECT_EQ(Occurrences(text, ". " + word + " "), 30u) << word;
  EXPECT_EQ(MakeTask(*tokenizer_, Spec("cwe", 900)).status().code(), StatusCode::kInvalidArgument);
}

TEST_F(Task, FrequentWordsFallInOrder) {
  const TaskSample sample = Make(Spec("fwe", 12000))[0];
  const std::string text = Text(sample.document);
  const auto& answers = sample.turns[0].answers;
  ASSERT_EQ(answers.size(), 3u);
  EXPECT_GE(Occurrences(text, answers[0] + " "), Occurrences(text, answers[1] + " "));
  EXPECT_GE(Occurrences(text, answers[1] + " "), Occurrences(text, answers[2] + " "));
}

TEST_F(Task, LongBenchReadsItsPublicFiles) {
  Write(
      "hotpotqa.jsonl",
      R"({"input": "Who wrote it?", "context": "Some long story.", "answers": ["Ann", "Ann Lee"], "all_classes": null, "length": 3})"
      "\n"
      R"({"input": "When?", "context": "In May.", "answers": ["May"], "all_classes": null})");
  Write(
      "trec.jsonl",
      R"({"input": "Type:", "context": "Examples.", "answers": ["Date"], "all_classes": ["Date", "City"]})");
  const std::vector<TaskSample> samples = Make(Spec("longbench:hotpotqa", 2000, 10));
  ASSERT_EQ(samples.size(), 2u);
  const bool first = Text(samples[0].document).find("long story") != std::string::npos;
  const TaskSample& sample = samples[first ? 0 : 1];
  EXPECT_THAT(Text(sample.turns[0].tokens), HasSubstr("Who wrote it?"))
      << "read after the document";
  EXPECT_EQ(ScoreTurn(sample, sample.turns[0], "ann lee", {}), 1.0);
  EXPECT_EQ(sample.turns[0].new_tokens, 32u);
  const TaskSample trec = Make(Spec("longbench:trec", 2000, 1))[0];
  EXPECT_EQ(ScoreTurn(trec, trec.turns[0], "Date, City", {}), 0.5);
}

TEST_F(Task, LongBenchTakesThePromptsOfTheRelease) {
  Write("lcc.jsonl",
        R"({"input": "", "context": "int x;", "answers": ["int y;"], "all_classes": null})");
  Write("dataset2prompt.json", R"({"lcc": "Complete: {context}Next:{input}"})");
  Write("dataset2maxlen.json", R"({"lcc": 9})");
  const TaskSample sample = Make(Spec("longbench:lcc", 2000, 1))[0];
  EXPECT_EQ(Text(sample.document), "Complete: int x;");
  EXPECT_EQ(Text(sample.turns[0].tokens), "Next:");
  EXPECT_EQ(sample.turns[0].new_tokens, 9u);
}

TEST_F(Task, LongBenchCutsTheMiddleOfWhatIsTooLong) {
  Write("lcc.jsonl", R"({"input": "", "context": "BEGIN)" + std::string(5000, 'x') +
                         R"(END", "answers": ["y"], "all_classes": null})");
  const TaskSample sample = Make(Spec("longbench:lcc", 500, 1))[0];
  EXPECT_LE(sample.document.size() + sample.turns[0].tokens.size() + 64, 500u);
  EXPECT_TRUE(Text(sample.document).starts_with("BEGIN"));
  EXPECT_THAT(Text(sample.document) + Text(sample.turns[0].tokens), HasSubstr("xEND"));
}

TEST_F(Task, BadDataFilesAreRefusedByLine) {
  EXPECT_EQ(MakeTask(*tokenizer_, Spec("longbench:qasper")).status().code(), StatusCode::kNotFound);
  Write("qasper.jsonl",
        "{\"input\": \"a\", \"context\": \"b\", \"answers\": [\"c\"]}\n{\"input\": 3}\n");
  const Status status = MakeTask(*tokenizer_, Spec("longbench:qasper")).status();
  EXPECT_EQ(status.code(), StatusCode::kDataLoss);
  EXPECT_THAT(status.message(), HasSubstr("qasper.jsonl:2"));
  EXPECT_THAT(MakeTask(*tokenizer_, Spec("longbench:none")).status().message(),
              HasSubstr("narrativeqa"));
  EXPECT_THAT(MakeTask(*tokenizer_, Spec("nothing")).status().message(),
              HasSubstr("niah_single_1"));
}

TEST_F(Task, StateTrackingFollowsItsOwnSteps) {
  const TaskSample sample = Make(Spec("state", 4000, 12))[0];
  EXPECT_TRUE(sample.chained && sample.feed_answers);
  ASSERT_EQ(sample.turns.size(), 12u);
  const std::string text = Text(sample.document);
  int value = std::atoi(text.c_str() + text.find("starts at ") + 10);
  for (int i = 0; i < 12; ++i) {
    const std::string step = "Step " + std::to_string(i + 1) + ": ";
    const size_t at = text.find(step);
    ASSERT_NE(at, std::string::npos);
    const std::string rest = text.substr(at + step.size());
    value += rest.starts_with("add ") ? std::atoi(rest.c_str() + 4) : -std::atoi(rest.c_str() + 9);
    EXPECT_EQ(sample.turns[static_cast<size_t>(i)].answers[0], std::to_string(value));
  }
}

TEST_F(Task, LongAnswersAreCheckedEntryByEntry) {
  TaskSpec spec = Spec("longgen");
  spec.write_tokens = 160;
  const TaskSample sample = Make(spec)[0];
  ASSERT_EQ(sample.turns[0].answers.size(), 10u);
  EXPECT_NEAR(ScoreTurn(sample, sample.turns[0],
                        sample.turns[0].answers[3] + " " + sample.turns[0].answers[7], {}),
              0.2, 0.11);
  const TaskSample dialogue = Make(Spec("dialogue"))[0];
  EXPECT_TRUE(dialogue.chained);
  EXPECT_EQ(dialogue.turns.size(), 2u);
}

class RecallTask : public ::testing::Test {
 protected:
  std::unique_ptr<Tokenizer> tokenizer_;
  void SetUp() override {
    const char* source = std::getenv("ICECACHE_SOURCE_DIR");
    const std::string root = source == nullptr ? "." : source;
    auto tokenizer = Tokenizer::Load(root + "/tests/models/recall");
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status().ToString();
    tokenizer_ = std::move(tokenizer).value();
  }
  TaskSample Make(const std::string& name) const {
    TaskSpec spec;
    spec.name = name;
    spec.length = 1024;
    spec.seed = 3;
    spec.write_tokens = 40;
    auto samples = MakeTask(*tokenizer_, spec);
    EXPECT_TRUE(samples.ok()) << samples.status().ToString();
    return std::move(samples).value().at(0);
  }
};

TEST_F(RecallTask, MultikeyNamesShareAHalf) {
  const TaskSample sample = Make("multikey");
  ASSERT_EQ(sample.turns.size(), 16u);
  // <ask> NAME: one of the sixteen first or last letters is common to all.
  std::set<std::string> first, last;
  for (const TaskTurn& turn : sample.turns) {
    const std::string name = tokenizer_->Decode({&turn.tokens.back(), 1}, false);
    first.insert(name.substr(0, 3));
    last.insert(name.substr(name.size() - 3));
  }
  EXPECT_TRUE(first.size() == 1 || last.size() == 1);
}

TEST_F(RecallTask, TasksOverOneDocumentShareIt) {
  const TaskSample single = Make("single");
  for (const char* name : {"multiturn", "walk", "text"}) {
    const TaskSample other = Make(name);
    EXPECT_EQ(other.document, single.document) << name;
    EXPECT_TRUE(other.chained) << name;
  }
  EXPECT_EQ(Make("text").turns.size(), 40u);
  EXPECT_FALSE(Make("walk").next.empty());
  EXPECT_NE(Make("crowded").document, single.document);
}

}  // namespace
}  // namespace icecache
