#include "worker/model/safetensors.h"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>

#include "common/checksum.h"
#include "common/limits.h"

namespace icecache {
namespace {

using Json = nlohmann::json;
using Entry = SafetensorsFile::Entry;

std::optional<uint64_t> DTypeSize(std::string_view dtype) {
  static constexpr std::pair<std::string_view, uint64_t> kSizes[] = {
      {"F64", 8}, {"F32", 4}, {"F16", 2},  {"BF16", 2},    {"I64", 8},
      {"I32", 4}, {"I16", 2}, {"I8", 1},   {"U64", 8},     {"U32", 4},
      {"U16", 2}, {"U8", 1},  {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}};
  for (const auto& [name, size] : kSizes) {
    if (name == dtype) return size;
  }
  return std::nullopt;
}

std::string ShapeText(const std::vector<uint64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

Status Corrupt(const std::string& path, const std::string& what) {
  return DataLoss(path + ": " + what + "; fetch or export the file again");
}

bool IsUnsignedArray(const Json& json) {
  return json.is_array() && std::all_of(json.begin(), json.end(),
                                        [](const Json& x) { return x.is_number_unsigned(); });
}

// Bytes of a tensor, or nothing when the product does not fit in 64 bits.
std::optional<uint64_t> TensorBytes(const std::vector<uint64_t>& shape, uint64_t element_bytes) {
  uint64_t bytes = element_bytes;
  for (const uint64_t extent : shape) {
    if (__builtin_mul_overflow(bytes, extent, &bytes)) return std::nullopt;
  }
  return bytes;
}

Result<Entry> ParseEntry(const std::string& path, const std::string& name, const Json& json,
                         uint64_t data_bytes) {
  const std::string tensor = "tensor '" + name + "': ";
  if (!json.is_object())
    return Corrupt(path, tensor + "expected an object, found " + json.type_name());
  const auto dtype = json.find("dtype");
  const auto shape = json.find("shape");
  const auto offsets = json.find("data_offsets");
  if (dtype == json.end() || !dtype->is_string())
    return Corrupt(path, tensor + "no string 'dtype'");
  if (shape == json.end() || !IsUnsignedArray(*shape)) {
    return Corrupt(path, tensor + "'shape' is no array of whole numbers");
  }
  if (offsets == json.end() || !IsUnsignedArray(*offsets) || offsets->size() != 2) {
    return Corrupt(path, tensor + "'data_offsets' is no pair of whole numbers");
  }
  Entry entry{dtype->get<std::string>(), shape->get<std::vector<uint64_t>>(),
              (*offsets)[0].get<uint64_t>(), (*offsets)[1].get<uint64_t>()};
  const std::optional<uint64_t> element_bytes = DTypeSize(entry.dtype);
  if (!element_bytes) return Corrupt(path, tensor + "unknown dtype '" + entry.dtype + "'");
  const std::string range = std::to_string(entry.begin) + ".." + std::to_string(entry.end);
  if (entry.begin > entry.end || entry.end > data_bytes) {
    return Corrupt(path, tensor + "bytes " + range + ", expected them within the file's " +
                             std::to_string(data_bytes) + " bytes of data");
  }
  const std::optional<uint64_t> bytes = TensorBytes(entry.shape, *element_bytes);
  if (!bytes || *bytes != entry.end - entry.begin) {
    return Corrupt(path, tensor + "shape " + ShapeText(entry.shape) + " of " + entry.dtype +
                             " needs " + (bytes ? std::to_string(*bytes) : "more than 2^64") +
                             " bytes, found " + std::to_string(entry.end - entry.begin) + " (" +
                             range + ")");
  }
  return entry;
}

// Tensors must cover the data exactly: what overlaps or is left over was written by a faulty tool.
Status CheckCoverage(const std::string& path,
                     const std::map<std::string, Entry, std::less<>>& entries,
                     uint64_t data_bytes) {
  std::vector<std::pair<const std::string*, const Entry*>> order;
  for (const auto& [name, entry] : entries) order.emplace_back(&name, &entry);
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
    return std::pair(a.second->begin, a.second->end) < std::pair(b.second->begin, b.second->end);
  });
  uint64_t covered = 0;
  for (const auto& [name, entry] : order) {
    if (entry->begin != covered) {
      return Corrupt(
          path, "tensor '" + *name + "': begins at byte " + std::to_string(entry->begin) +
                    (entry->begin < covered ? ", inside the tensor before it" : ", after a gap") +
                    "; expected " + std::to_string(covered));
    }
    covered = entry->end;
  }
  if (covered == data_bytes) return OkStatus();
  return Corrupt(path, "tensors end at byte " + std::to_string(covered) +
                           " of the data, the file at " + std::to_string(data_bytes));
}

}  // namespace

Result<std::unique_ptr<SafetensorsFile>> SafetensorsFile::Open(const std::string& path) {
  std::unique_ptr<SafetensorsFile> file(new SafetensorsFile);
  KV_ASSIGN_OR_RETURN(file->file_, FileBytes::Map(path));
  KV_RETURN_IF_ERROR(file->ParseHeader());
  return file;
}

