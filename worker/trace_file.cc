#include "worker/trace_file.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <utility>

#include "common/limits.h"
#include "kernels/distance.h"

namespace icecache {
namespace {

static_assert(std::endian::native == std::endian::little, "trace files are little-endian");

constexpr uint32_t kMagic = 0x564b4349;  // "ICKV"
constexpr uint32_t kVersion = 2;
using Header = std::array<uint32_t, 16>;

Header HeaderOf(const TraceExtent& extent) {
  const ModelShape& shape = extent.shape;
  return {kMagic,         kVersion,       static_cast<uint32_t>(shape.dtype),
          shape.layers,   shape.kv_heads, shape.query_heads,
          shape.head_dim, extent.tokens,  extent.query_count};
}

Result<TraceExtent> ParseHeader(const Header& header) {
  if (header[0] == 0) return DataLoss("the dump was not finished; make it again");
  if (header[0] != kMagic) return DataLoss("does not begin with ICKV: no trace");
  if (header[1] > kVersion) {
    return FailedPrecondition("version " + std::to_string(header[1]) + ", this program reads up to " +
                              std::to_string(kVersion) + "; use a newer one, or dump it again");
  }
  if (header[1] != kVersion) {
    return DataLoss("version " + std::to_string(header[1]) + ", expected " +
                    std::to_string(kVersion) + "; dump it again");
  }
  if (header[2] > static_cast<uint32_t>(DType::kBF16)) {
    return DataLoss("dtype " + std::to_string(header[2]) + ", expected 0 to 2");
  }
  if (std::any_of(header.begin() + 9, header.end(), [](uint32_t x) { return x != 0; })) {
    return DataLoss("reserved words of the header are not zero");
  }
  const TraceExtent extent{
      {header[3], header[4], header[5], header[6], static_cast<DType>(header[2])},
      header[7],
      header[8]};
  const Status valid = extent.Validate();
  if (!valid.ok()) return DataLoss("header: " + valid.message());
  return extent;
}

uint64_t SliceOffset(const TraceExtent& extent, LayerId layer, KvHeadId head) {
  const uint64_t slice = uint64_t{layer.value} * extent.shape.kv_heads + head.value;
  return sizeof(Header) + slice * extent.slice_bytes();
}

uint64_t FileBytes(const TraceExtent& extent) {
  return sizeof(Header) +
         uint64_t{extent.shape.layers} * extent.shape.kv_heads * extent.slice_bytes();
}

}  // namespace

Status TraceExtent::Validate() const {
  KV_RETURN_IF_ERROR(shape.Validate());
  if (tokens == 0 || tokens > limits::kContextTokensMax) {
    return InvalidArgument(std::to_string(tokens) + " tokens, expected 1 to " +
                           std::to_string(limits::kContextTokensMax));
  }
  if (query_count > tokens) {
    return InvalidArgument("queries of " + std::to_string(query_count) + " tokens, but there are " +
                           std::to_string(tokens));
  }
  return OkStatus();
}

TraceWriter::TraceWriter(std::string path, const TraceExtent& extent)
    : path_(std::move(path)), extent_(extent), file_(path_, std::ios::binary | std::ios::trunc) {}

Result<TraceWriter> TraceWriter::Create(const std::string& path, const TraceExtent& extent) {
  KV_RETURN_IF_ERROR(extent.Validate());
  TraceWriter writer(path, extent);
  // Its last byte gives the file its size; the magic stays zero.
  KV_RETURN_IF_ERROR(writer.WriteAt(FileBytes(extent) - 1, "", 1));
  return writer;
}

Status TraceWriter::WriteAt(uint64_t offset, const void* data, size_t bytes) {
  file_.seekp(static_cast<std::streamoff>(offset));
  file_.write(static_cast<const char*>(data), static_cast<std::streamsize>(bytes));
  return file_ ? OkStatus()
               : Unavailable("cannot write trace '" + path_ + "': " + std::strerror(errno));
}

Status TraceWriter::WriteRows(LayerId layer, KvHeadId head, TokenPos first, const TokenRows& rows) {
  KV_CHECK(layer.value < extent_.shape.layers && head.value < extent_.shape.kv_heads);
  KV_CHECK(rows.dtype == extent_.shape.dtype && rows.head_dim == extent_.shape.head_dim);
  KV_CHECK(uint64_t{first.value} + rows.count <= extent_.tokens);
  const uint64_t at = SliceOffset(extent_, layer, head) + first.value * rows.row_bytes();
  KV_RETURN_IF_ERROR(WriteAt(at, rows.k, rows.count * rows.row_bytes()));
  return WriteAt(at + extent_.rows_bytes(), rows.v, rows.count * rows.row_bytes());
}

Status TraceWriter::WriteQueries(LayerId layer, KvHeadId head, TokenPos first,
                                 std::span<const float> queries) {
  const size_t row = size_t{extent_.shape.group()} * extent_.shape.head_dim;
  KV_CHECK(layer.value < extent_.shape.layers && head.value < extent_.shape.kv_heads);
  KV_CHECK(queries.size() % row == 0 && first.value + queries.size() / row <= extent_.tokens);
  const uint32_t begin = extent_.tokens - extent_.query_count;
  const size_t skip = first.value < begin ? begin - first.value : 0;
  if (skip * row >= queries.size()) return OkStatus();
  const uint64_t index = first.value + skip - begin;
  const uint64_t at =
      SliceOffset(extent_, layer, head) + 2 * extent_.rows_bytes() + index * row * sizeof(float);
  queries = queries.subspan(skip * row);
  return WriteAt(at, queries.data(), queries.size_bytes());
}

Status TraceWriter::Finish() {
  const Header header = HeaderOf(extent_);
  file_.flush();
  KV_RETURN_IF_ERROR(WriteAt(0, header.data(), sizeof(header)));
  file_.close();
  return file_ ? OkStatus() : Unavailable("cannot write trace '" + path_ + "' to its end");
}

Result<TraceReader> TraceReader::Open(const std::string& path) {
  const std::string where = "trace '" + path + "'";
  std::ifstream file(path, std::ios::binary);
  if (!file) return NotFound(where + ": " + std::strerror(errno));
  Header header;
  file.read(reinterpret_cast<char*>(header.data()), sizeof(header));
  if (!file) return DataLoss(where + ": shorter than a header");
  const Result<TraceExtent> extent = ParseHeader(header);
  if (!extent.ok()) return extent.status().WithContext(where);
  std::error_code error;
  const uint64_t found = std::filesystem::file_size(path, error);
  if (error || found != FileBytes(*extent)) {
    return DataLoss(where + ": " + std::to_string(found) + " bytes, but its header says " +
                    std::to_string(FileBytes(*extent)));
  }
  return TraceReader(path, std::move(file), *extent);
}

Result<TraceSlice> TraceReader::Read(LayerId layer, KvHeadId head) {
  const ModelShape& shape = extent_.shape;
  const std::string where = "trace '" + path_ + "' slice " + std::to_string(layer.value) + "." +
                            std::to_string(head.value);
  if (layer.value >= shape.layers || head.value >= shape.kv_heads) {
    return OutOfRange(where + ": it has layers 0 to " + std::to_string(shape.layers - 1) +
                      " and kv heads 0 to " + std::to_string(shape.kv_heads - 1));
  }
  TraceSlice slice;
  slice.k.resize(extent_.rows_bytes());
  slice.v.resize(extent_.rows_bytes());
  slice.queries.resize(extent_.query_floats());
  const auto read = [this](void* to, size_t bytes) {
    file_.read(static_cast<char*>(to), static_cast<std::streamsize>(bytes));
  };
  file_.clear();
  file_.seekg(static_cast<std::streamoff>(SliceOffset(extent_, layer, head)));
  read(slice.k.data(), slice.k.size());
  read(slice.v.data(), slice.v.size());
  read(slice.queries.data(), slice.queries.size() * sizeof(float));
  if (!file_) return DataLoss(where + ": ends too early");
  const size_t elements = size_t{extent_.tokens} * shape.head_dim;
  const auto* queries = reinterpret_cast<const std::byte*>(slice.queries.data());
  if (!AllFinite(slice.k.data(), shape.dtype, elements) ||
      !AllFinite(slice.v.data(), shape.dtype, elements) ||
      !AllFinite(queries, DType::kF32, slice.queries.size())) {
    return DataLoss(where + ": holds NaN or infinity");
  }
  return slice;
}

}  // namespace icecache
