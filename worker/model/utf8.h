// UTF-8, as strictly as the Unicode standard's table 3-7: no surrogates, no overlong forms.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace icecache {

inline constexpr char32_t kReplacementCharacter = 0xFFFD;

// One character of text[at...]. A sequence that is not UTF-8 is its "maximal subpart", the bytes
// that one U+FFFD stands for; `incomplete`: the text ends where more bytes could still make it
// valid.
struct Utf8Char {
  char32_t code = kReplacementCharacter;
  uint32_t bytes = 1;
  bool valid = false;
  bool incomplete = false;
};
Utf8Char DecodeUtf8(std::string_view text, size_t at);  // REQUIRES: at < text.size()

void AppendUtf8(char32_t code, std::string& to);  // REQUIRES: a scalar value

// The text with every bad sequence as U+FFFD; the text itself when it is good.
std::string ReplaceBadUtf8(std::string_view text);

// Bytes at the end of `text` that begin a character and do not finish it: 0..3.
size_t IncompleteUtf8Tail(std::string_view text);

bool IsWhitespace(char32_t code);  // Unicode's White_Space

}  // namespace icecache
