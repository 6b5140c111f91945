#include "tests/bench/accuracy_document.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <utility>

#include "common/checksum.h"
#include "tests/bench/trace.h"
#include "worker/prefill.h"
#include "worker/trace_file.h"

namespace icecache {
namespace {

constexpr uint32_t kQueries = 256;  // as many as a prefill shows to a server's index

ReadDocument EmptyDocument(const ModelShape& shape, size_t tokens) {
  ReadDocument document;
  document.shape = shape;
  document.tokens = static_cast<uint32_t>(tokens);
  document.query_count = std::min(kQueries, document.tokens);
  document.kv = std::make_unique<LocalKv>(shape);
  return document;
}

void AddQueries(std::vector<float> queries, ReadDocument* document) {
  document->energy.push_back(EnergyOf(queries, document->shape.head_dim));
  document->queries.push_back(std::move(queries));
}

Result<ReadDocument> FromModel(Model& model, std::span<const int32_t> tokens, uint32_t threads,
                               const std::function<void(uint64_t, uint64_t)>& progress) {
  ReadDocument document = EmptyDocument(model.shape(), tokens.size());
  PrefillOptions options;
  options.threads = threads;
  options.query_tokens = document.query_count;
  options.progress = progress;
  KV_RETURN_IF_ERROR(Prefill(model, tokens, options, [&](const FinishedLayer& layer) -> Status {
                       document.kv->Append(layer.layer, *layer.rows);
                       const size_t per_head = layer.queries.size() / document.shape.kv_heads;
                       for (uint32_t h = 0; h < document.shape.kv_heads; ++h) {
                         const auto begin =
                             layer.queries.begin() + static_cast<ptrdiff_t>(h * per_head);
                         AddQueries({begin, begin + static_cast<ptrdiff_t>(per_head)}, &document);
                       }
                       return OkStatus();
                     }).status());
  return document;
}

Result<ReadDocument> FromTrace(const std::string& path, const ModelShape& shape, size_t tokens) {
  KV_ASSIGN_OR_RETURN(TraceReader reader, TraceReader::Open(path));
  ReadDocument document = EmptyDocument(shape, tokens);
  const TraceExtent& extent = reader.extent();
  if (extent.shape != shape || extent.tokens != tokens ||
      extent.query_count != document.query_count) {
    return FailedPrecondition(path + " is of another model or text; delete it");
  }
  for (uint16_t l = 0; l < shape.layers; ++l) {
    LayerRows rows(shape, TokenPos(0), document.tokens);
    for (uint16_t h = 0; h < shape.kv_heads; ++h) {
      KV_ASSIGN_OR_RETURN(TraceSlice slice, reader.Read(LayerId(l), KvHeadId(h)));
      std::copy(slice.k.begin(), slice.k.end(), rows.k(KvHeadId(h)).begin());
      std::copy(slice.v.begin(), slice.v.end(), rows.v(KvHeadId(h)).begin());
      AddQueries(std::move(slice.queries), &document);
    }
    document.kv->Append(LayerId(l), rows);
  }
  return document;
}

Status ToTrace(const ReadDocument& document, const std::string& path) {
  const TraceExtent extent{document.shape, document.tokens, document.query_count};
  const std::string unfinished = path + ".new";
  KV_ASSIGN_OR_RETURN(TraceWriter writer, TraceWriter::Create(unfinished, extent));
  for (uint16_t l = 0; l < document.shape.layers; ++l) {
    for (uint16_t h = 0; h < document.shape.kv_heads; ++h) {
      const LayerId layer(l);
      const KvHeadId head(h);
      KV_RETURN_IF_ERROR(
          writer.WriteRows(layer, head, TokenPos(0), document.kv->rows(layer, head)));
      KV_RETURN_IF_ERROR(writer.WriteQueries(layer, head,
                                             TokenPos(document.tokens - document.query_count),
                                             document.queries[document.slice(layer, head)]));
    }
  }
  KV_RETURN_IF_ERROR(writer.Finish());
  std::error_code error;
  std::filesystem::rename(unfinished, path, error);
  return error ? Unavailable("cannot rename " + unfinished + ": " + error.message()) : OkStatus();
}

}  // namespace

Result<ReadDocument> ReadOnce(Model& model, std::span<const int32_t> tokens, uint32_t threads,
                              const std::string& cache,
                              const std::function<void(uint64_t, uint64_t)>& progress) {
  if (cache.empty()) return FromModel(model, tokens, threads, progress);
  const std::string identity = model.identity();
  const uint64_t seed = Checksum64(std::as_bytes(std::span(identity)));
  char name[24];
  std::snprintf(name, sizeof(name), "%016llx.ickv",
                static_cast<unsigned long long>(Checksum64(std::as_bytes(tokens), seed)));
  const std::string path = cache + "/" + name;
  std::error_code error;
  if (std::filesystem::exists(path, error)) return FromTrace(path, model.shape(), tokens.size());
  std::filesystem::create_directories(cache, error);
  KV_ASSIGN_OR_RETURN(ReadDocument document, FromModel(model, tokens, threads, progress));
  KV_RETURN_IF_ERROR(ToTrace(document, path));
  return document;
}

}  // namespace icecache
