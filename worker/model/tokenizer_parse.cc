// tokenizer.json -> TokenizerParts.
#include <algorithm>
#include <nlohmann/json.hpp>

#include "common/limits.h"
#include "worker/model/tokenizer_parts.h"

namespace icecache {
namespace {

using Json = nlohmann::json;

// The parsers of the parts take text, so that JSON types stay out of their headers.
std::string Part(const Json& json, const char* key) {
  const auto it = json.find(key);
  return it == json.end() ? "null" : it->dump();
}

bool Flag(const Json& json, const char* key, bool fallback) {
  const auto it = json.find(key);
  return it != json.end() && it->is_boolean() ? it->get<bool>() : fallback;
}

Status ParseAddedToken(const Json& json, const std::string& where, TokenizerParts& parts) {
  const auto id = json.is_object() ? json.find("id") : json.end();
  const auto content = json.is_object() ? json.find("content") : json.end();
  if (!json.is_object() || id == json.end() || content == json.end() || !content->is_string() ||
      !id->is_number_unsigned() || id->get<uint64_t>() >= limits::kVocabMax) {
    return InvalidArgument(where + ": added_tokens: " + json.dump() +
                           ", expected 'content' and an 'id' of 0.." +
                           std::to_string(limits::kVocabMax - 1));
  }
  AddedToken token;
  token.content = content->get<std::string>();
  token.id = id->get<int32_t>();
  token.special = Flag(json, "special", false);
  token.single_word = Flag(json, "single_word", false);
  token.lstrip = Flag(json, "lstrip", false);
  token.rstrip = Flag(json, "rstrip", false);
  token.normalized = Flag(json, "normalized", !token.special);
  if (!parts.vocabulary.Add(token.content, token.id)) {
    return InvalidArgument(where + ": added token '" + token.content + "' has id " +
                           std::to_string(token.id) + ", the vocabulary says " +
                           std::to_string(parts.vocabulary.Find(token.content).value_or(-1)));
  }
  if (parts.special.size() < parts.vocabulary.size()) parts.special.resize(parts.vocabulary.size());
  if (token.special) parts.special[static_cast<size_t>(token.id)] = true;
  if (!token.normalized) {
    parts.raw_tokens.Add(std::move(token));
    return OkStatus();
  }
  KV_ASSIGN_OR_RETURN(token.content, parts.normalizer.Run(token.content));
  parts.normalized_tokens.Add(std::move(token));
  return OkStatus();
}

// Ids that a template names; "special_tokens": {name: {"ids": [...]}}.
Status AppendTemplateIds(const Json& json, const std::string& name, const std::string& where,
                         std::vector<int32_t>& ids) {
  const auto tokens = json.find("special_tokens");
  const auto token = tokens != json.end() && tokens->is_object() ? tokens->find(name) : json.end();
  const bool found = tokens != json.end() && tokens->is_object() && token != tokens->end();
  const auto list = found && token->is_object() ? token->find("ids") : json.end();
  if (!found || !token->is_object() || list == token->end() || !list->is_array()) {
    return InvalidArgument(where + ": TemplateProcessing: no ids for '" + name + "'");
  }
  for (const Json& id : *list) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() >= limits::kVocabMax) {
      return InvalidArgument(where + ": TemplateProcessing: '" + name + "' has id " + id.dump());
    }
    ids.push_back(id.get<int32_t>());
  }
  return OkStatus();
}

Status ParseTemplate(const Json& json, const std::string& where, TokenizerParts& parts) {
  const auto single = json.find("single");
  if (single == json.end() || !single->is_array()) {
    return InvalidArgument(where + ": TemplateProcessing without an array 'single'");
  }
  bool after_text = false;
  for (const Json& item : *single) {
    const bool text = item.is_object() && item.contains("Sequence");
    const auto special = item.is_object() ? item.find("SpecialToken") : item.end();
    if (text) {
      after_text = true;
    } else if (item.is_object() && special != item.end() && special->is_object() &&
               special->contains("id") && (*special)["id"].is_string()) {
      KV_RETURN_IF_ERROR(AppendTemplateIds(json, (*special)["id"].get<std::string>(), where,
                                           after_text ? parts.suffix : parts.prefix));
    } else {
      return InvalidArgument(where + ": TemplateProcessing: " + item.dump() +
                             ", expected a 'SpecialToken' or a 'Sequence'");
    }
  }
  return OkStatus();
}

Status ParsePostProcessor(const Json& json, const std::string& where, int depth,
                          TokenizerParts& parts) {
  if (json.is_null()) return OkStatus();
  const auto it = json.is_object() ? json.find("type") : json.end();
  const std::string type = json.is_object() && it != json.end() && it->is_string()
                               ? it->get<std::string>()
                               : std::string();
  if (type == "ByteLevel") return OkStatus();  // moves offsets, never ids
  if (type == "TemplateProcessing") return ParseTemplate(json, where, parts);
  if (type == "Sequence" && depth < 4) {
    const auto list = json.find("processors");
    if (list == json.end() || !list->is_array()) {
      return InvalidArgument(where + ": Sequence without an array 'processors'");
    }
    for (const Json& item : *list)
      KV_RETURN_IF_ERROR(ParsePostProcessor(item, where, depth + 1, parts));
    return OkStatus();
  }
  return Unimplemented(where + ": type '" + type +
                       "', expected ByteLevel, TemplateProcessing or Sequence");
}

}  // namespace

Result<std::unique_ptr<TokenizerParts>> ParseTokenizer(std::string_view text,
                                                       const std::string& where) {
  const Json json = text.size() > limits::kJsonFileBytesMax
                        ? Json(nullptr)
                        : Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return InvalidArgument(where + ": not a JSON object");
  auto parts = std::make_unique<TokenizerParts>();
  KV_ASSIGN_OR_RETURN(parts->normalizer,
                      Normalizer::Parse(Part(json, "normalizer"), where + ": normalizer"));
  KV_ASSIGN_OR_RETURN(parts->pre_tokenizer,
                      PreTokenizer::Parse(Part(json, "pre_tokenizer"), where + ": pre_tokenizer"));
  KV_ASSIGN_OR_RETURN(parts->decoder,
                      TokenDecoder::Parse(Part(json, "decoder"), where + ": decoder"));
  KV_RETURN_IF_ERROR(
      ParseTokenModel(Part(json, "model"), where + ": model", parts->vocabulary, parts->model));
  parts->special.resize(parts->vocabulary.size());
  if (const auto added = json.find("added_tokens"); added != json.end() && !added->is_null()) {
    if (!added->is_array()) return InvalidArgument(where + ": 'added_tokens' is no array");
    for (const Json& token : *added) KV_RETURN_IF_ERROR(ParseAddedToken(token, where, *parts));
  }
  const auto post = json.find("post_processor");
  if (post != json.end()) {
    KV_RETURN_IF_ERROR(ParsePostProcessor(*post, where + ": post_processor", 0, *parts));
  }
  return parts;
}

}  // namespace icecache
