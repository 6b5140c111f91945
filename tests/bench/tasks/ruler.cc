// RULER's thirteen tasks (Hsieh et al. 2024, arXiv 2404.06654) made anew from their definitions,
// and passkey retrieval (Mohtashami and Jaggi 2023). Numbers of needles, hops, frequencies and
// tokens to say are the published ones; the wording is ours. One question per document.
#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "tests/bench/tasks/haystack.h"
#include "tests/bench/tasks/task.h"
#include "worker/serve/options.h"

namespace icecache {
namespace {

constexpr uint32_t kNeedleTokens = 128, kTrackingTokens = 30, kCommonTokens = 120,
                   kFrequentTokens = 50, kQaTokens = 32, kPasskeyTokens = 16;

struct Prompt {
  std::string instruction;  // before the document
  std::string document;
  std::string question;  // after it, read sparsely
  std::vector<std::string> answers;
  Metric metric = Metric::kAll;
  uint32_t new_tokens = 0;
};

Result<uint32_t> CountTokens(const Tokenizer& tokenizer, const std::string& text) {
  KV_ASSIGN_OR_RETURN(const std::vector<int32_t> tokens, tokenizer.Encode(text, false));
  return static_cast<uint32_t>(tokens.size());
}

// What instruction, question and answer take.
Result<uint32_t> FrameTokens(const Tokenizer& tokenizer, const Prompt& prompt) {
  KV_ASSIGN_OR_RETURN(const uint32_t tokens,
                      CountTokens(tokenizer, prompt.instruction + "\n" + prompt.question));
  return tokens + prompt.new_tokens + 2;  // <bos>, and the space between parts
}

Result<TaskSample> MakeSample(const Tokenizer& tokenizer, const Prompt& prompt) {
  TaskSample sample;
  sample.metric = prompt.metric;
  KV_ASSIGN_OR_RETURN(sample.document,
                      tokenizer.Encode(prompt.instruction + "\n" + prompt.document + "\n", true));
  TaskTurn turn;
  KV_ASSIGN_OR_RETURN(turn.tokens, tokenizer.Encode(prompt.question, false));
  turn.new_tokens = prompt.new_tokens;
  turn.answers = prompt.answers;
  sample.turns.push_back(std::move(turn));
  return sample;
}

using Draw = Result<Prompt> (*)(const Tokenizer&, const TaskSpec&, TraceRandom&);

template <Draw draw>
Result<std::vector<TaskSample>> Samples(const Tokenizer& tokenizer, const TaskSpec& spec) {
  std::vector<TaskSample> samples;
  TraceRandom random(spec.seed);
  for (uint32_t i = 0; i < spec.questions; ++i) {
    KV_ASSIGN_OR_RETURN(const Prompt prompt, draw(tokenizer, spec, random));
    KV_ASSIGN_OR_RETURN(TaskSample sample, MakeSample(tokenizer, prompt));
    samples.push_back(std::move(sample));
  }
  return samples;
}

enum class Hay { kNoise, kText, kNeedles };
enum class Value { kNumber, kUuid };
struct Niah {
  Hay hay = Hay::kText;
  Value value = Value::kNumber;
  bool uuid_keys = false;
  uint32_t keys = 1, values = 1, queries = 1;
};

const std::vector<std::string> kNoiseSentences = {"The grass is green.", "The sky is blue.",
                                                  "The sun is yellow.", "Here we go.",
                                                  "There and back again."};

std::string KeyOf(const Niah& niah, TraceRandom& random) {
  return niah.uuid_keys ? RandomUuid(random) : RandomWord(random, 3);
}
std::string ValueOf(const Niah& niah, TraceRandom& random) {
  return niah.value == Value::kUuid ? RandomUuid(random) : RandomNumber(random, 7);
}
std::string Needle(const Niah& niah, const std::string& key, const std::string& value) {
  return std::string("The special magic ") + (niah.value == Value::kUuid ? "code" : "number") +
         " for " + key + " is: " + value + ".";
}

// Distractors of the same form, as many as fit.
std::vector<std::string> NeedleHay(const Niah& niah, uint32_t count, TraceRandom& random) {
  std::vector<std::string> hay;
  for (uint32_t i = 0; i < count; ++i)
    hay.push_back(Needle(niah, KeyOf(niah, random), ValueOf(niah, random)));
  return hay;
}

Result<Prompt> DrawNiah(const Tokenizer& tokenizer, const TaskSpec& spec, const Niah& niah,
                        TraceRandom& random) {
  Prompt prompt;
  prompt.new_tokens = kNeedleTokens;
  prompt.instruction =
      "Some special magic values are hidden in the following text. Remember them; you will be "
      "asked for them afterwards.";
  HaystackSpec hay;
  std::vector<std::string> asked;
  for (uint32_t k = 0; k < std::max(niah.keys, niah.queries); ++k) {
    const std::string key = KeyOf(niah, random);
    const bool wanted = k < niah.queries;
    if (wanted) asked.push_back(key);
    for (uint32_t v = 0; v < niah.values; ++v) {
      const std::string value = ValueOf(niah, random);
      hay.needles.push_back(Needle(niah, key, value));
      if (wanted) prompt.answers.push_back(value);
    }
  }
  std::string names;
  for (size_t i = 0; i < asked.size(); ++i) names += (i == 0 ? "" : ", ") + asked[i];
  prompt.question = "What are all the special magic values for " + names +
                    " in the text above? The special magic values for " + names + " are";
  std::vector<std::string> sentences = kNoiseSentences;
  if (niah.hay == Hay::kText) {
    KV_ASSIGN_OR_RETURN(sentences, ReadSentences(spec.text_files));
  } else if (niah.hay == Hay::kNeedles) {
    sentences = NeedleHay(niah, spec.length / 8 + 1, random);
  }
  hay.sentences = &sentences;
  hay.tokens = spec.length;
  KV_ASSIGN_OR_RETURN(hay.frame_tokens, FrameTokens(tokenizer, prompt));
  KV_ASSIGN_OR_RETURN(prompt.document, MakeHaystack(tokenizer, random, hay));
  return prompt;
}

template <Hay hay, Value value, bool uuid_keys, uint32_t keys, uint32_t values, uint32_t queries>
Result<Prompt> NiahOf(const Tokenizer& tokenizer, const TaskSpec& spec, TraceRandom& random) {
  return DrawNiah(tokenizer, spec, {hay, value, uuid_keys, keys, values, queries}, random);
}

Result<Prompt> Passkey(const Tokenizer& tokenizer, const TaskSpec& spec, TraceRandom& random) {
  Prompt prompt;
  prompt.new_tokens = kPasskeyTokens;
  prompt.instruction =
      "There is important information hidden in a lot of irrelevant text. Find it and memorise it.";
  const std::string key = RandomNumber(random, 5);
  prompt.question = "What is the pass key? The pass key is";
  prompt.answers = {key};
  HaystackSpec hay;
  hay.needles = {"The pass key is " + key + ". Remember it. " + key + " is the pass key."};
  hay.sentences = &kNoiseSentences;
  hay.tokens = spec.length;
  KV_ASSIGN_OR_RETURN(hay.frame_tokens, FrameTokens(tokenizer, prompt));
  KV_ASSIGN_OR_RETURN(prompt.document, MakeHaystack(tokenizer, random, hay));
  return prompt;
}

// One chain of five variables, told in order; distractor chains of their own do not exist in the
// published setting.
Result<Prompt> VariableTracking(const Tokenizer& tokenizer, const TaskSpec& spec,
                                TraceRandom& random) {
  constexpr int kHops = 4;
  Prompt prompt;
  prompt.new_tokens = kTrackingTokens;
  prompt.instruction =
      "Memorise and track the chain of variable assignments hidden in the following text.";
  const std::string value = RandomNumber(random, 5);
  HaystackSpec hay;
  std::set<std::string> names;
  std::string last = value;
  for (int hop = 0; hop <= kHops; ++hop) {
    std::string name;
    do {
      name.clear();
      for (int i = 0; i < 5; ++i) name += static_cast<char>('A' + random.Below(26));
    } while (!names.insert(name).second);
    hay.needles.push_back("VAR " + name + " = " + (hop == 0 ? "" : "VAR ") + last + ".");
    prompt.answers.push_back(name);
    last = name;
  }
  prompt.question = "Find all variables that are assigned the value " + value +
                    " in the text above. Five variables have this value; they are:";
  hay.keep_order = true;
  hay.sentences = &kNoiseSentences;
  hay.tokens = spec.length;
  KV_ASSIGN_OR_RETURN(hay.frame_tokens, FrameTokens(tokenizer, prompt));
  KV_ASSIGN_OR_RETURN(prompt.document, MakeHaystack(tokenizer, random, hay));
  return prompt;
}

// A numbered list in which ten words stand thirty times and all others three times.
Result<Prompt> CommonWords(const Tokenizer& tokenizer, const TaskSpec& spec, TraceRandom& random) {
  constexpr uint32_t kCommon = 10, kOften = 30, kSeldom = 3;
  Prompt prompt;
  prompt.new_tokens = kCommonTokens;
  prompt.instruction =
      "Below is a numbered list of words. Some of them appear more often than others. Memorise the "
      "ones that appear most often.";
  prompt.question = "What are the 10 most common words in the list above? The top 10 words are:";
  KV_ASSIGN_OR_RETURN(uint32_t used, FrameTokens(tokenizer, prompt));
  std::vector<std::string> list;
  std::set<std::string> taken;
  const auto add = [&](uint32_t times) -> Result<bool> {  // false: does not fit
    std::string word;
    do word = RandomWord(random, 3);
    while (!taken.insert(word).second);
    KV_ASSIGN_OR_RETURN(const uint32_t tokens, CountTokens(tokenizer, "1234. " + word + " "));
    if (used + times * tokens > spec.length) return false;
    used += times * tokens;
    for (uint32_t i = 0; i < times; ++i) list.push_back(word);
    if (times == kOften) prompt.answers.push_back(word);
    return true;
  };
  for (uint32_t i = 0; i < kCommon; ++i) {
    KV_ASSIGN_OR_RETURN(const bool fits, add(kOften));
    if (!fits)
      return InvalidArgument("length " + std::to_string(spec.length) +
                             ": too short for ten words thirty times; give a larger --lengths");
  }
  for (bool fits = true; fits;) {
    KV_ASSIGN_OR_RETURN(fits, add(kSeldom));
  }
  Shuffle(random, &list);
  for (size_t i = 0; i < list.size(); ++i)
    prompt.document += std::to_string(i + 1) + ". " + list[i] + " ";
  return prompt;
}

// Coded words whose frequencies fall as rank^-2; the first rank is noise.
Result<Prompt> FrequentWords(const Tokenizer& tokenizer, const TaskSpec& spec,
                             TraceRandom& random) {
  constexpr double kAlpha = 2.0;
  constexpr uint32_t kWords = 2000, kAsked = 3;
  Prompt prompt;
  prompt.new_tokens = kFrequentTokens;
  prompt.instruction = "Read the following coded text and track the frequency of each coded word.";
  prompt.question =
      "Ignore the dots. What are the three most frequently appeared words in the coded text above? "
      "The three most frequently appeared words are:";
  KV_ASSIGN_OR_RETURN(uint32_t used, FrameTokens(tokenizer, prompt));
  std::vector<std::string> words = {"..."};
  std::vector<double> until = {1};  // cumulated weights
  std::set<std::string> taken;
  while (words.size() < kWords) {
    const std::string word = RandomWord(random, 3);
    if (!taken.insert(word).second) continue;
    words.push_back(word);
    until.push_back(until.back() + std::pow(static_cast<double>(words.size()), -kAlpha));
  }
  std::map<std::string, uint32_t> seen;
  while (true) {
    const double at = random.Uniform() * until.back();
    const auto rank = std::upper_bound(until.begin(), until.end(), at) - until.begin();
    const std::string& word = words[std::min<size_t>(static_cast<size_t>(rank), words.size() - 1)];
    KV_ASSIGN_OR_RETURN(const uint32_t tokens, CountTokens(tokenizer, word + " "));
    if (used + tokens > spec.length) break;
    used += std::max(1u, tokens);
    prompt.document += word + " ";
    ++seen[word];
  }
  seen.erase("...");
  std::vector<std::pair<uint32_t, std::string>> ranked;
  for (const auto& [word, times] : seen) ranked.emplace_back(times, word);
  std::sort(ranked.begin(), ranked.end(), [](const auto& a, const auto& b) {
    return a.first != b.first ? a.first > b.first : a.second < b.second;
  });
  for (size_t i = 0; i < std::min<size_t>(kAsked, ranked.size()); ++i)
    prompt.answers.push_back(ranked[i].second);
  return prompt;
}

struct Passages {
  struct Question {
    std::string text;
    std::vector<std::string> answers, passages;  // passages that it needs
  };
  std::vector<Question> questions;
  std::vector<std::string> all;
};

// SQuAD: data[].paragraphs[].{context, qas[].{question, answers[].text}}.
// HotpotQA: [].{question, answer, context[][title, sentences[]]}.
Result<Passages> ReadPassages(const std::string& path, bool squad) {
  Result<std::string> text = ReadTextFile(path);
  if (!text.ok()) {
    return NotFound(
        text.status().message() + "; put the public " +
        (squad ? "SQuAD file there as squad.json" : "HotpotQA file there as hotpotqa.json") +
        " and name the folder with --data");
  }
  Passages passages;
  try {
    const nlohmann::json json = nlohmann::json::parse(*text);
    if (squad) {
      for (const auto& article : json.at("data")) {
        for (const auto& paragraph : article.at("paragraphs")) {
          passages.all.push_back(paragraph.at("context"));
          for (const auto& qa : paragraph.at("qas")) {
            Passages::Question question{qa.at("question"), {}, {passages.all.back()}};
            for (const auto& answer : qa.at("answers"))
              question.answers.push_back(answer.at("text"));
            if (!question.answers.empty()) passages.questions.push_back(std::move(question));
          }
        }
      }
    } else {
      for (const auto& entry : json) {
        Passages::Question question{entry.at("question"), {entry.at("answer")}, {}};
        for (const auto& part : entry.at("context")) {
          std::string passage = part.at(0).get<std::string>() + "\n";
          for (const auto& sentence : part.at(1)) passage += sentence.get<std::string>();
          passages.all.push_back(passage);
          question.passages.push_back(std::move(passage));
        }
        passages.questions.push_back(std::move(question));
      }
    }
  } catch (const nlohmann::json::exception& error) {
    return DataLoss(path + ": " + error.what());
  }
  if (passages.questions.empty()) return DataLoss(path + ": no question with an answer");
  return passages;
}

template <bool squad>
Result<Prompt> Qa(const Tokenizer& tokenizer, const TaskSpec& spec, TraceRandom& random) {
  KV_ASSIGN_OR_RETURN(const Passages passages,
                      ReadPassages(spec.data + (squad ? "/squad.json" : "/hotpotqa.json"), squad));
  const Passages::Question& asked =
      passages.questions[random.Below(static_cast<uint32_t>(passages.questions.size()))];
  Prompt prompt;
  prompt.new_tokens = kQaTokens;
  prompt.metric = Metric::kAny;
  prompt.answers = asked.answers;
  prompt.instruction =
      "Answer the question from the given documents. Give only the answer and no other words.";
  prompt.question = "Question: " + asked.text + " Answer:";
  KV_ASSIGN_OR_RETURN(uint32_t used, FrameTokens(tokenizer, prompt));
  std::vector<std::string> documents = asked.passages;
  for (const std::string& passage : documents) {
    KV_ASSIGN_OR_RETURN(const uint32_t tokens, CountTokens(tokenizer, "Document 100:\n" + passage));
    used += tokens + 1;
  }
  if (used > spec.length)
    return InvalidArgument("length " + std::to_string(spec.length) +
                           ": the passages of one question take " + std::to_string(used));
  std::set<std::string> taken(documents.begin(), documents.end());
  for (size_t tries = 0; tries < 4 * passages.all.size(); ++tries) {
    const std::string& passage =
        passages.all[random.Below(static_cast<uint32_t>(passages.all.size()))];
    if (taken.contains(passage)) continue;
    KV_ASSIGN_OR_RETURN(const uint32_t tokens, CountTokens(tokenizer, "Document 100:\n" + passage));
    if (used + tokens + 1 > spec.length) break;
    used += tokens + 1;
    documents.push_back(passage);
    taken.insert(passage);
  }
  Shuffle(random, &documents);
  for (size_t i = 0; i < documents.size(); ++i)
    prompt.document += "Document " + std::to_string(i + 1) + ":\n" + documents[i] + "\n";
  return prompt;
}

}  // namespace

std::vector<TaskKind> RulerTasks() {
  using enum Hay;
  using enum Value;
  return {{"niah_single_1", Samples<NiahOf<kNoise, kNumber, false, 1, 1, 1>>},
          {"niah_single_2", Samples<NiahOf<kText, kNumber, false, 1, 1, 1>>},
          {"niah_single_3", Samples<NiahOf<kText, kUuid, false, 1, 1, 1>>},
          {"niah_multikey_1", Samples<NiahOf<kText, kNumber, false, 4, 1, 1>>},
          {"niah_multikey_2", Samples<NiahOf<kNeedles, kNumber, false, 1, 1, 1>>},
          {"niah_multikey_3", Samples<NiahOf<kNeedles, kUuid, true, 1, 1, 1>>},
          {"niah_multivalue", Samples<NiahOf<kText, kNumber, false, 1, 4, 1>>},
          {"niah_multiquery", Samples<NiahOf<kText, kNumber, false, 1, 1, 4>>},
          {"vt", Samples<VariableTracking>},
          {"cwe", Samples<CommonWords>},
          {"fwe", Samples<FrequentWords>},
          {"qa_1", Samples<Qa<true>>},
          {"qa_2", Samples<Qa<false>>},
          {"passkey", Samples<Passkey>}};
}

}  // namespace icecache
