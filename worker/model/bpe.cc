#include "worker/model/bpe.h"

#include <cstdio>
#include <nlohmann/json.hpp>
#include <queue>

#include "common/limits.h"
#include "worker/model/utf8.h"

namespace icecache {
namespace {

using Json = nlohmann::json;

struct Symbol {
  int32_t id;
  int32_t previous;  // index, -1 at the ends
  int32_t next;
  bool alive;
};

struct Candidate {
  uint32_t rank;
  int32_t at;  // index of the left symbol
  int32_t joined;

  // std::priority_queue yields the largest; that shall be the lowest rank, then the leftmost.
  friend bool operator<(const Candidate& a, const Candidate& b) {
    return a.rank != b.rank ? a.rank > b.rank : a.at > b.at;
  }
};

class PieceMerger {
 public:
  PieceMerger(const TokenModel& model, std::vector<Symbol>& symbols)
      : model_(model), symbols_(symbols) {}

  void Run() {
    for (size_t i = 0; i + 1 < symbols_.size(); ++i) Offer(static_cast<int32_t>(i));
    while (!queue_.empty()) {
      const Candidate best = queue_.top();
      queue_.pop();
      Symbol& left = symbols_[static_cast<size_t>(best.at)];
      const TokenModel::Merge* merge = left.alive ? Find(left) : nullptr;
      // The pair may have changed since it was offered; its successor has been offered then.
      if (merge == nullptr || merge->rank != best.rank) continue;
      Symbol& right = symbols_[static_cast<size_t>(left.next)];
      left.id = merge->joined;
      left.next = right.next;
      right.alive = false;
      if (left.next >= 0) symbols_[static_cast<size_t>(left.next)].previous = best.at;
      if (left.previous >= 0) Offer(left.previous);
      Offer(best.at);
    }
  }

 private:
  const TokenModel::Merge* Find(const Symbol& left) const {
    if (left.next < 0) return nullptr;
    const auto it = model_.merges.find(
        TokenModel::PairKey(left.id, symbols_[static_cast<size_t>(left.next)].id));
    return it == model_.merges.end() ? nullptr : &it->second;
  }
  void Offer(int32_t at) {
    const TokenModel::Merge* merge = Find(symbols_[static_cast<size_t>(at)]);
    if (merge != nullptr) queue_.push({merge->rank, at, merge->joined});
  }

  const TokenModel& model_;
  std::vector<Symbol>& symbols_;
  std::priority_queue<Candidate> queue_;
};

// The characters of a piece as entries, bytes or the unknown token.
void InitialIds(const Vocabulary& vocabulary, const TokenModel& model, std::string_view piece,
                std::vector<int32_t>& ids) {
  bool after_unknown = false;
  for (size_t at = 0; at < piece.size();) {
    const std::string_view character = piece.substr(at, DecodeUtf8(piece, at).bytes);
    at += character.size();
    const std::optional<int32_t> id = vocabulary.Find(character);
    const bool unknown = !id && model.byte_ids.empty();
    if (id) {
      ids.push_back(*id);
    } else if (!unknown) {
      for (const char byte : character) ids.push_back(model.byte_ids[static_cast<uint8_t>(byte)]);
    } else if (model.unknown && !(model.fuse_unknown && after_unknown)) {
      ids.push_back(*model.unknown);
    }
    after_unknown = unknown;
  }
}

void EncodeBpe(const Vocabulary& vocabulary, const TokenModel& model, std::string_view piece,
               std::vector<int32_t>& ids) {
  if (model.ignore_merges) {
    if (const std::optional<int32_t> whole = vocabulary.Find(piece)) {
      ids.push_back(*whole);
      return;
    }
  }
  std::vector<int32_t> initial;
  InitialIds(vocabulary, model, piece, initial);
  const auto count = static_cast<int32_t>(initial.size());
  std::vector<Symbol> symbols;
  symbols.reserve(initial.size());
  for (int32_t i = 0; i < count; ++i) {
    symbols.push_back({initial[static_cast<size_t>(i)], i - 1, i + 1 < count ? i + 1 : -1, true});
  }
  PieceMerger(model, symbols).Run();
  for (const Symbol& symbol : symbols) {
    if (symbol.alive) ids.push_back(symbol.id);
  }
}

std::string Text(const Json& json, const char* key) {
  const auto it = json.find(key);
  return it != json.end() && it->is_string() ? it->get<std::string>() : std::string();
}

bool Flag(const Json& json, const char* key) {
  const auto it = json.find(key);
  return it != json.end() && it->is_boolean() && it->get<bool>();
}

Status ParseVocabulary(const Json& json, const std::string& where, Vocabulary& vocabulary) {
  const auto vocab = json.find("vocab");
  if (vocab == json.end() || !vocab->is_object())
    return InvalidArgument(where + ": no object 'vocab'");
  for (const auto& [text, id] : vocab->items()) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() >= limits::kVocabMax) {
      return InvalidArgument(where + ": id of '" + text + "' is " + id.dump() + ", expected 0.." +
                             std::to_string(limits::kVocabMax - 1));
    }
    vocabulary.Add(text, id.get<int32_t>());
  }
  return OkStatus();
}

