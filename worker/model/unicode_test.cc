// UTF-8, NFC and lower case.
#include <gtest/gtest.h>

#include "worker/model/unicode.h"
#include "worker/model/utf8.h"

namespace icecache {
namespace {

TEST(Utf8, EveryScalarValueRoundTrips) {
  for (char32_t code = 0; code < 0x110000; ++code) {
    if (code >= 0xD800 && code <= 0xDFFF) continue;
    std::string text;
    AppendUtf8(code, text);
    const Utf8Char c = DecodeUtf8(text, 0);
    ASSERT_TRUE(c.valid && c.code == code && c.bytes == text.size()) << static_cast<uint32_t>(code);
    ASSERT_EQ(IncompleteUtf8Tail(text), 0u);
    for (size_t cut = 1; cut < text.size(); ++cut) {
      ASSERT_EQ(IncompleteUtf8Tail(std::string_view(text).substr(0, cut)), cut);
    }
  }
}

TEST(Utf8, BadSequencesBecomeOneMarkPerMaximalSubpart) {
  // As CPython's bytes.decode(errors="replace") gives them.
  const std::pair<std::string, std::string> cases[] = {
      {"\x80", "\ufffd"},
      {"\xc0\x80", "\ufffd\ufffd"},                      // overlong
      {"\xe0\x80\x80", "\ufffd\ufffd\ufffd"},            // overlong
      {"\xed\xa0\x80", "\ufffd\ufffd\ufffd"},            // surrogate
      {"\xf4\x90\x80\x80", "\ufffd\ufffd\ufffd\ufffd"},  // above U+10FFFF
      {"\xf0\x9f\x99", "\ufffd"},
      {"\xf0\x9f\x99x", "\ufffdx"},
      {"\xe4\xbd\xe4\xbd\xa0", "\ufffd\u4f60"},
      {"\xff\xfe", "\ufffd\ufffd"},
  };
  for (const auto& [bytes, expected] : cases) EXPECT_EQ(ReplaceBadUtf8(bytes), expected);
}

TEST(Utf8, TailsThatNoByteCanSaveAreNotHeldBack) {
  EXPECT_EQ(IncompleteUtf8Tail("a\xff"), 0u);
  EXPECT_EQ(IncompleteUtf8Tail("a\xc0"), 0u);
  EXPECT_EQ(IncompleteUtf8Tail("\xe0\x80"), 0u);
  EXPECT_EQ(IncompleteUtf8Tail("a\xe0\xa0"), 2u);
  EXPECT_EQ(IncompleteUtf8Tail(""), 0u);
}

// Cases of UAX #15 and its conformance test.
TEST(Nfc, ComposesAsTheStandardSays) {
  const std::pair<std::string, std::string> cases[] = {
      {"plain ASCII \u00e9", "plain ASCII \u00e9"},
      {"e\u0301", "\u00e9"},
      {"\u212b", "\u00c5"},  // Angstrom sign -> A with ring
      {"s\u0323\u0307", "\u1e69"},
      {"s\u0307\u0323", "\u1e69"},  // marks in the other order
      {"\u1e9b\u0323", "\u1e9b\u0323"},
      {"\u0958", "\u0915\u093c"},                                // excluded from composition
      {"\ufb01", "\ufb01"},                                      // compatibility only: stays
      {"\u1112\u1161\u11ab\u1100\u1173\u11af", "\ud55c\uae00"},  // Hangul
      {"\ud558\u11ab", "\ud55c"},
      {"\u0061\u0315\u0300\u05ae\u0300\u0062",
       "\u00e0\u05ae\u0300\u0315\u0062"},  // NormalizationTest part 1
      {"\u0300", "\u0300"},
      {"\u0041\u0304\u0328", "\u0104\u0304"},
      {"\U0001D15E", "\U0001D157\U0001D165"},
  };
  for (const auto& [text, expected] : cases) {
    EXPECT_EQ(NormalizeNfc(text), expected) << text;
    EXPECT_EQ(NormalizeNfc(expected), expected);
  }
  EXPECT_EQ(NormalizeNfc(std::string_view("e\u0301\0e\u0301", 7)),
            std::string("\u00e9\0\u00e9", 5));
}

TEST(Unicode, LowerCaseIsOneCharacterForOne) {
  const std::pair<char32_t, char32_t> cases[] = {
      {U'A', U'a'},           {U'z', U'z'},
      {U'\u00c4', U'\u00e4'}, {U'\u0416', U'\u0436'},
      {U'\u01c5', U'\u01c6'}, {U'\u1e9e', U'\u00df'},
      {U'\u4f60', U'\u4f60'}, {U'\U00010400', U'\U00010428'}};
  for (const auto& [upper, lower] : cases) {
    EXPECT_EQ(ToLower(upper), lower) << static_cast<uint32_t>(upper);
  }
}

}  // namespace
}  // namespace icecache
