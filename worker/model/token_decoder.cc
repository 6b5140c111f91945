#include "worker/model/token_decoder.h"

#include <charconv>
#include <nlohmann/json.hpp>

#include "worker/model/pretokenizer.h"
#include "worker/model/utf8.h"

namespace icecache {
namespace {

using Json = nlohmann::json;

constexpr uint32_t kStripMax = 64;

std::string Text(const Json& json, const char* key) {
  const auto it = json.find(key);
  return it != json.end() && it->is_string() ? it->get<std::string>() : std::string();
}

void ReplaceAll(const std::string& from, const std::string& to, std::string& text) {
  if (from.empty()) return;
  for (size_t at = text.find(from); at != std::string::npos; at = text.find(from, at + to.size())) {
    text.replace(at, from.size(), to);
  }
}

// "<0x0A>" -> 10; -1 for any other token.
int FallbackByte(std::string_view token) {
  if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return -1;
  int byte = 0;
  const auto [end, error] = std::from_chars(token.data() + 3, token.data() + 5, byte, 16);
  return error == std::errc() && end == token.data() + 5 ? byte : -1;
}

// A token with a character outside the byte alphabet (an added token, usually) stands for itself.
void AppendByteLevel(std::string_view token, std::string& bytes) {
  const size_t start = bytes.size();
  for (size_t at = 0; at < token.size();) {
    const Utf8Char c = DecodeUtf8(token, at);
    const int byte = c.valid ? SymbolToByte(c.code) : -1;
    if (byte < 0) {
      bytes.resize(start);
      bytes.append(token);
      return;
    }
    bytes += static_cast<char>(byte);
    at += c.bytes;
  }
}

}  // namespace

class TokenDecoderParser {
 public:
  TokenDecoderParser(std::string where, TokenDecoder& to) : where_(std::move(where)), to_(to) {}

  Status Parse(const Json& json, int depth) {
    const std::string type = json.is_object() ? Text(json, "type") : std::string();
    if (type == "Sequence" && depth < 4) {
      const auto list = json.find("decoders");
      if (list == json.end() || !list->is_array()) {
        return InvalidArgument(where_ + ": Sequence without an array 'decoders'");
      }
      for (const Json& item : *list) KV_RETURN_IF_ERROR(Parse(item, depth + 1));
      return OkStatus();
    }
    if (type == "ByteLevel") {
      to_.byte_level_ = true;
    } else if (type == "ByteFallback") {
      to_.byte_fallback_ = true;
    } else if (type == "Fuse") {
      to_.fused_ = true;
    } else if (type == "Metaspace") {
      ParseMetaspace(json);
    } else if (type == "Replace") {
      return ParseReplace(json);
    } else if (type == "Strip") {
      return ParseStrip(json);
    } else {
      return Unimplemented(where_ + ": type '" + type +
                           "', expected ByteLevel, ByteFallback, Fuse, " +
                           "Metaspace, Replace, Strip or Sequence");
    }
    return OkStatus();
  }

 private:
  void ParseMetaspace(const Json& json) {
    const std::string mark = Text(json, "replacement");
    to_.replacements_.emplace_back(mark.empty() ? "\u2581" : mark, " ");
    const auto prefix = json.find("add_prefix_space");
    const bool never =
        Text(json, "prepend_scheme") == "never" || (prefix != json.end() && *prefix == false);
    to_.drop_first_space_ = !never;
  }
  Status ParseReplace(const Json& json) {
    const auto pattern = json.find("pattern");
    if (pattern == json.end() || !pattern->is_object() || Text(*pattern, "String").empty()) {
      return Unimplemented(where_ + ": Replace without a 'String' pattern");
    }
    to_.replacements_.emplace_back(Text(*pattern, "String"), Text(json, "content"));
    return OkStatus();
  }
  Status ParseStrip(const Json& json) {
    const auto start = json.find("start");
    const auto stop = json.find("stop");
    const bool plain = start != json.end() && start->is_number_unsigned() &&
                       start->get<uint64_t>() <= kStripMax && (stop == json.end() || *stop == 0);
    if (!plain || !to_.fused_) {
      return Unimplemented(where_ +
                           ": Strip other than 'start' characters of the whole text (after Fuse)");
    }
    to_.strip_count_ = start->get<uint32_t>();
    to_.strip_text_ = Text(json, "content");
    return OkStatus();
  }

  const std::string where_;
  TokenDecoder& to_;
};

Result<TokenDecoder> TokenDecoder::Parse(std::string_view text, const std::string& where) {
  const Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (json.is_discarded()) return InvalidArgument(where + ": not JSON");
  TokenDecoder decoder;
  if (json.is_null()) {
    decoder.join_with_spaces_ = true;
    return decoder;
  }
  KV_RETURN_IF_ERROR(TokenDecoderParser(where, decoder).Parse(json, 0));
  return decoder;
}

void TokenDecoder::Append(std::string_view token, bool first, std::string& bytes) const {
  if (join_with_spaces_ && !first) bytes += ' ';
  const int fallback = byte_fallback_ ? FallbackByte(token) : -1;
  if (fallback >= 0) {
    bytes += static_cast<char>(fallback);
  } else if (byte_level_) {
    AppendByteLevel(token, bytes);
  } else {
    std::string replaced(token);
    for (const auto& [from, to] : replacements_) ReplaceAll(from, to, replaced);
    const bool drop = drop_first_space_ && first && replaced.starts_with(' ');
    bytes.append(replaced, drop ? 1 : 0);
  }
}

}  // namespace icecache
