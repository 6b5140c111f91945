#include "worker/model/utf8.h"

#include <algorithm>

#include "common/status.h"

namespace icecache {
namespace {

struct Lead {
  uint32_t bytes;      // of the whole character; 0: no lead byte
  uint8_t second_min;  // bounds of the second byte rule out overlong forms and surrogates
  uint8_t second_max;
};

Lead LeadOf(uint8_t byte) {
  if (byte < 0xC2) return {0, 0, 0};
  if (byte < 0xE0) return {2, 0x80, 0xBF};
  if (byte == 0xE0) return {3, 0xA0, 0xBF};
  if (byte == 0xED) return {3, 0x80, 0x9F};
  if (byte < 0xF0) return {3, 0x80, 0xBF};
  if (byte == 0xF0) return {4, 0x90, 0xBF};
  if (byte < 0xF4) return {4, 0x80, 0xBF};
  if (byte == 0xF4) return {4, 0x80, 0x8F};
  return {0, 0, 0};
}

}  // namespace

Utf8Char DecodeUtf8(std::string_view text, size_t at) {
  KV_CHECK(at < text.size());
  const auto first = static_cast<uint8_t>(text[at]);
  if (first < 0x80) return {first, 1, true, false};
  const Lead lead = LeadOf(first);
  if (lead.bytes == 0) return {};
  char32_t code = first & (0x7Fu >> lead.bytes);
  for (uint32_t i = 1; i < lead.bytes; ++i) {
    if (at + i >= text.size()) return {kReplacementCharacter, i, false, true};
    const auto byte = static_cast<uint8_t>(text[at + i]);
    const uint8_t min = i == 1 ? lead.second_min : 0x80;
    const uint8_t max = i == 1 ? lead.second_max : 0xBF;
    if (byte < min || byte > max) return {kReplacementCharacter, i, false, false};
    code = (code << 6) | (byte & 0x3Fu);
  }
  return {code, lead.bytes, true, false};
}

void AppendUtf8(char32_t code, std::string& to) {
  KV_CHECK(code < 0x110000 && (code < 0xD800 || code > 0xDFFF));
  if (code < 0x80) {
    to += static_cast<char>(code);
    return;
  }
  const int extra = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
  constexpr uint32_t kLeads[] = {0, 0xC0, 0xE0, 0xF0};
  to += static_cast<char>(kLeads[extra] | (code >> (6 * extra)));
  for (int i = extra - 1; i >= 0; --i) to += static_cast<char>(0x80u | ((code >> (6 * i)) & 0x3Fu));
}

std::string ReplaceBadUtf8(std::string_view text) {
  std::string good;
  good.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    const Utf8Char c = DecodeUtf8(text, at);
    if (c.valid) {
      good.append(text.substr(at, c.bytes));
    } else {
      AppendUtf8(kReplacementCharacter, good);
    }
    at += c.bytes;
  }
  return good;
}

size_t IncompleteUtf8Tail(std::string_view text) {
  // A character has at most 4 bytes, so only the last 3 can begin one that is not finished.
  for (size_t tail = std::min<size_t>(3, text.size()); tail > 0; --tail) {
    const Utf8Char c = DecodeUtf8(text, text.size() - tail);
    if (c.incomplete && c.bytes == tail) return tail;
  }
  return 0;
}

bool IsWhitespace(char32_t code) {
  return (code >= 0x09 && code <= 0x0D) || code == 0x20 || code == 0x85 || code == 0xA0 ||
         code == 0x1680 || (code >= 0x2000 && code <= 0x200A) || code == 0x2028 || code == 0x2029 ||
         code == 0x202F || code == 0x205F || code == 0x3000;
}

}  // namespace icecache
