// Normalizer: the rewriting of text before it is cut into pieces ("normalizer" of tokenizer.json).
//
// Known: Lowercase (letter by letter, without regard to the place in a word), NFC, Prepend,
// Replace, Strip, Sequence. Immutable after Parse; any thread.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "common/status.h"
#include "worker/model/pretokenizer.h"

namespace icecache {

class Normalizer {
 public:
  // `json`: the value of the "normalizer" key, as text; "null" changes nothing. UNIMPLEMENTED names
  // a kind this code does not know.
  static Result<Normalizer> Parse(std::string_view json, const std::string& where);

  bool identity() const { return steps_.empty(); }
  Result<std::string> Run(std::string_view text) const;  // REQUIRES: valid UTF-8

 private:
  struct Step {
    enum class Kind : uint8_t { kLowercase, kNfc, kPrepend, kReplace, kStrip };
    Kind kind = Kind::kNfc;
    std::vector<Pattern> pattern;      // kReplace: one
    std::string content;               // kPrepend, kReplace
    bool left = false, right = false;  // kStrip
  };
  friend class NormalizerParser;
  static Result<std::string> RunStep(const Step& step, std::string text);

  std::vector<Step> steps_;
};

}  // namespace icecache
