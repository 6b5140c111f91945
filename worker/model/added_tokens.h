// Added tokens: entries that are cut out of a text as they stand, before anything else looks at it.
//
// At each place the longest token wins. single_word: only where no letter, digit or underscore
// touches it; lstrip, rstrip: the white space before or behind goes with it. Tokens marked
// "normalized" are looked for in the normalised text, the others before that (so Lowercase does not
// hide <BOS>). Immutable after Build; any thread.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "common/status.h"

namespace icecache {

struct AddedToken {
  std::string content;
  int32_t id = 0;
  bool special = false;
  bool single_word = false;
  bool lstrip = false;
  bool rstrip = false;
  bool normalized = false;
};

class AddedTokenMatcher {
 public:
  void Add(AddedToken token);  // an empty content is ignored: it would match everywhere

  // Visits `text` from left to right: text(begin, end) for what lies between tokens, token(id) for
  // each token. Stops at the first error and returns it.
  Status Visit(std::string_view text,
               const std::function<Status(size_t begin, size_t end)>& between,
               const std::function<void(int32_t id)>& token) const;

 private:
  const AddedToken* LongestAt(std::string_view text, size_t at) const;

  // By first byte, longest first.
  std::array<std::vector<AddedToken>, 256> by_first_byte_;
};

}  // namespace icecache
