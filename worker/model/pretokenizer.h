// PreTokenizer: cuts text into the pieces within which a tokenizer may join symbols. And Pattern,
// the border to PCRE2.
//
// All kinds of the tokenizers library that cut by character class become one step: a pattern, what
// to do with its matches, and whether to swap matches and the rest. ByteLevel and Metaspace also
// rewrite. Patterns run with UTF and Unicode properties and are compiled to machine code. Where a
// file's own pattern uses \w or \s, PCRE2's classes apply; they differ from the library's in marks
// (\w) and in U+180E (\s).
//
// Immutable after Parse; any thread.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "common/status.h"

namespace icecache {

// A compiled regular expression over UTF-8. Empty matches are passed over.
class Pattern {
 public:
  // literal: `expression` is plain text. INVALID_ARGUMENT with PCRE2's reason and the place.
  static Result<Pattern> Compile(const std::string& expression, bool literal,
                                 const std::string& where);

  // found(begin, end) for every match, left to right, without overlap.
  // REQUIRES: text is valid UTF-8. INTERNAL when matching needs more memory or steps than PCRE2
  // allows.
  Status ForEach(std::string_view text,
                 const std::function<void(size_t begin, size_t end)>& found) const;

 private:
  struct Code;
  explicit Pattern(std::shared_ptr<const Code> code) : code_(std::move(code)) {}

  std::shared_ptr<const Code> code_;  // shared: a compiled pattern never changes
};

// What becomes of a match (see the `behavior` key of Split).
enum class SplitBehavior : uint8_t {
  kRemoved,
  kIsolated,
  kMergedWithPrevious,
  kMergedWithNext,
  kContiguous
};

class PreTokenizer {
 public:
  // `json`: the value of the "pre_tokenizer" key, as text; "null" cuts nothing. UNIMPLEMENTED names
  // a kind this code does not know.
  static Result<PreTokenizer> Parse(std::string_view json, const std::string& where);

  // Appends the pieces of `text` to `pieces`; none is empty. at_start: `text` is the beginning of
  // the input (Metaspace may put its mark only there). REQUIRES: text is valid UTF-8.
  Status Run(std::string_view text, bool at_start, std::vector<std::string>& pieces) const;

 private:
  struct Step {
    enum class Kind : uint8_t { kSplit, kPrefixSpace, kMapBytes, kMetaspace };
    Kind kind = Kind::kSplit;
    std::vector<Pattern> pattern;  // kSplit: one; kMetaspace: one when it splits
    SplitBehavior behavior = SplitBehavior::kIsolated;
    bool invert = false;
    std::string mark;  // kMetaspace: what stands for a space
    enum class Prepend : uint8_t { kNever, kFirst, kAlways } prepend = Prepend::kNever;
  };
  friend class PreTokenizerParser;
  static Status RunStep(const Step& step, bool at_start, std::string&& piece,
                        std::vector<std::string>& to);

  std::vector<Step> steps_;
};

// Byte-level alphabet: 256 printable characters standing for the bytes (GPT-2's table).
char32_t ByteToSymbol(uint8_t byte);
int SymbolToByte(char32_t symbol);  // -1 when it stands for none

}  // namespace icecache
