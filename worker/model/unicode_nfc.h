// NFC: canonical composition of Unicode text, for tokenizers whose vocabulary expects it (Qwen).
//
// The algorithm of UAX #15: decompose, order combining marks, compose. Text below U+0300 is
// returned as it is after one pass; other text takes ~50 ns per character. Immutable tables; any
// thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace icecache {

// REQUIRES: valid UTF-8.
std::string NormalizeNfc(std::string_view text);

// unicode_nfc_tables.cc: triples, `count` of them.
namespace nfc {
extern const uint32_t kComposing[];  // character, first, second
extern const size_t kComposingCount;
extern const uint32_t kOnlyDecomposing[];
extern const size_t kOnlyDecomposingCount;
extern const uint32_t kClasses[];  // first, last, class
extern const size_t kClassesCount;
}  // namespace nfc

}  // namespace icecache
