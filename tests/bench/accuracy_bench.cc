// icecache-bench accuracy: what a model still gets right when it attends to little.
#include <algorithm>
#include <charconv>
#include <cstdio>

#include "tests/bench/accuracy_run.h"
#include "tests/bench/command.h"
#include "worker/serve/interrupt.h"

namespace icecache {
namespace {

class AccuracyCommand final : public BenchCommand {
 public:
  const char* name() const override { return "accuracy"; }
  const char* description() const override {
    return "Accuracy of a model under every policy, budget, length and seed: one JSON object a "
           "cell";
  }
  const char* examples() const override {
    return "icecache-bench accuracy --model tests/models/recall --tasks single,multikey "
           "--policies full,top_k,cluster_tree,quest --lengths 4096 --out cells.jsonl --report "
           "report\n"
           "icecache-bench accuracy --model DIR --tasks niah_multikey_2,vt,cwe --lengths 32768\n"
           "icecache-bench accuracy --model DIR --tasks longbench:hotpotqa --data LongBench/data\n"
           "icecache-bench accuracy --model tests/models/recall --tasks single --lengths 16384 "
           "--policies "
           "cluster_tree,cluster_tree/strict,cluster_tree/rerank_pages_max=10,dci_tree/improved";
  }
  void AddFlags(ConfigParser* parser) override;
  Status Run() override;

 private:
  AccuracyOptions options_;
  std::vector<std::string> budgets_ = {"64", "128", "256"}, lengths_ = {"4096"};
};

Result<std::vector<uint32_t>> Numbers(const std::vector<std::string>& words, const char* flag) {
  std::vector<uint32_t> numbers;
  for (const std::string& word : words) {
    uint32_t number = 0;
    const auto end = word.data() + word.size();
    const auto read = std::from_chars(word.data(), end, number);
    if (read.ec != std::errc() || read.ptr != end || number == 0)
      return InvalidArgument(std::string(flag) + " '" + word + "': expected numbers from 1 on");
    numbers.push_back(number);
  }
  return numbers;
}

void AccuracyCommand::AddFlags(ConfigParser* parser) {
  AccuracyOptions& o = options_;
  o.tasks = {"single", "multikey"};
  o.methods = {"full", "top_k", "cluster_tree", "dci_tree", "sequential"};
  parser->Section("Model and tasks");
  parser->Add("model", &o.model, "Hugging Face model directory", true);
  parser->Add("kv_dtype", &o.kv_dtype, "Element type of stored K and V: f16, bf16 or f32");
  parser->AddList("tasks", &o.tasks, "see tests/bench/tasks/task.h");
  parser->AddList("lengths", &lengths_, "Tokens of the document");
  parser->Add("seeds", &o.seeds, "Documents per task and length", 1, 1000);
  parser->Add("first_seed", &o.first_seed, "Seed of the first");
  parser->Add("questions", &o.questions, "Questions per document", 1, 100000);
  parser->Add("write_tokens", &o.write_tokens, "Tokens that `text` and `longgen` go on for", 1,
              1u << 20);
  parser->AddList("text_files", &o.text_files,
                  "Text around what is asked for; empty: /usr/share/common-licenses/*");
  parser->Add("data", &o.data, "Folder of the public files that longbench:* and qa_* read");
  parser->Section("Methods");
  parser->AddList("policies", &o.methods,
                  "full (no sparsity), top_k (best tokens of each head) or POLICY[/OPTION]...; see "
                  "tests/bench/accuracy_method.h");
  parser->AddList("budgets", &budgets_, "Tokens per kv head, sinks and window included");
  parser->Add("sink_tokens", &o.sink_tokens, "First tokens that are always attended to", 0,
              limits::kSinkTokensMax);
  parser->Add("window_tokens", &o.window_tokens, "Recent tokens that are always attended to", 0,
              limits::kWindowTokensMax);
  parser->Section("Output");
  parser->Add("out", &o.out, "Table to add to; cells that are in it are not run again");
  parser->Add("any_build", &o.any_build,
              "Cells in --out that another build of this program made count, too");
  parser->Add("report", &o.report, "Folder for the table as Markdown, and plots");
  parser->Add("cache", &o.cache, "Folder that keeps what prefill computed, for the next run");
  parser->Add("json", &o.json, "Every cell to stdout, too");
  parser->Add("progress", &o.progress, "Progress bar even where stderr is no terminal");
  parser->Add("threads", &o.threads, "Compute threads of the model", 1, 1024);
}

Status AccuracyCommand::Run() {
  KV_ASSIGN_OR_RETURN(options_.budgets, Numbers(budgets_, "--budgets"));
  KV_ASSIGN_OR_RETURN(options_.lengths, Numbers(lengths_, "--lengths"));
  CatchInterrupts();
  return RunAccuracy(options_);
}

}  // namespace

std::unique_ptr<BenchCommand> MakeAccuracyCommand() { return std::make_unique<AccuracyCommand>(); }

}  // namespace icecache
