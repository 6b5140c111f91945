// Tasks for tests/models/recall, in the very form it was trained on: facts about named animals in
// real text, asked for by name.
#include <algorithm>

#include "tests/bench/tasks/haystack.h"
#include "tests/bench/tasks/task.h"
#include "worker/serve/recall_document.h"

namespace icecache {
namespace {

constexpr uint32_t kFacts = 16, kCrowd = 64;

Result<RecallDocument> Document(const Tokenizer& tokenizer, const TaskSpec& spec, uint32_t facts,
                                bool alike) {
  return MakeRecallDocument(tokenizer, {.text_files = spec.text_files,
                                        .tokens = spec.length,
                                        .facts = facts,
                                        .seed = spec.seed,
                                        .alike = alike});
}

Result<std::vector<TaskSample>> Ask(const Tokenizer& tokenizer, const TaskSpec& spec,
                                    uint32_t facts, bool alike) {
  KV_ASSIGN_OR_RETURN(const RecallDocument document, Document(tokenizer, spec, facts, alike));
  TaskSample sample;
  sample.document = document.tokens;
  const size_t count = std::min<size_t>(spec.questions, document.questions.size());
  for (size_t i = 0; i < count; ++i) {
    const RecallQuestion& question = document.questions[i];
    TaskTurn turn;
    turn.tokens = question.tokens;
    turn.answer_tokens = question.answer;
    turn.new_tokens = static_cast<uint32_t>(question.answer.size());
    sample.turns.push_back(std::move(turn));
  }
  return std::vector<TaskSample>{std::move(sample)};
}

Result<std::vector<TaskSample>> Single(const Tokenizer& tokenizer, const TaskSpec& spec) {
  return Ask(tokenizer, spec, kFacts, false);
}
Result<std::vector<TaskSample>> MultiKey(const Tokenizer& tokenizer, const TaskSpec& spec) {
  return Ask(tokenizer, spec, kFacts, true);
}
Result<std::vector<TaskSample>> Crowded(const Tokenizer& tokenizer, const TaskSpec& spec) {
  return Ask(tokenizer, spec, kCrowd, false);
}

// All questions one after the other: those answered before are part of the context.
Result<std::vector<TaskSample>> MultiTurn(const Tokenizer& tokenizer, const TaskSpec& spec) {
  KV_ASSIGN_OR_RETURN(std::vector<TaskSample> samples, Single(tokenizer, spec));
  samples[0].chained = true;
  return samples;
}

// What is asked next depends on the answer: whoever errs once is asked other questions from there
// on, and answers that are right for those do not count.
Result<std::vector<TaskSample>> Walk(const Tokenizer& tokenizer, const TaskSpec& spec) {
  KV_ASSIGN_OR_RETURN(std::vector<TaskSample> samples, MultiTurn(tokenizer, spec));
  TaskSample& sample = samples[0];
  const auto count = static_cast<uint32_t>(sample.turns.size());
  for (uint32_t i = 0; i < count; ++i) {
    // Any answer leads somewhere; the right one of turn i usually, not always, to turn i + 1.
    sample.next.emplace(sample.turns[i].answer_tokens[0], (i + 1) % count);
  }
  return samples;
}

// Real text goes on after the document; the next token is predicted at every step. Scored as
// agreement with full attention: how far does what was left out change what the model says?
Result<std::vector<TaskSample>> Text(const Tokenizer& tokenizer, const TaskSpec& spec) {
  KV_ASSIGN_OR_RETURN(std::vector<TaskSample> samples, MultiTurn(tokenizer, spec));
  TaskSample& sample = samples[0];
  sample.metric = Metric::kAgreement;
  sample.feed_answers = false;
  sample.turns.clear();
  KV_ASSIGN_OR_RETURN(const std::vector<std::string> sentences, ReadSentences(spec.text_files));
  TraceRandom random(spec.seed + 1000);
  for (size_t at = random.Below(static_cast<uint32_t>(sentences.size()));
       sample.turns.size() < spec.write_tokens; ++at) {
    KV_ASSIGN_OR_RETURN(const std::vector<int32_t> tokens,
                        tokenizer.Encode(sentences[at % sentences.size()], false));
    for (const int32_t token : tokens) {
      if (sample.turns.size() == spec.write_tokens) break;
      TaskTurn turn;
      turn.tokens = {token};
      sample.turns.push_back(std::move(turn));
    }
  }
  return samples;
}

}  // namespace

std::vector<TaskKind> RecallTasks() {
  return {{"single", Single},       {"multikey", MultiKey}, {"crowded", Crowded},
          {"multiturn", MultiTurn}, {"walk", Walk},         {"text", Text}};
}

}  // namespace icecache
