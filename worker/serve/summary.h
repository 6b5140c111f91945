// What a run did, in a few lines for people.
#pragma once

#include <cstdint>
#include <string>

#include "worker/decode_loop.h"

namespace icecache {

struct GenerateSummary {
  std::string method;
  uint32_t budget = 0;
  uint64_t prefill_tokens = 0;
  uint64_t matched_tokens = 0;  // of the prompt, prefilled by another worker
  uint64_t generated_tokens = 0;
  Duration prepare{0};  // prefill and index, or fork
  DecodeStats decode;
};

std::string FormatSummary(const GenerateSummary& summary);
void PrintSummary(const GenerateSummary& summary);  // to stderr

}  // namespace icecache
