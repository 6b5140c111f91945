// What a tokenizer.json holds, parsed. Internal to tokenizer.cc and tokenizer_parse.cc.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "common/status.h"
#include "worker/model/added_tokens.h"
#include "worker/model/bpe.h"
#include "worker/model/normalizer.h"
#include "worker/model/pretokenizer.h"
#include "worker/model/token_decoder.h"

namespace icecache {

struct TokenizerParts {
  Vocabulary vocabulary;  // with the added tokens
  TokenModel model;
  Normalizer normalizer;
  PreTokenizer pre_tokenizer;
  TokenDecoder decoder;
  AddedTokenMatcher raw_tokens;         // looked for in the text as it came
  AddedTokenMatcher normalized_tokens;  // looked for after the normalizer
  std::vector<bool> special;            // by id
  std::vector<int32_t> prefix, suffix;  // of the post-processor's template
};

Result<std::unique_ptr<TokenizerParts>> ParseTokenizer(std::string_view json,
                                                       const std::string& where);

}  // namespace icecache
