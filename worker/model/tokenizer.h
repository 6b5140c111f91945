// Tokenizer: a Hugging Face tokenizer.json, from text to token ids and back.
//
// Encoding runs in the file's own order: added tokens are cut out of the text, the rest is
// normalised, pre-tokenised (pretokenizer.h), split into vocabulary entries (BPE or WordLevel) and
// framed by the post-processor's template. What the file asks for and this code does not know
// (Unigram, WordPiece, Precompiled normalisers, NFKC) is refused at load with its name.
//
// Input that is not UTF-8 is read as Python's errors="replace" would: each bad sequence becomes
// U+FFFD. Decoding does the same with bytes that do not join to UTF-8.
//
// Immutable after Load; any thread. Cost of Encode: ~1 us per word on text the cache has not seen.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "common/status.h"

namespace icecache {

struct TokenizerParts;  // tokenizer_parts.h

class Tokenizer {
 public:
  // Reads directory/tokenizer.json. Errors name the file, the component and what was expected.
  static Result<std::unique_ptr<Tokenizer>> Load(const std::string& directory);
  // The same from a document in memory; `where` names it in errors.
  static Result<std::unique_ptr<Tokenizer>> Parse(std::string_view json, const std::string& where);
  ~Tokenizer();

  // add_special: frame the ids as the post-processor's template says (usually a BOS in front).
  // INVALID_ARGUMENT when a word is in no vocabulary and the model has no unknown token.
  Result<std::vector<int32_t>> Encode(std::string_view text, bool add_special) const;

  // skip_special: tokens marked special in the file leave no text. Ids outside the vocabulary too.
  std::string Decode(std::span<const int32_t> ids, bool skip_special) const;

  std::optional<int32_t> TokenId(std::string_view token) const;  // by its text in the file
  std::string_view TokenText(int32_t id) const;                  // "" when there is no such id
  bool IsSpecial(int32_t id) const;
  uint32_t vocab_size() const;  // largest id + 1

 private:
  friend class StreamDecoder;
  explicit Tokenizer(std::unique_ptr<TokenizerParts> parts);

  const std::unique_ptr<TokenizerParts> parts_;
};

// Text of a growing sequence, token by token: the concatenation of all Push() and one Finish()
// equals Decode() of the whole. A character is held back until its last byte has come, so what is
// printed is always whole UTF-8. Borrows the tokenizer. One thread.
class StreamDecoder {
 public:
  explicit StreamDecoder(const Tokenizer& tokenizer, bool skip_special = true)
      : tokenizer_(tokenizer), skip_special_(skip_special) {}

  std::string Push(int32_t id);
  std::string Finish();  // what is still held back, as U+FFFD; then ready for a new sequence

 private:
  const Tokenizer& tokenizer_;
  const bool skip_special_;
  std::string held_;  // bytes that may begin a character
  uint64_t emitted_tokens_ = 0;
  uint32_t stripped_ = 0;  // leading characters already removed by a Strip decoder
  bool at_start_ = true;   // nothing but stripped characters so far
};

}  // namespace icecache
