#include "worker/model/pretokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <unordered_map>

#include "worker/model/utf8.h"

namespace icecache {
namespace {

using Json = nlohmann::json;

// GPT-2's own split, which ByteLevel applies when use_regex is set.
constexpr char kGpt2Pattern[] =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// \w+|[^\w\s]+ with the \w of the library's regular expressions, which counts marks and joiners and
// leaves out numbers that are no digits; PCRE2's own differs.
constexpr char kWordsOrMarks[] = R"([\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]+)"
                                 R"(|[^\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}\s]+)";

struct Segment {
  size_t begin;
  size_t end;
  bool match;
};

// Bytes that print as themselves keep their value; the others move above 255 in order.
std::array<char32_t, 256> MakeByteSymbols() {
  std::array<char32_t, 256> symbols{};
  char32_t next = 256;
  for (uint32_t byte = 0; byte < 256; ++byte) {
    const bool prints =
        (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
    symbols[byte] = prints ? byte : next++;
  }
  return symbols;
}
const std::array<char32_t, 256> kByteSymbols = MakeByteSymbols();

std::string MapBytes(std::string_view text) {
  std::string mapped;
  mapped.reserve(text.size() * 2);
  for (const char byte : text) AppendUtf8(kByteSymbols[static_cast<uint8_t>(byte)], mapped);
  return mapped;
}

std::string ReplaceAll(std::string_view text, char from, std::string_view to) {
  std::string replaced;
  for (const char c : text) {
    if (c == from) {
      replaced += to;
    } else {
      replaced += c;
    }
  }
  return replaced;
}

// Matches and what lies between them, together covering the text.
Result<std::vector<Segment>> FindSegments(const Pattern& pattern, std::string_view text,
                                          bool invert) {
  std::vector<Segment> segments;
  size_t at = 0;
  KV_RETURN_IF_ERROR(pattern.ForEach(text, [&](size_t begin, size_t end) {
    if (begin > at) segments.push_back({at, begin, invert});
    segments.push_back({begin, end, !invert});
    at = end;
  }));
  if (at < text.size()) segments.push_back({at, text.size(), invert});
  return segments;
}

// A match joins its neighbour unless that neighbour is a match itself.
void MergeMatches(bool with_previous, std::vector<Segment>& segments) {
  if (!with_previous) std::reverse(segments.begin(), segments.end());
  std::vector<Segment> merged;
  bool previous_match = false;
  for (const Segment& segment : segments) {
    if (segment.match && !previous_match && !merged.empty()) {
      merged.back().begin = std::min(merged.back().begin, segment.begin);
      merged.back().end = std::max(merged.back().end, segment.end);
    } else {
      merged.push_back(segment);
    }
    previous_match = segment.match;
  }
  if (!with_previous) std::reverse(merged.begin(), merged.end());
  segments = std::move(merged);
}

void ApplyBehavior(SplitBehavior behavior, std::vector<Segment>& segments) {
  switch (behavior) {
    case SplitBehavior::kIsolated:
      return;
    case SplitBehavior::kRemoved:
      std::erase_if(segments, [](const Segment& s) { return s.match; });
      return;
    case SplitBehavior::kMergedWithPrevious:
      return MergeMatches(true, segments);
    case SplitBehavior::kMergedWithNext:
      return MergeMatches(false, segments);
    case SplitBehavior::kContiguous: {
      std::vector<Segment> merged;
      for (const Segment& segment : segments) {
        if (!merged.empty() && merged.back().match == segment.match) {
          merged.back().end = segment.end;
        } else {
          merged.push_back(segment);
        }
      }
      segments = std::move(merged);
    }
  }
}

Status Split(const Pattern& pattern, SplitBehavior behavior, bool invert, std::string_view text,
             std::vector<std::string>& to) {
  KV_ASSIGN_OR_RETURN(std::vector<Segment> segments, FindSegments(pattern, text, invert));
  ApplyBehavior(behavior, segments);
  for (const Segment& segment : segments) {
    to.emplace_back(text.substr(segment.begin, segment.end - segment.begin));
  }
  return OkStatus();
}

}  // namespace

char32_t ByteToSymbol(uint8_t byte) { return kByteSymbols[byte]; }

int SymbolToByte(char32_t symbol) {
  static const std::unordered_map<char32_t, int> bytes = [] {
    std::unordered_map<char32_t, int> map;
    for (int byte = 0; byte < 256; ++byte) map[kByteSymbols[static_cast<size_t>(byte)]] = byte;
    return map;
  }();
  const auto it = bytes.find(symbol);
  return it == bytes.end() ? -1 : it->second;
}

struct Pattern::Code {
  pcre2_code* code;
  ~Code() { pcre2_code_free(code); }
};

Result<Pattern> Pattern::Compile(const std::string& expression, bool literal,
                                 const std::string& where) {
  int error = 0;
  PCRE2_SIZE offset = 0;
  pcre2_code* code =
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(expression.data()), expression.size(),
                    PCRE2_UTF | (literal ? PCRE2_LITERAL : PCRE2_UCP), &error, &offset, nullptr);
  if (code == nullptr) {
    PCRE2_UCHAR reason[256] = {};
    pcre2_get_error_message(error, reason, sizeof(reason));
    return InvalidArgument(where + ": pattern '" + expression + "' at byte " +
                           std::to_string(offset) + ": " + reinterpret_cast<const char*>(reason));
  }
  // Without JIT (a CPU it does not know, or no executable memory) matching is slower, not wrong.
  (void)pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);
  return Pattern(std::shared_ptr<const Code>(new Code{code}));
}

