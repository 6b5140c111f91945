// PrefixKey: names the first n tokens of a sequence under one model and one layout. Equal keys: the
// same K and V, so that one worker's prefill serves another's (docs/adr/0012-match-prefix.md).
//
// key(n) = SHA-256(identity, tokens[0 .. n)). Defined for every n; contexts are looked up by the keys at
// multiples of kPrefixBlockTokens. A cryptographic hash, since a collision would hand one prompt the
// K and V of another, and those who choose prompts may look for one: xxHash is not made to resist
// that. Cost: about 2 ns a byte, 8 ns a token, against milliseconds to prefill it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "common/model_shape.h"

namespace icecache {

using PrefixKey = std::array<std::byte, 32>;

// All that decides what is stored for a token, and where.
struct PrefixIdentity {
  std::string model;  // Model::identity(): name, weights, configuration with its RoPE settings
  ModelShape shape;   // with the dtype of K and V
  uint32_t sink_tokens = 0;
  uint32_t window_tokens = 0;
  std::string policy;
  uint64_t seed = 1;
};

class PrefixHasher {
 public:
  explicit PrefixHasher(const PrefixIdentity& identity);
  ~PrefixHasher();
  PrefixHasher(const PrefixHasher&) = delete;
  PrefixHasher& operator=(const PrefixHasher&) = delete;

  void Add(std::span<const int32_t> tokens);
  PrefixKey key() const;  // of the tokens so far

 private:
  struct Impl;
  const std::unique_ptr<Impl> impl_;
};

// Keys of every whole block, and, if `end` and the last block is not whole, of all tokens.
std::vector<PrefixKey> PrefixKeys(const PrefixIdentity& identity, std::span<const int32_t> tokens,
                                  bool end);
// Of all the tokens.
PrefixKey PrefixKeyOf(const PrefixIdentity& identity, std::span<const int32_t> tokens);
// How many PrefixKeys(..., true) of so many tokens has.
uint32_t PrefixKeyCount(uint32_t tokens);

}  // namespace icecache
