// `icecache-worker dump-trace`: runs a model over a text with full KV, lets it go on writing if
// asked to, and records every layer's and head's keys, values and last queries
// (worker/trace_file.h). No server takes part. Memory: full KV of the sequence when it goes on
// writing, else of one layer.
#pragma once

#include <cstdint>
#include <string>

#include "common/config.h"
#include "worker/serve/options.h"

namespace icecache {

struct DumpTraceOptions {
  WorkerOptions worker;
  std::string prompt;
  std::string prompt_file;
  std::string out;
  uint32_t prompt_tokens = 0;  // the text is cut, or repeated, to so many; 0: as it is
  uint32_t new_tokens = 0;     // written after the prompt
  uint32_t queries = 512;      // of so many last positions
  double temperature = 0;
  uint64_t seed = 0;
};

void AddDumpTraceCommand(ConfigParser& parser, DumpTraceOptions* options);
Status RunDumpTrace(const DumpTraceOptions& options);

}  // namespace icecache
