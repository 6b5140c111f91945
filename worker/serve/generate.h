// `icecache-worker generate`: reads a prompt, or joins a context that another worker published, and
// writes text. Tokens go to stdout as they come, progress and a summary to stderr.
#pragma once

#include <cstdint>
#include <string>

#include "common/config.h"
#include "worker/serve/options.h"

namespace icecache {

struct GenerateOptions {
  WorkerOptions worker;
  std::string prompt;
  std::string prompt_file;
  std::string question;
  std::string question_file;
  std::string requests;  // file of questions to be answered together; see generate_batch.h
  uint32_t batch = 8;
  std::string context;  // name to give; empty: a fresh one
  std::string fork_of;
  uint32_t fork_at = 0;       // tokens of it; 0: all
  std::string match = "off";  // off, own or shared
  bool publish = false;
  bool durable = false;
  bool shared = false;
  std::string method = "icecache";
  uint32_t max_new_tokens = 64;
  bool ignore_eos = false;
  double temperature = 0;
  double top_p = 1;
  uint64_t seed = 0;
};

void AddGenerateCommand(ConfigParser& parser, GenerateOptions* options);
Status RunGenerate(const GenerateOptions& options);

}  // namespace icecache
