// TraceFile: keys, values and queries that a model really computed, per layer and kv head.
// `icecache-worker dump-trace` writes it, `icecache-bench ... --trace file:PATH@LAYER.HEAD` reads
// it.
//
// Little-endian. A header of 16 uint32: magic "ICKV" (0x564b4349), version 2, dtype (0 f32, 1 f16,
// 2 bf16), layers, kv_heads, query_heads, head_dim, tokens, query_count, seven zeros. Then one
// slice per [layers][kv_heads]:
//   K[tokens, head_dim], V[tokens, head_dim]   as stored, K after RoPE; row t is position t
//   Q[query_count, group, head_dim]            f32, after RoPE, scaled by 1/sqrt(head_dim): of the
//                                              last query_count positions
// Everything has a fixed place, so rows are written as a model computes them and one slice is read
// alone. The magic is written last: what an interrupted dump left is not taken for a whole one.
//
// Both ends are owner-thread objects. Size: 2 * tokens * row_bytes + 4 * query_count * group *
// head_dim bytes a slice.
#pragma once

#include <cstdint>
#include <fstream>
#include <span>
#include <string>
#include <vector>

#include "common/ids.h"
#include "common/model_shape.h"
#include "common/status.h"
#include "kernels/paged_kv.h"

namespace icecache {

struct TraceExtent {
  ModelShape shape;
  uint32_t tokens = 0;
  uint32_t query_count = 0;  // at most `tokens`

  uint64_t rows_bytes() const { return uint64_t{tokens} * shape.row_bytes(); }  // K or V
  uint64_t query_floats() const { return uint64_t{query_count} * shape.group() * shape.head_dim; }
  uint64_t slice_bytes() const { return 2 * rows_bytes() + sizeof(float) * query_floats(); }
  // INVALID_ARGUMENT naming the number that is out of its limits.
  Status Validate() const;
};

// Writes slices in any order, each in pieces.
class TraceWriter {
 public:
  // Makes the file. INVALID_ARGUMENT for a bad extent, UNAVAILABLE when it cannot be written.
  static Result<TraceWriter> Create(const std::string& path, const TraceExtent& extent);

  // Rows of positions first, first + 1, ... REQUIRES: they are inside, of the extent's shape.
  Status WriteRows(LayerId layer, KvHeadId head, TokenPos first, const TokenRows& rows);
  // Queries [count, group, head_dim] of positions first, ...; those before the last query_count
  // positions are left out.
  Status WriteQueries(LayerId layer, KvHeadId head, TokenPos first, std::span<const float> queries);
  // Makes it a trace. What was never written reads as zeros.
  Status Finish();

 private:
  TraceWriter(std::string path, const TraceExtent& extent);
  Status WriteAt(uint64_t offset, const void* data, size_t bytes);

  std::string path_;
  TraceExtent extent_;
  std::ofstream file_;
};

struct TraceSlice {
  std::vector<std::byte> k, v;  // [tokens, head_dim]
  std::vector<float> queries;   // [query_count, group, head_dim]
};

// Reads one slice at a time.
class TraceReader {
 public:
  // NOT_FOUND, FAILED_PRECONDITION (a newer version), or DATA_LOSS naming what in the header is wrong
  // or how the size differs.
  static Result<TraceReader> Open(const std::string& path);

  const TraceExtent& extent() const { return extent_; }
  // OUT_OF_RANGE for a slice that the model does not have; DATA_LOSS when the file has shrunk or
  // holds NaN or infinity.
  Result<TraceSlice> Read(LayerId layer, KvHeadId head);

 private:
  TraceReader(std::string path, std::ifstream file, const TraceExtent& extent)
      : path_(std::move(path)), file_(std::move(file)), extent_(extent) {}

  std::string path_;
  std::ifstream file_;
  TraceExtent extent_;
};

}  // namespace icecache
