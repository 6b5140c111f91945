// icecache-worker: runs a model whose KV cache lives in an icecache-server.
#include <cstdio>

#include "common/config.h"
#include "common/file_limit.h"
#include "common/ucx_environment.h"
#include "worker/serve/dump_trace.h"
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
  RaiseFileLimit();
  CatchInterrupts();
  ConfigParser parser("icecache-worker",
                      "Runs a language model whose KV cache lives in an icecache-server.",
                      "icecache-worker generate --help\n"
                      "icecache-worker recall --help\n"
                      "icecache-worker dump-trace --help");
  GenerateOptions generate;
  RecallOptions recall;
  DumpTraceOptions dump;
  AddGenerateCommand(parser, &generate);
  AddRecallCommand(parser, &recall);
  AddDumpTraceCommand(parser, &dump);
  const Result<ConfigParser::Outcome> outcome = parser.Parse(argc, argv, kVersion);
  if (!outcome.ok()) return Fail(outcome.status());
  if (outcome->exit) {
    std::fputs(outcome->text.c_str(), stdout);
    return outcome->exit_code;
  }
  const auto run = [](const WorkerOptions& worker, const auto& command) {
    Status status = ApplyWorkerOptions(worker, "icecache-worker");
    if (status.ok()) status = command();
    return status;
  };
  Status status =
      InvalidArgument("which command? generate, recall or dump-trace; see icecache-worker --help");
  if (outcome->command == "generate") {
    status = run(generate.worker, [&] { return RunGenerate(generate); });
  } else if (outcome->command == "recall") {
    status = run(recall.worker, [&] { return RunRecall(recall); });
  } else if (outcome->command == "dump-trace") {
    status = run(dump.worker, [&] { return RunDumpTrace(dump); });
  }
  return status.ok() ? 0 : Fail(status);
}

}  // namespace
}  // namespace icecache

int main(int argc, char** argv) { return icecache::Main(argc, argv); }
