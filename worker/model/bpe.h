// Vocabulary and the models that turn a piece of text into ids: byte-pair encoding and whole words.
//
// BPE: a piece starts as its characters; of all adjacent pairs that the file lists as merges the
// one with the lowest rank is joined, the leftmost first, until none is left. Cost n log n in a
// piece's characters. Immutable after loading; any thread.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "common/status.h"

namespace icecache {

class Vocabulary {
 public:
  // The last text given to an id stays; false when `text` has another id already.
  bool Add(std::string text, int32_t id);  // REQUIRES: 0 <= id < limits::kVocabMax
  std::optional<int32_t> Find(std::string_view text) const;
  std::string_view Text(int32_t id) const;                                // "" when there is none
  uint32_t size() const { return static_cast<uint32_t>(texts_.size()); }  // largest id + 1

 private:
  struct Hash : std::hash<std::string_view> {
    using is_transparent = void;
  };
  std::unordered_map<std::string, int32_t, Hash, std::equal_to<>> ids_;
  std::vector<std::string> texts_;
};

// How pieces become ids.
struct TokenModel {
  enum class Kind : uint8_t { kBpe, kWordLevel };
  struct Merge {
    uint32_t rank;
    int32_t joined;
  };

  Kind kind = Kind::kBpe;
  std::optional<int32_t> unknown;
  bool fuse_unknown = false;      // BPE: neighbouring unknown characters are one token
  bool ignore_merges = false;     // BPE: a piece that is an entry is that entry
  std::vector<int32_t> byte_ids;  // BPE with byte_fallback: ids of <0x00> .. <0xFF>; else empty
  std::unordered_map<uint64_t, Merge> merges;  // by PairKey

  static uint64_t PairKey(int32_t left, int32_t right) {
    return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
  }
};

// `json`: the value of the "model" key, as text. UNIMPLEMENTED for Unigram, WordPiece and others.
Status ParseTokenModel(std::string_view json, const std::string& where, Vocabulary& vocabulary,
                       TokenModel& model);

// Appends the ids of one piece. INVALID_ARGUMENT when a word is unknown and the model has no token
// for that; BPE drops characters it has no entry for, as the tokenizers library does.
Status EncodePiece(const Vocabulary& vocabulary, const TokenModel& model, std::string_view piece,
                   std::vector<int32_t>& ids);

}  // namespace icecache
