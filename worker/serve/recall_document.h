// A long document of real text with facts scattered in it, and the questions about them, for models
// that were trained on that task (tests/models/README.md):
//   <bos> text .. <fact> NAME CITY CITY <end> .. text      asked: <ask> NAME      answer: the first
//   CITY
// The same files, sizes and seed give the same document in every process.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/status.h"
#include "worker/model/tokenizer.h"

namespace icecache {

struct RecallQuestion {
  std::string name;
  std::vector<int32_t> tokens;  // <ask> NAME
  std::vector<int32_t> answer;  // the first CITY: one token with a word-level tokenizer
  uint32_t fact_position = 0;   // where its fact stands
};

struct RecallDocument {
  std::vector<int32_t> tokens;
  std::vector<RecallQuestion> questions;  // one per fact, in random order
};

struct RecallDocumentOptions {
  std::vector<std::string> text_files;  // empty: the licences that every Debian system has
  uint32_t tokens = 16384;
  uint32_t facts = 64;
  uint64_t seed = 1;
  bool alike =
      false;  // names share their first or second half: only the whole name tells them apart
};

// INVALID_ARGUMENT when the facts do not fit, there are not so many names, or the tokenizer lacks
// the task's tokens; NOT_FOUND for text that cannot be read.
Result<RecallDocument> MakeRecallDocument(const Tokenizer& tokenizer,
                                          const RecallDocumentOptions& options);

}  // namespace icecache
