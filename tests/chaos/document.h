// Document: the model of what chaos workers write. Every K and V element is a function of (seed,
// layer, position, head, dimension), so any process can say what any row must be, whoever wrote it.
// A fork that went on with rows of its own is a document of several parts, each with its seed.
//
// Content: the rows of a document, computed once, to compare pages, rows and attention with.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/model_shape.h"
#include "common/status.h"
#include "common/wire/data_codec.h"
#include "worker/layer_rows.h"

namespace icecache::chaos {

inline constexpr ModelShape kShape{
    .layers = 2, .kv_heads = 2, .query_heads = 4, .head_dim = 32, .dtype = DType::kF16};
inline constexpr char kModel[] = "chaos";
inline constexpr uint32_t kSinkTokens = 4;
inline constexpr uint32_t kWindowTokens = 16;

struct Document {
  struct Part {
    uint32_t first = 0;  // position
    uint64_t seed = 0;
  };
  std::string name;
  uint32_t tokens = 0;
  bool durable = false;   // published with the promise that it survives the server
  uint64_t answers = 0;   // hash of the pages that fixed questions select in it; 0: never asked
  uint64_t segments = 0;  // hash of the segments that those pages are of
  std::vector<Part> parts;

  // This document and `count` more tokens of another seed.
  Document Extended(uint32_t count, uint64_t seed) const;
  // One line without a newline, and back; nullopt: no such line.
  std::string ToLine() const;
  static std::optional<Document> Parse(const std::string& line);
};

class Content {
 public:
  explicit Content(const Document& document);

  const LayerRows& rows(LayerId layer) const { return rows_[layer.value]; }
  // K or V of one token, [kv_heads, head_dim], as stored.
  const float* k(LayerId layer, uint32_t position) const { return At(k_, layer, position); }
  const float* v(LayerId layer, uint32_t position) const { return At(v_, layer, position); }

  // DATA_LOSS naming the first row that is not what was written. Rows [0, page.fill).
  Status CheckPage(LayerId layer, KvHeadId head, const wire::PagePayload& page) const;
  // The same for `count` rows from position `first`.
  Status CheckRows(LayerId layer, KvHeadId head, uint32_t first, const TokenRows& rows) const;
  // Softmax attention of one query head over positions [0, tokens), in float64: [head_dim].
  std::vector<double> Attend(LayerId layer, uint32_t query_head, const float* q,
                             uint32_t tokens) const;

 private:
  const float* At(const std::vector<std::vector<float>>& all, LayerId layer,
                  uint32_t position) const {
    return all[layer.value].data() + size_t{position} * kShape.kv_heads * kShape.head_dim;
  }
  std::vector<LayerRows> rows_;
  std::vector<std::vector<float>> k_, v_;
};

}  // namespace icecache::chaos
