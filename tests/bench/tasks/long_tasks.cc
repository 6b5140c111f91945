// Tasks in which one answer builds on another.
//
//   longgen    a list of instructions, all to be answered in one long reply (after LongGenBench,
//              Liu et al. 2024): each entry of the reply is checked, early gaps cost all that
//              follow
//   state      written-out state tracking: a program of assignments is run step by step, every step
//              reads the state that the model itself wrote before, so early mistakes compound
//   dialogue   questions in turn over one shared document, each after the answers to those before
//              (after SCBench, Li et al. 2024)
#include <algorithm>

#include "tests/bench/tasks/haystack.h"
#include "tests/bench/tasks/task.h"

namespace icecache {
namespace {

constexpr uint32_t kTokensPerEntry = 16, kAnswerTokens = 16;

Result<TaskTurn> MakeTurn(const Tokenizer& tokenizer, const std::string& text, uint32_t new_tokens,
                          std::vector<std::string> answers) {
  TaskTurn turn;
  KV_ASSIGN_OR_RETURN(turn.tokens, tokenizer.Encode(text, false));
  turn.new_tokens = new_tokens;
  turn.answers = std::move(answers);
  return turn;
}

// instruction + a haystack with `needles`, `rest` tokens less than the length.
Result<std::vector<int32_t>> MakeDocument(const Tokenizer& tokenizer, const TaskSpec& spec,
                                          const std::string& instruction,
                                          std::vector<std::string> needles, bool keep_order,
                                          uint32_t rest, TraceRandom& random) {
  KV_ASSIGN_OR_RETURN(const std::vector<std::string> sentences, ReadSentences(spec.text_files));
  KV_ASSIGN_OR_RETURN(const std::vector<int32_t> frame, tokenizer.Encode(instruction, true));
  HaystackSpec hay;
  hay.sentences = &sentences;
  hay.needles = std::move(needles);
  hay.tokens = spec.length;
  hay.frame_tokens = static_cast<uint32_t>(frame.size()) + rest + 1;
  hay.keep_order = keep_order;
  KV_ASSIGN_OR_RETURN(const std::string text, MakeHaystack(tokenizer, random, hay));
  return tokenizer.Encode(instruction + "\n" + text, true);
}

struct Entries {
  std::vector<std::string> names, values, needles;
};

Entries DrawEntries(uint32_t count, TraceRandom& random) {
  Entries entries;
  for (uint32_t i = 0; i < count; ++i) {
    entries.names.push_back(RandomWord(random, 3));
    entries.values.push_back(RandomNumber(random, 4));
    entries.needles.push_back("Entry " + std::to_string(i + 1) + ": the code of " +
                              entries.names.back() + " is " + entries.values.back() + ".");
  }
  return entries;
}

Result<std::vector<TaskSample>> LongGen(const Tokenizer& tokenizer, const TaskSpec& spec) {
  TraceRandom random(spec.seed);
  const uint32_t count = std::max(1u, spec.write_tokens / kTokensPerEntry);
  const Entries entries = DrawEntries(count, random);
  TaskSample sample;
  sample.metric = Metric::kAll;
  KV_ASSIGN_OR_RETURN(sample.document,
                      MakeDocument(tokenizer, spec, "Codes are scattered in the following text.",
                                   entries.needles, true, spec.write_tokens + 40, random));
  KV_ASSIGN_OR_RETURN(
      TaskTurn turn,
      MakeTurn(tokenizer,
               "Write all entries again in their order, one a line, from Entry 1 to Entry " +
                   std::to_string(count) + ".\nEntry 1:",
               spec.write_tokens, entries.values));
  sample.turns.push_back(std::move(turn));
  return std::vector<TaskSample>{std::move(sample)};
}

Result<std::vector<TaskSample>> State(const Tokenizer& tokenizer, const TaskSpec& spec) {
  TraceRandom random(spec.seed);
  std::vector<std::string> steps, states;
  uint32_t value = 10 + random.Below(80);
  const std::string start = std::to_string(value);
  for (uint32_t i = 0; i < spec.questions; ++i) {
    const uint32_t by = 1 + random.Below(9);
    const bool add = value < by + 10 || random.Chance(0.5f);
    value = add ? value + by : value - by;
    steps.push_back("Step " + std::to_string(i + 1) + ": " + (add ? "add " : "subtract ") +
                    std::to_string(by) + ".");
    states.push_back(std::to_string(value));
  }
  TaskSample sample;
  sample.metric = Metric::kCount;  // the number that was said is the state
  sample.chained = true;
  KV_ASSIGN_OR_RETURN(
      sample.document,
      MakeDocument(tokenizer, spec,
                   "A counter starts at " + start +
                       ". The steps that change it are scattered in the following text.",
                   steps, true, spec.questions * 32, random));
  for (uint32_t i = 0; i < spec.questions; ++i) {
    KV_ASSIGN_OR_RETURN(
        TaskTurn turn,
        MakeTurn(tokenizer, "\nAfter step " + std::to_string(i + 1) + " it is", 6, {states[i]}));
    sample.turns.push_back(std::move(turn));
  }
  return std::vector<TaskSample>{std::move(sample)};
}

Result<std::vector<TaskSample>> Dialogue(const Tokenizer& tokenizer, const TaskSpec& spec) {
  TraceRandom random(spec.seed);
  const Entries entries = DrawEntries(spec.questions, random);
  TaskSample sample;
  sample.metric = Metric::kAll;
  sample.chained = true;
  KV_ASSIGN_OR_RETURN(
      sample.document,
      MakeDocument(tokenizer, spec, "Codes are scattered in the following text.", entries.needles,
                   false, spec.questions * (kAnswerTokens + 16), random));
  for (uint32_t i = 0; i < spec.questions; ++i) {
    KV_ASSIGN_OR_RETURN(TaskTurn turn,
                        MakeTurn(tokenizer, "\nWhat is the code of " + entries.names[i] + "? It is",
                                 kAnswerTokens, {entries.values[i]}));
    sample.turns.push_back(std::move(turn));
  }
  return std::vector<TaskSample>{std::move(sample)};
}

}  // namespace

std::vector<TaskKind> LongTasks() {
  return {{"longgen", LongGen}, {"state", State}, {"dialogue", Dialogue}};
}

}  // namespace icecache
