#include "worker/model/added_tokens.h"

#include <locale.h>
#include <wctype.h>

#include <algorithm>

#include "worker/model/utf8.h"

namespace icecache {
namespace {

bool IsWordCharacter(char32_t code) {
  static const locale_t unicode = newlocale(LC_CTYPE_MASK, "C.UTF-8", nullptr);
  if (code < 0x80) {
    return (code >= '0' && code <= '9') || (code >= 'a' && code <= 'z') ||
           (code >= 'A' && code <= 'Z') || code == '_';
  }
  return unicode == nullptr || iswalnum_l(static_cast<wint_t>(code), unicode) != 0;
}

// Start of the character that ends at `end`. REQUIRES: end > 0, valid UTF-8.
size_t CharacterBefore(std::string_view text, size_t end) {
  size_t at = end - 1;
  while (at > 0 && (static_cast<uint8_t>(text[at]) & 0xC0u) == 0x80) --at;
  return at;
}

bool StandsAlone(std::string_view text, size_t begin, size_t end) {
  const bool before =
      begin > 0 && IsWordCharacter(DecodeUtf8(text, CharacterBefore(text, begin)).code);
  const bool behind = end < text.size() && IsWordCharacter(DecodeUtf8(text, end).code);
  return !before && !behind;
}

}  // namespace

void AddedTokenMatcher::Add(AddedToken token) {
  if (token.content.empty()) return;
  std::vector<AddedToken>& list = by_first_byte_[static_cast<uint8_t>(token.content[0])];
  const auto place = std::find_if(list.begin(), list.end(), [&](const AddedToken& other) {
    return other.content.size() < token.content.size();
  });
  list.insert(place, std::move(token));
}

const AddedToken* AddedTokenMatcher::LongestAt(std::string_view text, size_t at) const {
  for (const AddedToken& token : by_first_byte_[static_cast<uint8_t>(text[at])]) {
    if (text.substr(at).starts_with(token.content)) return &token;
  }
  return nullptr;
}

Status AddedTokenMatcher::Visit(std::string_view text,
                                const std::function<Status(size_t begin, size_t end)>& between,
                                const std::function<void(int32_t id)>& token) const {
  size_t done = 0;  // everything before has been visited
  for (size_t at = 0; at < text.size();) {
    const AddedToken* found = LongestAt(text, at);
    if (found == nullptr) {
      ++at;
      continue;
    }
    size_t begin = at;
    size_t end = at + found->content.size();
    at = end;
    if (found->single_word && !StandsAlone(text, begin, end)) continue;
    while (found->lstrip && begin > done) {
      const size_t before = CharacterBefore(text, begin);
      if (before < done || !IsWhitespace(DecodeUtf8(text, before).code)) break;
      begin = before;
    }
    while (found->rstrip && end < text.size()) {
      const Utf8Char c = DecodeUtf8(text, end);
      if (!IsWhitespace(c.code)) break;
      end += c.bytes;
    }
    if (begin > done) KV_RETURN_IF_ERROR(between(done, begin));
    token(found->id);
    done = end;
    at = end;
  }
  return done < text.size() ? between(done, text.size()) : OkStatus();
}

}  // namespace icecache
