// Tasks: a document, what is asked about it, and how answers are scored. Made anew from text, a
// tokenizer and a seed, so that every table can be regenerated; equal specs give equal tasks.
//
// Kinds (MakeTask):
//   recall_tasks.cc   single, multikey, crowded, multiturn, walk, text: what tests/models/recall
//   was
//                     trained for
//   ruler.cc          RULER's thirteen: niah_single_1..3, niah_multikey_1..3, niah_multivalue,
//                     niah_multiquery, vt, cwe, fwe, qa_1, qa_2; and passkey
//   longbench.cc      longbench:NAME, from the public data files
//   long_tasks.cc     longgen (many answers in one long reply), state (written-out state tracking),
//                     dialogue (several questions in turn over one shared document)
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "common/status.h"
#include "tests/bench/tasks/task_metrics.h"
#include "worker/model/tokenizer.h"

namespace icecache {

// Something to read, then something to say.
struct TaskTurn {
  std::vector<int32_t> tokens;         // read before answering; at least one
  uint32_t new_tokens = 1;             // said at most
  std::vector<std::string> answers;    // references of the metric
  std::vector<std::string> classes;    // Metric::kClass: all labels
  std::vector<int32_t> answer_tokens;  // Metric::kTokens: exactly these
};

struct TaskSample {
  std::vector<int32_t> document;
  std::vector<TaskTurn> turns;
  Metric metric = Metric::kTokens;
  // True: every turn continues the sequence of the one before. False: each starts right after the
  // document.
  bool chained = false;
  bool feed_answers = true;  // chained: what was said is read again before the next turn
  // Chained: the turn that a first answer token leads to; what is asked then depends on what was
  // answered, so that an early mistake leads astray. Empty: the turns' own order.
  std::map<int32_t, uint32_t> next;
  std::vector<int32_t> stop;  // tokens that end an answer
};

struct TaskSpec {
  std::string name;
  uint32_t length = 4096;  // tokens of document and first turn, at most
  uint64_t seed = 1;
  uint32_t questions = 16;
  uint32_t write_tokens = 256;          // of `text`
  std::vector<std::string> text_files;  // haystack; empty: the licences of the system
  std::string data;  // folder with longbench files, or with passages for qa_1, qa_2
};

// INVALID_ARGUMENT: unknown name (lists them), a tokenizer that lacks what the task needs, a length
// that is too short. NOT_FOUND: missing data files, naming where they come from.
Result<std::vector<TaskSample>> MakeTask(const Tokenizer& tokenizer, const TaskSpec& spec);

// 0 to 1, by the sample's metric. `said`: the answer as text and as tokens.
double ScoreTurn(const TaskSample& sample, const TaskTurn& turn, const std::string& said,
                 const std::vector<int32_t>& said_tokens);

// The names of each file, and its maker.
using TaskMaker = Result<std::vector<TaskSample>> (*)(const Tokenizer&, const TaskSpec&);
struct TaskKind {
  const char* name;  // a trailing ':' stands for any rest
  TaskMaker make;
};
std::vector<TaskKind> RecallTasks();
std::vector<TaskKind> RulerTasks();
std::vector<TaskKind> LongBenchTasks();
std::vector<TaskKind> LongTasks();

}  // namespace icecache
