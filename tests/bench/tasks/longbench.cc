// longbench:NAME: LongBench (Bai et al. 2023, arXiv 2308.14508) from its public data files.
//
// --data names the folder with NAME.jsonl (one object a line: input, context, answers,
// all_classes). Prompts and answer lengths come from dataset2prompt.json and dataset2maxlen.json of
// the same release when they lie there; else from the few below. A prompt longer than --lengths
// loses its middle, as in the release. Scores: the published metric of each task (task_metrics.h).
#include <algorithm>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>

#include "tests/bench/tasks/haystack.h"
#include "tests/bench/tasks/task.h"
#include "worker/serve/options.h"

namespace icecache {
namespace {

struct Kind {
  Metric metric;
  uint32_t new_tokens;
  const char* prompt;  // {context} and {input} are replaced
};

constexpr const char* kAsk =
    "Read the text and answer the question as briefly as you can.\n\n{context}\n\nQuestion: "
    "{input}\nAnswer:";
constexpr const char* kSum = "{context}\n\nWrite a summary of the text above. {input}\nSummary:";
constexpr const char* kFew = "{context}\n{input}";

const std::map<std::string, Kind>& Kinds() {
  static const std::map<std::string, Kind> kinds = {
      {"narrativeqa", {Metric::kF1, 128, kAsk}},
      {"qasper", {Metric::kF1, 128, kAsk}},
      {"multifieldqa_en", {Metric::kF1, 64, kAsk}},
      {"hotpotqa", {Metric::kF1, 32, kAsk}},
      {"2wikimqa", {Metric::kF1, 32, kAsk}},
      {"musique", {Metric::kF1, 32, kAsk}},
      {"gov_report", {Metric::kRougeL, 512, kSum}},
      {"qmsum", {Metric::kRougeL, 512, kAsk}},
      {"multi_news", {Metric::kRougeL, 512, kSum}},
      {"trec", {Metric::kClass, 64, kFew}},
      {"triviaqa", {Metric::kF1, 32, kFew}},
      {"samsum", {Metric::kRougeL, 128, kFew}},
      {"passage_count",
       {Metric::kCount, 32,
        "{context}\n\nHow many different paragraphs stand above? Give only the number.\nAnswer:"}},
      {"passage_retrieval_en",
       {Metric::kRetrieval, 32,
        "{context}\n\nWhich paragraph does this summary belong to?\n{input}\nAnswer: Paragraph"}},
      {"lcc", {Metric::kCode, 64, "{context}{input}"}},
      {"repobench-p", {Metric::kCode, 64, "{context}{input}"}}};
  return kinds;
}

std::string Replace(std::string text, const std::string& name, const std::string& value) {
  const size_t at = text.find(name);
  if (at != std::string::npos) text.replace(at, name.size(), value);
  return text;
}

// What the release's own files say of this task, if they are there.
Status ReadRelease(const std::string& folder, const std::string& name, std::string* prompt,
                   uint32_t* new_tokens) {
  const auto read = [&](const std::string& file, const auto& take) -> Status {
    const Result<std::string> text = ReadTextFile(folder + "/" + file);
    if (!text.ok()) return OkStatus();
    try {
      const nlohmann::json json = nlohmann::json::parse(*text);
      if (json.contains(name)) take(json.at(name));
    } catch (const nlohmann::json::exception& error) {
      return DataLoss(folder + "/" + file + ": " + error.what());
    }
    return OkStatus();
  };
  KV_RETURN_IF_ERROR(read("dataset2prompt.json", [&](const nlohmann::json& j) { *prompt = j; }));
  return read("dataset2maxlen.json", [&](const nlohmann::json& j) { *new_tokens = j; });
}

struct Entry {
  std::string input, context;
  std::vector<std::string> answers, classes;
};

Result<std::vector<Entry>> ReadEntries(const std::string& path) {
  std::ifstream file(path);
  if (!file) {
    return NotFound("cannot read '" + path +
                    "'; --data must name the folder with LongBench's public data files");
  }
  std::vector<Entry> entries;
  std::string line;
  for (int number = 1; std::getline(file, line); ++number) {
    if (line.empty()) continue;
    try {
      const nlohmann::json json = nlohmann::json::parse(line);
      Entry entry{json.at("input"), json.at("context"), json.at("answers"), {}};
      if (json.contains("all_classes") && json.at("all_classes").is_array())
        entry.classes = json.at("all_classes").get<std::vector<std::string>>();
      entries.push_back(std::move(entry));
    } catch (const nlohmann::json::exception& error) {
      return DataLoss(path + ":" + std::to_string(number) + ": " + error.what());
    }
  }
  if (entries.empty()) return DataLoss(path + ": holds no entry");
  return entries;
}

// The document ends where the context does; what comes after it is read sparsely.
Result<TaskSample> MakeSample(const Tokenizer& tokenizer, const Entry& entry,
                              const std::string& prompt, uint32_t length, const Kind& kind) {
  const size_t split = prompt.find("{context}");
  const std::string before =
      split == std::string::npos ? prompt : prompt.substr(0, split) + entry.context;
  const std::string after = split == std::string::npos ? "" : prompt.substr(split + 9);
  TaskSample sample;
  sample.metric = kind.metric;
  KV_ASSIGN_OR_RETURN(sample.document,
                      tokenizer.Encode(Replace(before, "{input}", entry.input), true));
  TaskTurn turn;
  KV_ASSIGN_OR_RETURN(turn.tokens, tokenizer.Encode(Replace(after, "{input}", entry.input), false));
  if (turn.tokens.empty()) {  // the prompt ends with the context
    turn.tokens.push_back(sample.document.back());
    sample.document.pop_back();
  }
  const size_t rest = turn.tokens.size() + kind.new_tokens;
  const size_t room = length > rest ? length - rest : 0;
  if (room < 2) return InvalidArgument("length " + std::to_string(length) + " is too short");
  if (sample.document.size() > room) {
    const auto head = static_cast<ptrdiff_t>(room / 2),
               tail = static_cast<ptrdiff_t>(room - room / 2);
    sample.document.erase(sample.document.begin() + head, sample.document.end() - tail);
  }
  turn.new_tokens = kind.new_tokens;
  turn.answers = entry.answers;
  turn.classes = entry.classes;
  sample.turns.push_back(std::move(turn));
  return sample;
}

Result<std::vector<TaskSample>> LongBench(const Tokenizer& tokenizer, const TaskSpec& spec) {
  const std::string name = spec.name.substr(spec.name.find(':') + 1);
  const auto found = Kinds().find(name);
  if (found == Kinds().end()) {
    std::string names;
    for (const auto& [known, unused] : Kinds()) names += (names.empty() ? "" : ", ") + known;
    return InvalidArgument("longbench task '" + name + "' is unknown; use one of: " + names);
  }
  Kind kind = found->second;
  std::string prompt = kind.prompt;
  KV_RETURN_IF_ERROR(ReadRelease(spec.data, name, &prompt, &kind.new_tokens));
  KV_ASSIGN_OR_RETURN(std::vector<Entry> entries, ReadEntries(spec.data + "/" + name + ".jsonl"));
  TraceRandom random(spec.seed);
  Shuffle(random, &entries);
  if (entries.size() > spec.questions) entries.resize(spec.questions);
  std::vector<TaskSample> samples;
  for (const Entry& entry : entries) {
    KV_ASSIGN_OR_RETURN(TaskSample sample, MakeSample(tokenizer, entry, prompt, spec.length, kind));
    samples.push_back(std::move(sample));
  }
  return samples;
}

}  // namespace

std::vector<TaskKind> LongBenchTasks() { return {{"longbench:", LongBench}}; }

}  // namespace icecache