Status Pattern::ForEach(std::string_view text,
                        const std::function<void(size_t begin, size_t end)>& found) const {
  const std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> data(
      pcre2_match_data_create_from_pattern(code_->code, nullptr), &pcre2_match_data_free);
  KV_CHECK(data != nullptr);
  const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  // The caller vouches for the encoding: checking it at each call would make the loop quadratic.
  const uint32_t options = PCRE2_NO_UTF_CHECK | PCRE2_NOTEMPTY;
  size_t at = 0;
  while (at < text.size()) {
    int rc = pcre2_match(code_->code, subject, text.size(), at, options, data.get(), nullptr);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT) {  // the interpreter keeps its stack on the heap
      rc = pcre2_match(code_->code, subject, text.size(), at, options | PCRE2_NO_JIT, data.get(),
                       nullptr);
    }
    if (rc == PCRE2_ERROR_NOMATCH) return OkStatus();
    if (rc < 0) {
      PCRE2_UCHAR reason[256] = {};
      pcre2_get_error_message(rc, reason, sizeof(reason));
      return Internal("pre-tokenizer pattern at byte " + std::to_string(at) +
                      " of the text: " + reinterpret_cast<const char*>(reason));
    }
    const PCRE2_SIZE* range = pcre2_get_ovector_pointer(data.get());
    if (range[1] <= at)
      return Internal("pre-tokenizer pattern: a match that ends before it begins (\\K)");
    found(range[0], range[1]);
    at = range[1];
  }
  return OkStatus();
}

// Turns the JSON of any pre-tokenizer into steps.
class PreTokenizerParser {
 public:
  PreTokenizerParser(std::string where, PreTokenizer& to) : where_(std::move(where)), to_(to) {}

  Status Parse(const Json& json, int depth);

 private:
  using Step = PreTokenizer::Step;

  Status AddSplit(const std::string& expression, bool literal, SplitBehavior behavior,
                  bool invert) {
    KV_ASSIGN_OR_RETURN(Pattern pattern, Pattern::Compile(expression, literal, where_));
    to_.steps_.push_back({Step::Kind::kSplit, {std::move(pattern)}, behavior, invert, {}, {}});
    return OkStatus();
  }
  Status AddPatternSplit(const Json& json);
  Status AddByteLevel(const Json& json);
  Status AddMetaspace(const Json& json);
  Result<SplitBehavior> ParseBehavior(const Json& json, const std::string& fallback);

  static bool Flag(const Json& json, const char* key, bool fallback) {
    const auto it = json.find(key);
    return it != json.end() && it->is_boolean() ? it->get<bool>() : fallback;
  }
  static std::string Text(const Json& json, const char* key, const std::string& fallback) {
    const auto it = json.find(key);
    return it != json.end() && it->is_string() ? it->get<std::string>() : fallback;
  }

  const std::string where_;
  PreTokenizer& to_;
};

Result<SplitBehavior> PreTokenizerParser::ParseBehavior(const Json& json,
                                                        const std::string& fallback) {
  const std::string name = Text(json, "behavior", fallback);
  if (name == "Removed") return SplitBehavior::kRemoved;
  if (name == "Isolated") return SplitBehavior::kIsolated;
  if (name == "MergedWithPrevious") return SplitBehavior::kMergedWithPrevious;
  if (name == "MergedWithNext") return SplitBehavior::kMergedWithNext;
  if (name == "Contiguous") return SplitBehavior::kContiguous;
  return InvalidArgument(where_ + ": behavior '" + name + "', expected Removed, Isolated, " +
                         "MergedWithPrevious, MergedWithNext or Contiguous");
}

Status PreTokenizerParser::AddPatternSplit(const Json& json) {
  KV_ASSIGN_OR_RETURN(const SplitBehavior behavior, ParseBehavior(json, ""));
  const auto pattern = json.find("pattern");
  const bool regex = pattern != json.end() && pattern->is_object() && pattern->contains("Regex");
  const bool literal = pattern != json.end() && pattern->is_object() && pattern->contains("String");
  if (!regex && !literal)
    return InvalidArgument(where_ + ": Split without a 'Regex' or 'String' pattern");
  return AddSplit(Text(*pattern, regex ? "Regex" : "String", ""), literal, behavior,
                  Flag(json, "invert", false));
}

Status PreTokenizerParser::AddByteLevel(const Json& json) {
  if (Flag(json, "add_prefix_space", true))
    to_.steps_.push_back({.kind = Step::Kind::kPrefixSpace});
  if (Flag(json, "use_regex", true)) {
    KV_RETURN_IF_ERROR(AddSplit(kGpt2Pattern, false, SplitBehavior::kIsolated, false));
  }
  to_.steps_.push_back({.kind = Step::Kind::kMapBytes});
  return OkStatus();
}