Status SafetensorsFile::ParseHeader() {
  const std::span<const std::byte> bytes = file_->bytes();
  if (bytes.size() < sizeof(uint64_t)) {
    return Corrupt(path(), "found " + std::to_string(bytes.size()) +
                               " bytes, expected at least the 8 of the header's length");
  }
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes.data(), sizeof(header_bytes));
  const uint64_t rest = bytes.size() - sizeof(uint64_t);
  if (header_bytes > rest || header_bytes > limits::kWeightHeaderBytesMax) {
    return Corrupt(path(),
                   "header of " + std::to_string(header_bytes) + " bytes, expected at most " +
                       std::to_string(std::min<uint64_t>(rest, limits::kWeightHeaderBytesMax)) +
                       " (truncated, or not a safetensors file)");
  }
  header_ = file_->text().substr(sizeof(uint64_t), header_bytes);
  data_ = bytes.data() + sizeof(uint64_t) + header_bytes;
  const Json json = Json::parse(header_, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return Corrupt(path(), "the header is no JSON object");
  const uint64_t data_bytes = rest - header_bytes;
  for (const auto& [name, value] : json.items()) {
    if (name == "__metadata__") continue;
    KV_ASSIGN_OR_RETURN(Entry entry, ParseEntry(path(), name, value, data_bytes));
    entries_.emplace(name, std::move(entry));
  }
  return CheckCoverage(path(), entries_, data_bytes);
}

Result<std::unique_ptr<WeightFiles>> WeightFiles::Open(const std::string& directory) {
  std::unique_ptr<WeightFiles> weights(new WeightFiles);
  weights->directory_ = directory;
  const std::string single = directory + "/model.safetensors";
  const std::string index = directory + "/model.safetensors.index.json";
  if (FileExists(single)) {
    KV_ASSIGN_OR_RETURN(auto file, SafetensorsFile::Open(single));
    for (const auto& [name, entry] : file->entries()) weights->where_.emplace(name, file.get());
    weights->files_.push_back(std::move(file));
  } else if (FileExists(index)) {
    KV_RETURN_IF_ERROR(weights->OpenShards(index));
  } else {
    return NotFound(directory +
                    ": found neither model.safetensors nor model.safetensors.index.json; " +
                    "expected a Hugging Face model directory with safetensors weights");
  }
  return weights;
}

Status WeightFiles::OpenShards(const std::string& index_path) {
  KV_ASSIGN_OR_RETURN(const auto index, FileBytes::Map(index_path));
  const Json json = index->bytes().size() > limits::kJsonFileBytesMax
                        ? Json(nullptr)
                        : Json::parse(index->text(), nullptr, /*allow_exceptions=*/false);
  const auto map = json.is_object() ? json.find("weight_map") : json.end();
  if (!json.is_object() || map == json.end() || !map->is_object()) {
    return Corrupt(index_path, "no JSON object with an object 'weight_map'");
  }
  std::map<std::string, const SafetensorsFile*> opened;
  for (const auto& [name, value] : map->items()) {
    const std::string shard = value.is_string() ? value.get<std::string>() : std::string();
    // A name from outside must not lead out of the directory.
    if (shard.empty() || shard.find('/') != std::string::npos || shard[0] == '.') {
      return Corrupt(index_path,
                     "tensor '" + name + "': expected a plain file name, found " + value.dump());
    }
    auto found = opened.find(shard);
    if (found == opened.end()) {
      if (files_.size() >= limits::kWeightFilesMax) {
        return Corrupt(index_path,
                       "more than " + std::to_string(limits::kWeightFilesMax) + " files");
      }
      KV_ASSIGN_OR_RETURN(auto file, SafetensorsFile::Open(directory_ + "/" + shard));
      found = opened.emplace(shard, file.get()).first;
      files_.push_back(std::move(file));
    }
    if (!found->second->entries().contains(name)) {
      return Corrupt(index_path,
                     "tensor '" + name + "' is said to be in " + shard + ", which lacks it");
    }
    where_.emplace(name, found->second);
  }
  return OkStatus();
}

Result<TensorView> WeightFiles::Find(std::string_view name,
                                     const std::vector<uint64_t>& shape) const {
  const auto where = where_.find(name);
  const std::string tensor = "tensor '" + std::string(name) + "'";
  if (where == where_.end()) {
    return NotFound(directory_ + ": found no " + tensor + ", expected one of shape " +
                    ShapeText(shape));
  }
  const SafetensorsFile& file = *where->second;
  const Entry& entry = file.entries().find(name)->second;
  if (entry.shape != shape) {
    return InvalidArgument(file.path() + ": " + tensor + ": found shape " + ShapeText(entry.shape) +
                           ", expected " + ShapeText(shape) + " from config.json");
  }
  TensorView view{file.data(entry), DType::kF32, entry.shape};
  if (entry.dtype == "F16") {
    view.dtype = DType::kF16;
  } else if (entry.dtype == "BF16") {
    view.dtype = DType::kBF16;
  } else if (entry.dtype != "F32") {
    return InvalidArgument(file.path() + ": " + tensor + ": found dtype " + entry.dtype +
                           ", expected F32, F16 or BF16");
  }
  return view;
}

uint64_t WeightFiles::Fingerprint() const {
  constexpr uint64_t kSampleBytes = 64;
  uint64_t hash = 0;
  for (const auto& file : files_) {
    const std::string_view header = file->header();
    hash = Checksum64({reinterpret_cast<const std::byte*>(header.data()), header.size()}, hash);
    for (const auto& [name, entry] : file->entries()) {
      const uint64_t bytes = entry.end - entry.begin;
      const uint64_t sample = std::min(bytes, kSampleBytes);
      hash = Checksum64({file->data(entry), sample}, hash);
      hash = Checksum64({file->data(entry) + (bytes - sample) / 2, sample}, hash);
    }
  }
  return hash;
}

}  // namespace icecache
