#include "worker/model/tokenizer.h"

#include <unordered_map>

#include "common/limits.h"
#include "worker/model/file_bytes.h"
#include "worker/model/tokenizer_parts.h"
#include "worker/model/utf8.h"

namespace icecache {
namespace {

// One Encode call: its word cache and its output.
class Encoder {
 public:
  explicit Encoder(const TokenizerParts& parts) : parts_(parts) {}

  Status Run(std::string_view text) {
    return parts_.raw_tokens.Visit(
        text,
        [&](size_t begin, size_t end) {
          return Normalize(text.substr(begin, end - begin), begin == 0);
        },
        [&](int32_t id) { ids_.push_back(id); });
  }
  std::vector<int32_t>& ids() { return ids_; }

 private:
  Status Normalize(std::string_view text, bool at_start) {
    if (parts_.normalizer.identity()) return SplitNormalized(text, at_start);
    KV_ASSIGN_OR_RETURN(const std::string normalized, parts_.normalizer.Run(text));
    return SplitNormalized(normalized, at_start);
  }
  Status SplitNormalized(std::string_view text, bool at_start) {
    return parts_.normalized_tokens.Visit(
        text,
        [&](size_t begin, size_t end) {
          return EncodeText(text.substr(begin, end - begin), at_start && begin == 0);
        },
        [&](int32_t id) { ids_.push_back(id); });
  }
  Status EncodeText(std::string_view text, bool at_start) {
    pieces_.clear();
    KV_RETURN_IF_ERROR(parts_.pre_tokenizer.Run(text, at_start, pieces_));
    for (std::string& piece : pieces_) KV_RETURN_IF_ERROR(EncodeCached(std::move(piece)));
    return OkStatus();
  }
  // Most pieces of a text are words it has used before; their ids are copied from where they first
  // came.
  Status EncodeCached(std::string piece) {
    const auto known = cache_.find(piece);
    if (known != cache_.end()) {
      const auto [begin, end] = known->second;
      for (size_t i = begin; i < end; ++i) ids_.push_back(ids_[i]);
      return OkStatus();
    }
    const size_t begin = ids_.size();
    KV_RETURN_IF_ERROR(EncodePiece(parts_.vocabulary, parts_.model, piece, ids_));
    if (cache_.size() < limits::kWordCacheMax)
      cache_.emplace(std::move(piece), std::pair(begin, ids_.size()));
    return OkStatus();
  }

  const TokenizerParts& parts_;
  std::vector<int32_t> ids_;
  std::vector<std::string> pieces_;
  std::unordered_map<std::string, std::pair<size_t, size_t>>
      cache_;  // piece -> its ids' place in ids_
};

}  // namespace

Tokenizer::Tokenizer(std::unique_ptr<TokenizerParts> parts) : parts_(std::move(parts)) {}
Tokenizer::~Tokenizer() = default;

Result<std::unique_ptr<Tokenizer>> Tokenizer::Load(const std::string& directory) {
  KV_ASSIGN_OR_RETURN(const auto file, FileBytes::Map(directory + "/tokenizer.json"));
  return Parse(file->text(), file->path());
}

Result<std::unique_ptr<Tokenizer>> Tokenizer::Parse(std::string_view json,
                                                    const std::string& where) {
  KV_ASSIGN_OR_RETURN(auto parts, ParseTokenizer(json, where));
  return std::unique_ptr<Tokenizer>(new Tokenizer(std::move(parts)));
}

Result<std::vector<int32_t>> Tokenizer::Encode(std::string_view text, bool add_special) const {
  Encoder encoder(*parts_);
  if (add_special) encoder.ids() = parts_->prefix;
  KV_RETURN_IF_ERROR(encoder.Run(ReplaceBadUtf8(text)));
  std::vector<int32_t> ids = std::move(encoder.ids());
  if (add_special) ids.insert(ids.end(), parts_->suffix.begin(), parts_->suffix.end());
  return ids;
}

std::string Tokenizer::Decode(std::span<const int32_t> ids, bool skip_special) const {
  StreamDecoder decoder(*this, skip_special);
  std::string text;
  for (const int32_t id : ids) text += decoder.Push(id);
  return text + decoder.Finish();
}

std::optional<int32_t> Tokenizer::TokenId(std::string_view token) const {
  return parts_->vocabulary.Find(token);
}
std::string_view Tokenizer::TokenText(int32_t id) const { return parts_->vocabulary.Text(id); }
bool Tokenizer::IsSpecial(int32_t id) const {
  return id >= 0 && static_cast<size_t>(id) < parts_->special.size() &&
         parts_->special[static_cast<size_t>(id)];
}
uint32_t Tokenizer::vocab_size() const { return parts_->vocabulary.size(); }

std::string StreamDecoder::Push(int32_t id) {
  const TokenizerParts& parts = *tokenizer_.parts_;
  const std::string_view token = parts.vocabulary.Text(id);
  if (token.empty() || (skip_special_ && tokenizer_.IsSpecial(id))) return {};
  parts.decoder.Append(token, emitted_tokens_ == 0, held_);
  ++emitted_tokens_;
  const std::string& strip = parts.decoder.strip_text();
  while (at_start_ && !held_.empty()) {
    const bool strips =
        stripped_ < parts.decoder.strip_count() && !strip.empty() && held_.starts_with(strip);
    at_start_ = strips;
    if (strips) {
      held_.erase(0, strip.size());
      ++stripped_;
    }
  }
  const size_t whole = held_.size() - IncompleteUtf8Tail(held_);
  std::string text = ReplaceBadUtf8(std::string_view(held_).substr(0, whole));
  held_.erase(0, whole);
  return text;
}

std::string StreamDecoder::Finish() {
  std::string text = ReplaceBadUtf8(held_);
  held_.clear();
  emitted_tokens_ = 0;
  stripped_ = 0;
  at_start_ = true;
  return text;
}

}  // namespace icecache