Status PreTokenizerParser::AddMetaspace(const Json& json) {
  Step step{.kind = Step::Kind::kMetaspace};
  step.mark = Text(json, "replacement", "\u2581");
  const std::string scheme =
      Text(json, "prepend_scheme", Flag(json, "add_prefix_space", true) ? "always" : "never");
  if (scheme == "always") step.prepend = Step::Prepend::kAlways;
  if (scheme == "first") step.prepend = Step::Prepend::kFirst;
  if (Flag(json, "split", true)) {
    KV_ASSIGN_OR_RETURN(Pattern pattern, Pattern::Compile(step.mark, true, where_));
    step.pattern.push_back(std::move(pattern));
    step.behavior = SplitBehavior::kMergedWithNext;
  }
  to_.steps_.push_back(std::move(step));
  return OkStatus();
}

Status PreTokenizerParser::Parse(const Json& json, int depth) {
  if (json.is_null()) return OkStatus();
  const std::string type = json.is_object() ? Text(json, "type", "") : "";
  if (type == "Sequence" && depth < 4) {
    const auto list = json.find("pretokenizers");
    if (list == json.end() || !list->is_array()) {
      return InvalidArgument(where_ + ": Sequence without an array 'pretokenizers'");
    }
    for (const Json& item : *list) KV_RETURN_IF_ERROR(Parse(item, depth + 1));
    return OkStatus();
  }
  if (type == "ByteLevel") return AddByteLevel(json);
  if (type == "Split") return AddPatternSplit(json);
  if (type == "Metaspace") return AddMetaspace(json);
  if (type == "WhitespaceSplit") return AddSplit(R"(\s+)", false, SplitBehavior::kRemoved, false);
  if (type == "Whitespace") return AddSplit(kWordsOrMarks, false, SplitBehavior::kRemoved, true);
  if (type == "Digits") {
    return AddSplit(R"(\p{N})", false,
                    Flag(json, "individual_digits", false) ? SplitBehavior::kIsolated
                                                           : SplitBehavior::kContiguous,
                    false);
  }
  if (type == "Punctuation") {
    KV_ASSIGN_OR_RETURN(const SplitBehavior behavior, ParseBehavior(json, "Isolated"));
    return AddSplit(R"([\p{P}$+<=>^`|~])", false, behavior, false);
  }
  if (type == "CharDelimiterSplit") {
    return AddSplit(Text(json, "delimiter", ""), true, SplitBehavior::kRemoved, false);
  }
  return Unimplemented(where_ + ": type '" + type +
                       "', expected ByteLevel, Split, Sequence, Metaspace, " +
                       "WhitespaceSplit, Whitespace, Digits, Punctuation or CharDelimiterSplit");
}

Result<PreTokenizer> PreTokenizer::Parse(std::string_view json, const std::string& where) {
  const Json parsed = Json::parse(json, nullptr, /*allow_exceptions=*/false);
  if (parsed.is_discarded()) return InvalidArgument(where + ": not JSON");
  PreTokenizer result;
  KV_RETURN_IF_ERROR(PreTokenizerParser(where, result).Parse(parsed, 0));
  return result;
}

Status PreTokenizer::RunStep(const Step& step, bool at_start, std::string&& piece,
                             std::vector<std::string>& to) {
  switch (step.kind) {
    case Step::Kind::kSplit:
      return Split(step.pattern[0], step.behavior, step.invert, piece, to);
    case Step::Kind::kMapBytes:
      to.push_back(MapBytes(piece));
      return OkStatus();
    case Step::Kind::kPrefixSpace:
      if (piece[0] != ' ') piece.insert(0, 1, ' ');
      to.push_back(std::move(piece));
      return OkStatus();
    case Step::Kind::kMetaspace:
      break;
  }
  std::string marked = ReplaceAll(piece, ' ', step.mark);
  const bool prepend =
      step.prepend == Step::Prepend::kAlways || (step.prepend == Step::Prepend::kFirst && at_start);
  if (prepend && !marked.starts_with(step.mark)) marked.insert(0, step.mark);
  if (!step.pattern.empty()) return Split(step.pattern[0], step.behavior, false, marked, to);
  to.push_back(std::move(marked));
  return OkStatus();
}

Status PreTokenizer::Run(std::string_view text, bool at_start,
                         std::vector<std::string>& pieces) const {
  if (text.empty()) return OkStatus();
  std::vector<std::string> current{std::string(text)};
  std::vector<std::string> next;
  for (const Step& step : steps_) {
    next.clear();
    for (size_t i = 0; i < current.size(); ++i) {
      KV_RETURN_IF_ERROR(RunStep(step, at_start && i == 0, std::move(current[i]), next));
    }
    std::swap(current, next);
  }
  std::move(current.begin(), current.end(), std::back_inserter(pieces));
  return OkStatus();
}

}  // namespace icecache
