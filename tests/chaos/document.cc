#include "tests/chaos/document.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <sstream>

namespace icecache::chaos {
namespace {

uint64_t Mix(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// In [-1, 1).
float Value(uint64_t row, uint32_t element) {
  return static_cast<float>(static_cast<int64_t>(Mix(row + element)) * 0x1p-63);
}

Status Wrong(LayerId layer, KvHeadId head, uint32_t position, const char* part) {
  return DataLoss("layer " + std::to_string(layer.value) + ", kv head " +
                  std::to_string(head.value) + ", position " + std::to_string(position) + ": " +
                  part + " is not what was written");
}

}  // namespace

Document Document::Extended(uint32_t count, uint64_t seed) const {
  Document more = *this;
  more.parts.push_back({tokens, seed});
  more.tokens += count;
  more.durable = false;
  more.answers = more.segments = 0;
  return more;
}

std::string Document::ToLine() const {
  std::ostringstream line;
  line << name << ' ' << tokens << ' ' << durable << ' ' << answers << ' ' << segments << ' '
       << parts.size();
  for (const Part& part : parts) line << ' ' << part.first << ' ' << part.seed;
  return line.str();
}

std::optional<Document> Document::Parse(const std::string& text) {
  std::istringstream line(text);
  Document document;
  size_t parts = 0;
  line >> document.name >> document.tokens >> document.durable >> document.answers >>
      document.segments >> parts;
  if (!line || parts == 0 || parts > 64) return std::nullopt;
  for (size_t i = 0; i < parts; ++i) {
    Part part;
    line >> part.first >> part.seed;
    document.parts.push_back(part);
  }
  if (!line) return std::nullopt;
  return document;
}

Content::Content(const Document& document) : k_(kShape.layers), v_(kShape.layers) {
  const uint32_t width = kShape.kv_heads * kShape.head_dim;
  for (uint16_t layer = 0; layer < kShape.layers; ++layer) {
    for (size_t p = 0; p < document.parts.size(); ++p) {
      const Document::Part& part = document.parts[p];
      const uint32_t end =
          p + 1 < document.parts.size() ? document.parts[p + 1].first : document.tokens;
      for (uint32_t position = part.first; position < end; ++position) {
        const uint64_t row = Mix(Mix(part.seed + layer) + position);
        for (uint32_t i = 0; i < width; ++i) k_[layer].push_back(Value(row, i));
        for (uint32_t i = 0; i < width; ++i) v_[layer].push_back(Value(row, width + i));
      }
    }
    rows_.emplace_back(kShape, TokenPos(0), document.tokens);
    rows_.back().RoundAndStore(0, document.tokens, k_[layer].data(), v_[layer].data());
  }
}

Status Content::CheckPage(LayerId layer, KvHeadId head, const wire::PagePayload& page) const {
  const size_t row_bytes = kShape.row_bytes();
  const LayerRows& rows = rows_[layer.value];
  for (uint32_t i = 0; i < page.fill; ++i) {
    uint32_t position = 0;
    std::memcpy(&position, page.positions.data() + i * sizeof position, sizeof position);
    if (position >= rows.tokens()) return Wrong(layer, head, position, "the position");
    const auto same = [&](std::span<const std::byte> found, std::span<const std::byte> written) {
      return std::memcmp(found.data() + i * row_bytes, written.data() + position * row_bytes,
                         row_bytes) == 0;
    };
    if (!same(page.k_rows, rows.k(head))) return Wrong(layer, head, position, "K");
    if (!same(page.v_rows, rows.v(head))) return Wrong(layer, head, position, "V");
  }
  return OkStatus();
}

Status Content::CheckRows(LayerId layer, KvHeadId head, uint32_t first,
                          const TokenRows& found) const {
  const size_t row_bytes = kShape.row_bytes();
  const LayerRows& rows = rows_[layer.value];
  for (uint32_t i = 0; i < found.count; ++i) {
    const size_t at = size_t{first + i} * row_bytes;
    if (first + i >= rows.tokens()) return Wrong(layer, head, first + i, "the position");
    if (std::memcmp(found.k + i * row_bytes, rows.k(head).data() + at, row_bytes) != 0)
      return Wrong(layer, head, first + i, "K");
    if (std::memcmp(found.v + i * row_bytes, rows.v(head).data() + at, row_bytes) != 0)
      return Wrong(layer, head, first + i, "V");
  }
  return OkStatus();
}

std::vector<double> Content::Attend(LayerId layer, uint32_t query_head, const float* q,
                                    uint32_t tokens) const {
  const uint32_t dim = kShape.head_dim;
  const size_t head = size_t{query_head / kShape.group()} * dim;
  std::vector<double> logits(tokens), out(dim, 0.0);
  double max = -1e300, sum = 0;
  for (uint32_t t = 0; t < tokens; ++t) {
    for (uint32_t d = 0; d < dim; ++d)
      logits[t] += double{q[size_t{query_head} * dim + d]} * k(layer, t)[head + d];
    max = std::max(max, logits[t]);
  }
  for (uint32_t t = 0; t < tokens; ++t) {
    const double weight = std::exp(logits[t] - max);
    sum += weight;
    for (uint32_t d = 0; d < dim; ++d) out[d] += weight * v(layer, t)[head + d];
  }
  for (double& x : out) x /= sum;
  return out;
}

}  // namespace icecache::chaos