// "left right" in older files, ["left", "right"] in newer ones.
std::optional<std::pair<std::string, std::string>> MergeTexts(const Json& merge) {
  if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
    return std::pair(merge[0].get<std::string>(), merge[1].get<std::string>());
  }
  if (!merge.is_string()) return std::nullopt;
  const auto& text = merge.get_ref<const std::string&>();
  const size_t space = text.find(' ');
  if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos)
    return std::nullopt;
  return std::pair(text.substr(0, space), text.substr(space + 1));
}

Status ParseMerges(const Json& json, const std::string& where, const Vocabulary& vocabulary,
                   TokenModel& model) {
  const auto merges = json.find("merges");
  if (merges == json.end() || !merges->is_array())
    return InvalidArgument(where + ": no array 'merges'");
  model.merges.reserve(merges->size());
  uint32_t rank = 0;
  for (const Json& merge : *merges) {
    const auto texts = MergeTexts(merge);
    const auto name = [&] {
      return where + ": merge " + std::to_string(rank) + " (" + merge.dump() + ")";
    };
    if (!texts) return InvalidArgument(name() + ": expected two parts");
    const auto left = vocabulary.Find(texts->first);
    const auto right = vocabulary.Find(texts->second);
    const auto joined = vocabulary.Find(texts->first + texts->second);
    if (!left || !right || !joined) {
      return InvalidArgument(name() + ": a part or the whole is not in the vocabulary");
    }
    model.merges.try_emplace(TokenModel::PairKey(*left, *right), TokenModel::Merge{rank, *joined});
    ++rank;
  }
  return OkStatus();
}

Status ParseByteFallback(const std::string& where, const Vocabulary& vocabulary,
                         TokenModel& model) {
  for (int byte = 0; byte < 256; ++byte) {
    char text[8];
    std::snprintf(text, sizeof(text), "<0x%02X>", static_cast<unsigned>(byte));
    const auto id = vocabulary.Find(text);
    if (!id) return InvalidArgument(where + ": byte_fallback without the entry " + text);
    model.byte_ids.push_back(*id);
  }
  return OkStatus();
}

}  // namespace

bool Vocabulary::Add(std::string text, int32_t id) {
  KV_CHECK(id >= 0 && static_cast<uint32_t>(id) < limits::kVocabMax);
  const auto index = static_cast<size_t>(id);
  if (texts_.size() <= index) texts_.resize(index + 1);
  texts_[index] = text;
  const auto [it, added] = ids_.try_emplace(std::move(text), id);
  return added || it->second == id;
}

std::optional<int32_t> Vocabulary::Find(std::string_view text) const {
  const auto it = ids_.find(text);
  return it == ids_.end() ? std::nullopt : std::optional(it->second);
}

std::string_view Vocabulary::Text(int32_t id) const {
  return id >= 0 && static_cast<size_t>(id) < texts_.size()
             ? std::string_view(texts_[static_cast<size_t>(id)])
             : std::string_view();
}

Status ParseTokenModel(std::string_view text, const std::string& where, Vocabulary& vocabulary,
                       TokenModel& model) {
  const Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return InvalidArgument(where + ": not a JSON object");
  std::string type = Text(json, "type");
  if (type.empty() && json.contains("merges"))
    type = "BPE";  // files of early versions name no type
  if (type != "BPE" && type != "WordLevel") {
    return Unimplemented(where + ": type '" + type + "', expected BPE or WordLevel");
  }
  KV_RETURN_IF_ERROR(ParseVocabulary(json, where, vocabulary));
  if (const std::string unknown = Text(json, "unk_token"); !unknown.empty()) {
    model.unknown = vocabulary.Find(unknown);
    if (!model.unknown)
      return InvalidArgument(where + ": unk_token '" + unknown + "' is not in the vocabulary");
  }
  if (type == "WordLevel") {
    model.kind = TokenModel::Kind::kWordLevel;
    return OkStatus();
  }
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (!Text(json, key).empty())
      return Unimplemented(where + ": '" + std::string(key) + "' is set, expected null");
  }
  model.fuse_unknown = Flag(json, "fuse_unk");
  model.ignore_merges = Flag(json, "ignore_merges");
  if (Flag(json, "byte_fallback")) KV_RETURN_IF_ERROR(ParseByteFallback(where, vocabulary, model));
  return ParseMerges(json, where, vocabulary, model);
}

Status EncodePiece(const Vocabulary& vocabulary, const TokenModel& model, std::string_view piece,
                   std::vector<int32_t>& ids) {
  if (model.kind == TokenModel::Kind::kBpe) {
    EncodeBpe(vocabulary, model, piece, ids);
    return OkStatus();
  }
  const std::optional<int32_t> id = vocabulary.Find(piece);
  if (!id && !model.unknown) {
    return InvalidArgument("word '" + std::string(piece) +
                           "' is not in the vocabulary, which has no unk_token");
  }
  ids.push_back(id ? *id : *model.unknown);
  return OkStatus();
}

}  // namespace icecache
