// TokenDecoder: from a token's text in the vocabulary to the bytes it stands for ("decoder" of
// tokenizer.json).
//
// Every decoder known here maps tokens one by one, apart from what it does at the start of a
// sequence, so a growing text can be decoded token by token. Known: ByteLevel, Metaspace,
// ByteFallback, Replace, Fuse, Strip (after Fuse, at the start), Sequence; null joins words with
// spaces. Immutable after Parse; any thread.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "common/status.h"

namespace icecache {

class TokenDecoder {
 public:
  // `json`: the value of the "decoder" key, as text. UNIMPLEMENTED names a kind this code does not
  // know.
  static Result<TokenDecoder> Parse(std::string_view json, const std::string& where);

  // Appends the bytes of one token; they may be part of a character. first: nothing came before it.
  void Append(std::string_view token, bool first, std::string& bytes) const;

  // What is to be removed at the start of the whole text: at most strip_count() times strip_text().
  uint32_t strip_count() const { return strip_count_; }
  const std::string& strip_text() const { return strip_text_; }

 private:
  friend class TokenDecoderParser;

  bool join_with_spaces_ = false;
  bool byte_level_ = false;
  bool byte_fallback_ = false;
  bool fused_ = false;             // a Fuse has been seen while parsing
  bool drop_first_space_ = false;  // Metaspace: the mark that encoding put in front
  std::vector<std::pair<std::string, std::string>> replacements_;
  uint32_t strip_count_ = 0;
  std::string strip_text_;
};

}  // namespace icecache
