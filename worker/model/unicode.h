// What the Unicode standard says about text: the border to utf8proc. Any thread.
#pragma once

#include <string>
#include <string_view>

namespace icecache {

// NFC (UAX #15), for tokenizers whose vocabulary expects it (Qwen). Text below U+0300 is returned
// as it is after one pass. REQUIRES: valid UTF-8.
std::string NormalizeNfc(std::string_view text);

// The one character that is `code` in lower case; `code` itself when there is none.
char32_t ToLower(char32_t code);

}  // namespace icecache
