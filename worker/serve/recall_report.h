// Results of `icecache-worker recall`, as JSON for the demo and CI and as a table for people.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "worker/decode_loop.h"

namespace icecache {

struct RecallAnswer {
  std::string name;  // asked for
  std::string said;
  bool right = false;
  uint32_t fact_position = 0;
};

struct RecallMethodReport {
  std::string name;
  uint32_t budget = 0;
  std::vector<RecallAnswer> answers;
  DecodeStats stats;
  Duration between{0};  // forking and releasing contexts, not part of ms/token

  double accuracy() const;
};

struct RecallReport {
  uint32_t document_tokens = 0;
  uint32_t prefill_tokens = 0;  // 0: forked
  uint32_t facts = 0;
  Duration prefill{0};
  std::vector<RecallMethodReport> methods;
};

// Share of questions that both answer alike. REQUIRES: the same questions.
double Agreement(const RecallMethodReport& a, const RecallMethodReport& b);

std::string FormatRecallJson(const RecallReport& report);
std::string FormatRecallTable(const RecallReport& report);

}  // namespace icecache
