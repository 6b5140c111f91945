#include "tests/bench/tasks/haystack.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "worker/serve/options.h"

namespace icecache {
namespace {

constexpr const char* kDefaultTexts = "/usr/share/common-licenses";

Result<std::vector<std::string>> TextFiles(const std::vector<std::string>& files) {
  if (!files.empty()) return files;
  std::vector<std::string> found;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(kDefaultTexts, error)) {
    if (entry.is_regular_file() && !entry.is_symlink()) found.push_back(entry.path().string());
  }
  if (found.empty())
    return NotFound(std::string("no text in ") + kDefaultTexts + "; name files with --text-files");
  std::sort(found.begin(), found.end());
  return found;
}

}  // namespace

std::string RandomNumber(TraceRandom& random, uint32_t digits) {
  std::string number(1, static_cast<char>('1' + random.Below(9)));
  while (number.size() < digits) number += static_cast<char>('0' + random.Below(10));
  return number;
}

std::string RandomUuid(TraceRandom& random) {
  std::string uuid;
  for (const uint32_t part : {8, 4, 4, 4, 12}) {
    if (!uuid.empty()) uuid += '-';
    for (uint32_t i = 0; i < part; ++i) uuid += "0123456789abcdef"[random.Below(16)];
  }
  return uuid;
}

std::string RandomWord(TraceRandom& random, uint32_t syllables) {
  std::string word;
  for (uint32_t i = 0; i < syllables; ++i) {
    word += "bdfgklmnprstvz"[random.Below(14)];
    word += "aeiou"[random.Below(5)];
  }
  return word;
}

Result<std::vector<std::string>> ReadSentences(const std::vector<std::string>& files) {
  KV_ASSIGN_OR_RETURN(const std::vector<std::string> names, TextFiles(files));
  std::vector<std::string> sentences;
  std::string sentence;
  for (const std::string& name : names) {
    KV_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(name));
    for (size_t i = 0; i < text.size(); ++i) {
      const bool space = text[i] == ' ' || text[i] == '\n' || text[i] == '\t';
      if (!space) sentence += text[i];
      if (space && !sentence.empty() && sentence.back() != ' ') sentence += ' ';
      const bool ends =
          text[i] == '.' && (i + 1 == text.size() || text[i + 1] == ' ' || text[i + 1] == '\n');
      if (!ends && sentence.size() < 400) continue;
      sentences.push_back(std::move(sentence));
      sentence.clear();
    }
  }
  if (sentence.size() > 1) sentences.push_back(std::move(sentence));
  if (sentences.empty()) return InvalidArgument("the --text-files hold no text");
  return sentences;
}

Result<std::string> MakeHaystack(const Tokenizer& tokenizer, TraceRandom& random,
                                 const HaystackSpec& spec) {
  const auto count = [&](const std::string& text) -> Result<uint32_t> {
    KV_ASSIGN_OR_RETURN(const std::vector<int32_t> tokens, tokenizer.Encode(text, false));
    return static_cast<uint32_t>(tokens.size());
  };
  uint32_t used = spec.frame_tokens;
  for (const std::string& needle : spec.needles) {
    KV_ASSIGN_OR_RETURN(const uint32_t tokens, count(needle + " "));
    used += tokens;
  }
  if (used > spec.tokens) {
    return InvalidArgument("length " + std::to_string(spec.tokens) + ": prompt and needles take " +
                           std::to_string(used) + " tokens; give a larger --lengths");
  }
  std::vector<std::string> body;
  size_t at = random.Below(static_cast<uint32_t>(spec.sentences->size()));
  while (true) {
    const std::string& sentence = (*spec.sentences)[at++ % spec.sentences->size()];
    KV_ASSIGN_OR_RETURN(const uint32_t tokens, count(sentence + " "));
    if (used + tokens > spec.tokens) break;
    used += std::max(1u, tokens);
    body.push_back(sentence);
  }
  std::vector<std::string> needles = spec.needles;
  if (!spec.keep_order) Shuffle(random, &needles);
  std::vector<size_t> cuts(needles.size());
  for (size_t& cut : cuts) cut = random.Below(static_cast<uint32_t>(body.size() + 1));
  std::sort(cuts.begin(), cuts.end());
  std::string text;
  for (size_t i = 0, n = 0; i <= body.size(); ++i) {
    for (; n < needles.size() && cuts[n] == i; ++n) text += needles[n] + " ";
    if (i < body.size()) text += body[i] + " ";
  }
  return text;
}

}  // namespace icecache
