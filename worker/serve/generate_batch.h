// `icecache-worker generate --requests FILE`: many questions about one context, some of them at a
// time. Each gets a fork of the context; up to --batch of them decode together (batch_loop.h), and
// when one is done the next of the file takes its place.
//
// The file has one JSON object a line: {"question": TEXT} and, where it differs from the command's
// flags, "id", "budget", "max_new_tokens", "temperature", "top_p", "seed". Answers go to stdout as
// JSON lines as they come: {"id", "text"} for each piece of text, and {"id", "end": "stop" | "length" |
// "error", "tokens"} with the whole "answer", or the "error".
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "worker/serve/generate.h"

namespace icecache {

struct BatchRequest {
  std::string id;  // "1", "2", ... by line when the file names none
  std::string question;
  uint32_t budget = 0;
  uint32_t max_new_tokens = 0;
  double temperature = 0;
  double top_p = 1;
  uint64_t seed = 0;
};

// INVALID_ARGUMENT naming the line and the field. `defaults`: for what a line leaves out.
Result<std::vector<BatchRequest>> ParseBatchRequests(std::string_view text,
                                                     const GenerateOptions& defaults);

// OK when every request was answered; else the first error, after all have ended.
Status RunGenerateBatch(const GenerateOptions& options);

}  // namespace icecache
