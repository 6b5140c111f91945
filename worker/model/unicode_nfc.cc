#include "worker/model/unicode_nfc.h"

#include <algorithm>
#include <unordered_map>
#include <vector>

#include "worker/model/utf8.h"

namespace icecache {
namespace {

// Below this every character is its own NFC form and combines with nothing before it.
constexpr char32_t kFirstMark = 0x300;

// Hangul syllables are arithmetic: leading x vowel x trailing.
constexpr uint32_t kSyllables = 0xAC00, kLeading = 0x1100, kVowel = 0x1161, kTrailing = 0x11A7;
constexpr uint32_t kLeadingCount = 19, kVowelCount = 21, kTrailingCount = 28;
constexpr uint32_t kSyllableCount = kLeadingCount * kVowelCount * kTrailingCount;

struct Tables {
  std::unordered_map<uint32_t, std::pair<uint32_t, uint32_t>> decompositions;
  std::unordered_map<uint64_t, uint32_t> compositions;
  std::unordered_map<uint32_t, uint8_t> classes;
};

uint64_t PairKey(uint32_t first, uint32_t second) { return uint64_t{first} << 32 | second; }

const Tables& GetTables() {
  static const Tables tables = [] {
    Tables t;
    for (size_t i = 0; i < nfc::kComposingCount; ++i) {
      const uint32_t* row = nfc::kComposing + 3 * i;
      t.decompositions[row[0]] = {row[1], row[2]};
      t.compositions[PairKey(row[1], row[2])] = row[0];
    }
    for (size_t i = 0; i < nfc::kOnlyDecomposingCount; ++i) {
      const uint32_t* row = nfc::kOnlyDecomposing + 3 * i;
      t.decompositions[row[0]] = {row[1], row[2]};
    }
    for (size_t i = 0; i < nfc::kClassesCount; ++i) {
      const uint32_t* row = nfc::kClasses + 3 * i;
      for (uint32_t code = row[0]; code <= row[1]; ++code)
        t.classes[code] = static_cast<uint8_t>(row[2]);
    }
    return t;
  }();
  return tables;
}

uint8_t ClassOf(uint32_t code) {
  if (code < kFirstMark) return 0;
  const auto it = GetTables().classes.find(code);
  return it == GetTables().classes.end() ? 0 : it->second;
}

void Decompose(uint32_t code, std::vector<uint32_t>& to) {
  if (code - kSyllables < kSyllableCount) {
    const uint32_t index = code - kSyllables;
    to.push_back(kLeading + index / (kVowelCount * kTrailingCount));
    to.push_back(kVowel + index / kTrailingCount % kVowelCount);
    if (index % kTrailingCount != 0) to.push_back(kTrailing + index % kTrailingCount);
    return;
  }
  const auto it = GetTables().decompositions.find(code);
  if (it == GetTables().decompositions.end()) {
    to.push_back(code);
    return;
  }
  Decompose(it->second.first, to);  // at most 4 deep in Unicode's data
  if (it->second.second != 0) Decompose(it->second.second, to);
}

// 0 when the pair does not compose.
uint32_t Compose(uint32_t first, uint32_t second) {
  if (first - kLeading < kLeadingCount && second - kVowel < kVowelCount) {
    return kSyllables + ((first - kLeading) * kVowelCount + (second - kVowel)) * kTrailingCount;
  }
  const bool open_syllable =
      first - kSyllables < kSyllableCount && (first - kSyllables) % kTrailingCount == 0;
  if (open_syllable && second > kTrailing && second < kTrailing + kTrailingCount) {
    return first + (second - kTrailing);
  }
  const auto it = GetTables().compositions.find(PairKey(first, second));
  return it == GetTables().compositions.end() ? 0 : it->second;
}

void OrderMarks(std::vector<uint32_t>& codes) {
  for (size_t i = 0; i < codes.size();) {
    if (ClassOf(codes[i]) == 0) {
      ++i;
      continue;
    }
    size_t end = i;
    while (end < codes.size() && ClassOf(codes[end]) != 0) ++end;
    std::stable_sort(codes.begin() + static_cast<ptrdiff_t>(i),
                     codes.begin() + static_cast<ptrdiff_t>(end),
                     [](uint32_t a, uint32_t b) { return ClassOf(a) < ClassOf(b); });
    i = end;
  }
}

// A mark joins the last starter unless a mark of its class or higher, or a starter, stands between.
void ComposeAll(std::vector<uint32_t>& codes) {
  size_t out = 0;
  size_t starter = SIZE_MAX;
  int last_class = -1;  // of what stands between the starter and here; -1: nothing
  for (const uint32_t code : codes) {
    const int combining = ClassOf(code);
    const bool blocked = last_class != -1 && (last_class == 0 || last_class >= combining);
    const uint32_t joined = starter == SIZE_MAX || blocked ? 0 : Compose(codes[starter], code);
    if (joined != 0) {
      codes[starter] = joined;
      continue;
    }
    if (combining == 0) {
      starter = out;
      last_class = -1;
    } else {
      last_class = combining;
    }
    codes[out++] = code;
  }
  codes.resize(out);
}

}  // namespace

std::string NormalizeNfc(std::string_view text) {
  std::vector<uint32_t> codes;
  bool plain = true;
  for (size_t at = 0; at < text.size();) {
    const Utf8Char c = DecodeUtf8(text, at);
    plain = plain && c.code < kFirstMark;
    at += c.bytes;
  }
  if (plain) return std::string(text);
  codes.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    const Utf8Char c = DecodeUtf8(text, at);
    Decompose(c.code, codes);
    at += c.bytes;
  }
  OrderMarks(codes);
  ComposeAll(codes);
  std::string result;
  result.reserve(text.size());
  for (const uint32_t code : codes) AppendUtf8(code, result);
  return result;
}

}  // namespace icecache
