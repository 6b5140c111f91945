// icecache-worker: runs a model whose KV cache lives in an icecache-server.
#include <cstdio>

#include "common/config.h"
#include "common/ucx_environment.h"
#include "worker/serve/generate.h"
#include "worker/serve/interrupt.h"
#include "worker/serve/options.h"
#include "worker/serve/recall.h"

namespace icecache {
namespace {

constexpr char kVersion[] = "icecache-worker 0.1.0";

int Fail(const Status& status) {
  std::fprintf(stderr, "icecache-worker: %s\n", status.ToString().c_str());
  return static_cast<int>(status.code());
}

int Main(int argc, char** argv) {
  ApplyUcxEnvironment();
  CatchInterrupts();
  ConfigParser parser("icecache-worker",
                      "Runs a language model whose KV cache lives in an icecache-server.",
                      "icecache-worker generate --help\n"
                      "icecache-worker recall --help");
  GenerateOptions generate;
  RecallOptions recall;
  AddGenerateCommand(parser, &generate);
  AddRecallCommand(parser, &recall);
  const Result<ConfigParser::Outcome> outcome = parser.Parse(argc, argv, kVersion);
  if (!outcome.ok()) return Fail(outcome.status());
  if (outcome->exit) {
    std::fputs(outcome->text.c_str(), stdout);
    return outcome->exit_code;
  }
  if (outcome->command.empty()) {
    return Fail(InvalidArgument("which command? generate or recall; see icecache-worker --help"));
  }
  const bool is_generate = outcome->command == "generate";
  const WorkerOptions& options = is_generate ? generate.worker : recall.worker;
  Status status = ApplyWorkerOptions(options, "icecache-worker");
  if (status.ok()) status = is_generate ? RunGenerate(generate) : RunRecall(recall);
  return status.ok() ? 0 : Fail(status);
}

}  // namespace
}  // namespace icecache

int main(int argc, char** argv) { return icecache::Main(argc, argv); }
