#include "tests/bench/tasks/task.h"

#include <string_view>

namespace icecache {

Result<std::vector<TaskSample>> MakeTask(const Tokenizer& tokenizer, const TaskSpec& spec) {
  std::string names;
  for (const auto& kinds : {RecallTasks(), RulerTasks(), LongBenchTasks(), LongTasks()}) {
    for (const TaskKind& kind : kinds) {
      const std::string_view name = kind.name;
      const bool whole = spec.name == name || (name.ends_with(':') && spec.name.starts_with(name));
      if (whole) return kind.make(tokenizer, spec);
      names += (names.empty() ? "" : ", ") + std::string(name);
    }
  }
  return InvalidArgument("task '" + spec.name + "' is unknown; use one of: " + names + "NAME");
}

double ScoreTurn(const TaskSample& sample, const TaskTurn& turn, const std::string& said,
                 const std::vector<int32_t>& said_tokens) {
  if (sample.metric == Metric::kTokens || sample.metric == Metric::kAgreement)
    return said_tokens == turn.answer_tokens ? 1 : 0;
  return Score(sample.metric, said, turn.answers, turn.classes);
}

}  // namespace icecache
