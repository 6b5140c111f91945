// `icecache-worker recall`: how well, how fast and with how much memory each method answers
// questions about one long document. The demo is made of two of these: one prefills, publishes and
// asks; the other forks and asks other questions without ever reading the document.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/config.h"
#include "worker/serve/options.h"
#include "worker/serve/recall_document.h"

namespace icecache {

struct RecallOptions {
  WorkerOptions worker;
  RecallDocumentOptions document;
  std::vector<std::string> methods = {"icecache", "full_kv", "exact", "sink_window"};
  uint32_t question_first = 0;
  uint32_t question_count = 64;
  std::string context;
  bool publish = false;
  std::string fork_of;
  std::string ready_file;  // written when the context is published
  std::string wait_file;   // questions start when it is there
  std::string json;
};

void AddRecallCommand(ConfigParser& parser, RecallOptions* options);
Status RunRecall(const RecallOptions& options);

}  // namespace icecache
