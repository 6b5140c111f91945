#include "worker/model/normalizer.h"

#include <nlohmann/json.hpp>

#include "worker/model/unicode.h"
#include "worker/model/utf8.h"

namespace icecache {
namespace {

using Json = nlohmann::json;

std::string Lowercase(std::string_view text) {
  std::string lower;
  lower.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    const Utf8Char c = DecodeUtf8(text, at);
    if (c.code == 0x130) {
      lower += "i\u0307";  // the one letter whose lower case is two characters
    } else {
      AppendUtf8(ToLower(c.code), lower);
    }
    at += c.bytes;
  }
  return lower;
}

std::string Strip(std::string_view text, bool left, bool right) {
  size_t begin = 0;
  size_t end = 0;  // after the last character that is not white space
  bool seen = false;
  for (size_t at = 0; at < text.size();) {
    const Utf8Char c = DecodeUtf8(text, at);
    if (!IsWhitespace(c.code)) {
      if (!seen) begin = at;
      seen = true;
      end = at + c.bytes;
    }
    at += c.bytes;
  }
  if (!seen) return left || right ? std::string() : std::string(text);
  if (!left) begin = 0;
  if (!right) end = text.size();
  return std::string(text.substr(begin, end - begin));
}

Result<std::string> Replace(const Pattern& pattern, std::string_view content,
                            std::string_view text) {
  std::string replaced;
  size_t at = 0;
  KV_RETURN_IF_ERROR(pattern.ForEach(text, [&](size_t begin, size_t end) {
    replaced.append(text.substr(at, begin - at)).append(content);
    at = end;
  }));
  replaced.append(text.substr(at));
  return replaced;
}

std::string Text(const Json& json, const char* key) {
  const auto it = json.find(key);
  return it != json.end() && it->is_string() ? it->get<std::string>() : std::string();
}

}  // namespace

class NormalizerParser {
 public:
  NormalizerParser(std::string where, Normalizer& to) : where_(std::move(where)), to_(to) {}

  Status Parse(const Json& json, int depth) {
    using Kind = Normalizer::Step::Kind;
    if (json.is_null()) return OkStatus();
    const std::string type = json.is_object() ? Text(json, "type") : std::string();
    if (type == "Sequence" && depth < 4) {
      const auto list = json.find("normalizers");
      if (list == json.end() || !list->is_array()) {
        return InvalidArgument(where_ + ": Sequence without an array 'normalizers'");
      }
      for (const Json& item : *list) KV_RETURN_IF_ERROR(Parse(item, depth + 1));
      return OkStatus();
    }
    if (type == "Lowercase") return Add({.kind = Kind::kLowercase});
    if (type == "NFC") return Add({.kind = Kind::kNfc});
    if (type == "Prepend") return Add({.kind = Kind::kPrepend, .content = Text(json, "prepend")});
    if (type == "Replace") return AddReplace(json);
    if (type == "Strip") {
      return Add({.kind = Kind::kStrip,
                  .left = json.value("strip_left", Json(true)) == true,
                  .right = json.value("strip_right", Json(true)) == true});
    }
    return Unimplemented(where_ + ": type '" + type +
                         "', expected Lowercase, NFC, Prepend, Replace, Strip " + "or Sequence");
  }

 private:
  Status Add(Normalizer::Step step) {
    to_.steps_.push_back(std::move(step));
    return OkStatus();
  }
  Status AddReplace(const Json& json) {
    const auto pattern = json.find("pattern");
    const bool object = pattern != json.end() && pattern->is_object();
    const bool literal = object && pattern->contains("String");
    if (!literal && !(object && pattern->contains("Regex"))) {
      return InvalidArgument(where_ + ": Replace without a 'String' or 'Regex' pattern");
    }
    KV_ASSIGN_OR_RETURN(
        Pattern compiled,
        Pattern::Compile(Text(*pattern, literal ? "String" : "Regex"), literal, where_));
    return Add({.kind = Normalizer::Step::Kind::kReplace,
                .pattern = {std::move(compiled)},
                .content = Text(json, "content")});
  }

  const std::string where_;
  Normalizer& to_;
};

Result<Normalizer> Normalizer::Parse(std::string_view json, const std::string& where) {
  const Json parsed = Json::parse(json, nullptr, /*allow_exceptions=*/false);
  if (parsed.is_discarded()) return InvalidArgument(where + ": not JSON");
  Normalizer result;
  KV_RETURN_IF_ERROR(NormalizerParser(where, result).Parse(parsed, 0));
  return result;
}

Result<std::string> Normalizer::RunStep(const Step& step, std::string text) {
  switch (step.kind) {
    case Step::Kind::kLowercase:
      return Lowercase(text);
    case Step::Kind::kNfc:
      return NormalizeNfc(text);
    case Step::Kind::kPrepend:
      return text.empty() ? text : step.content + text;
    case Step::Kind::kReplace:
      return Replace(step.pattern[0], step.content, text);
    case Step::Kind::kStrip:
      break;
  }
  return Strip(text, step.left, step.right);
}

Result<std::string> Normalizer::Run(std::string_view text) const {
  std::string current(text);
  for (const Step& step : steps_) {
    KV_ASSIGN_OR_RETURN(current, RunStep(step, std::move(current)));
  }
  return current;
}

}  // namespace icecache
