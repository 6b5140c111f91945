// icecache-bench: measurements of the parts, one subcommand each. Every result is one JSON object
// with the commit, the machine and the seed in it.
#include <cstdio>
#include <memory>
#include <vector>

#include "tests/bench/command.h"

int main(int argc, char** argv) {
  using icecache::BenchCommand;
  std::vector<std::unique_ptr<BenchCommand>> commands;
  commands.push_back(icecache::MakeAccuracyCommand());
  commands.push_back(icecache::MakeSelectCommand());
  commands.push_back(icecache::MakeGrowthCommand());
  commands.push_back(icecache::MakeChainCommand());
  commands.push_back(icecache::MakeFetchCommand());
  commands.push_back(icecache::MakeAttentionCommand());
  commands.push_back(icecache::MakeGatherCommand());
  commands.push_back(icecache::MakeDecodeCommand());
  commands.push_back(icecache::MakeBatchCommand());
  commands.push_back(icecache::MakeTierCommand());
  commands.push_back(icecache::MakeMachineCommand());

  icecache::ConfigParser parser(
      "icecache-bench", "Measures the parts of icecache.",
      "icecache-bench select --keys 32768 --trace calibrated:topic --json");
  for (const auto& command : commands) {
    icecache::ConfigParser& own =
        parser.AddCommand(command->name(), command->description(), command->examples());
    command->AddFlags(&own);
  }
  const auto outcome = parser.Parse(argc, argv, "0.1.0");
  if (!outcome.ok()) {
    std::fprintf(stderr, "icecache-bench: %s\n", outcome.status().ToString().c_str());
    return static_cast<int>(outcome.status().code());
  }
  std::fputs(outcome->text.c_str(), stdout);
  if (outcome->exit) return outcome->exit_code;
  for (const auto& command : commands) {
    if (outcome->command != command->name()) continue;
    const icecache::Status status = command->Run();
    if (status.ok()) return 0;
    std::fprintf(stderr, "icecache-bench %s: %s\n", command->name(), status.ToString().c_str());
    return static_cast<int>(status.code());
  }
  std::fprintf(stderr, "icecache-bench: name a command; see icecache-bench --help\n");
  return static_cast<int>(icecache::StatusCode::kInvalidArgument);
}
