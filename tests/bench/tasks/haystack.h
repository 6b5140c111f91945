// What tasks are made of: random numbers that are equal on every machine, running text, and
// documents filled with it up to a number of tokens.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/status.h"
#include "tests/bench/random.h"
#include "worker/model/tokenizer.h"

namespace icecache {

// Digits, e.g. "4820193"; letters and digits in the form of a UUID; an invented word of syllables.
std::string RandomNumber(TraceRandom& random, uint32_t digits);
std::string RandomUuid(TraceRandom& random);
std::string RandomWord(TraceRandom& random, uint32_t syllables);
template <typename T>
void Shuffle(TraceRandom& random, std::vector<T>* items) {
  for (size_t i = items->size(); i > 1; --i)
    std::swap((*items)[i - 1], (*items)[random.Below(static_cast<uint32_t>(i))]);
}

// All of the files (default: the licences that every Debian system has), cut into sentences.
Result<std::vector<std::string>> ReadSentences(const std::vector<std::string>& files);

// Puts `needles` at random places, in order or not, between as many sentences (from a random one
// on, repeated when they end) as fit `tokens` together with what `frame` counts already.
struct HaystackSpec {
  const std::vector<std::string>* sentences = nullptr;
  std::vector<std::string> needles;
  uint32_t tokens = 0;        // of the whole
  uint32_t frame_tokens = 0;  // taken by the prompt around it
  bool keep_order = false;    // of the needles
};
// INVALID_ARGUMENT when the needles alone do not fit.
Result<std::string> MakeHaystack(const Tokenizer& tokenizer, TraceRandom& random,
                                 const HaystackSpec& spec);

}  // namespace icecache
