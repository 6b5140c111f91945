// A subcommand of icecache-bench. main.cc lists them; each lives in its own file.
#pragma once

#include <memory>

#include "common/config.h"
#include "common/status.h"

namespace icecache {

class BenchCommand {
 public:
  virtual ~BenchCommand() = default;
  virtual const char* name() const = 0;
  virtual const char* description() const = 0;
  virtual const char* examples() const = 0;
  virtual void AddFlags(ConfigParser* parser) = 0;
  // Measures and prints to stdout.
  virtual Status Run() = 0;
};

std::unique_ptr<BenchCommand> MakeAccuracyCommand();
std::unique_ptr<BenchCommand> MakeSelectCommand();
std::unique_ptr<BenchCommand> MakeFetchCommand();
std::unique_ptr<BenchCommand> MakeAttentionCommand();
std::unique_ptr<BenchCommand> MakeGatherCommand();
std::unique_ptr<BenchCommand> MakeDecodeCommand();
std::unique_ptr<BenchCommand> MakeBatchCommand();
std::unique_ptr<BenchCommand> MakeTierCommand();
std::unique_ptr<BenchCommand> MakeGrowthCommand();
std::unique_ptr<BenchCommand> MakeChainCommand();
std::unique_ptr<BenchCommand> MakeMachineCommand();

}  // namespace icecache
