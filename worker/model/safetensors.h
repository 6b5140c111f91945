// Weights in safetensors files: one file, or shards with an index. Mapped, checked once, never
// copied.
//
// Format: u64 header length (little endian), a JSON header {name: {dtype, shape, data_offsets}},
// then the tensors' bytes. Everything in the header is checked at open: lengths, offsets inside the
// file, sizes equal to shape x dtype, no overlap and no gap. So a truncated download fails at
// start, not in a layer.
//
// Thread: immutable after open; any. https://github.com/huggingface/safetensors (format
// description).
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "common/dtype.h"
#include "common/status.h"
#include "worker/model/file_bytes.h"

namespace icecache {

// A tensor in mapped memory, row-major. `data` may be unaligned.
struct TensorView {
  const std::byte* data = nullptr;
  DType dtype = DType::kF32;
  std::vector<uint64_t> shape;
};

class SafetensorsFile {
 public:
  struct Entry {
    std::string dtype;  // as written: "F16", "BF16", "I64", ...
    std::vector<uint64_t> shape;
    uint64_t begin = 0;  // of the tensor's bytes, from the first byte after the header
    uint64_t end = 0;
  };

  // DATA_LOSS with path, tensor, expected and found when the file does not hold what its header
  // says.
  static Result<std::unique_ptr<SafetensorsFile>> Open(const std::string& path);

  const std::string& path() const { return file_->path(); }
  const std::map<std::string, Entry, std::less<>>& entries() const { return entries_; }
  const std::byte* data(const Entry& entry) const { return data_ + entry.begin; }
  std::string_view header() const { return header_; }

 private:
  SafetensorsFile() = default;
  Status ParseHeader();

  std::unique_ptr<FileBytes> file_;
  std::string_view header_;
  const std::byte* data_ = nullptr;
  std::map<std::string, Entry, std::less<>> entries_;
};

// All tensors of a model directory by name.
class WeightFiles {
 public:
  // model.safetensors, else the shards that model.safetensors.index.json names.
  static Result<std::unique_ptr<WeightFiles>> Open(const std::string& directory);

  bool Has(std::string_view name) const { return where_.contains(name); }
  // NOT_FOUND without the tensor; INVALID_ARGUMENT when its shape differs or its dtype is no float
  // of 16 or 32 bits. Borrows: valid while this object lives.
  Result<TensorView> Find(std::string_view name, const std::vector<uint64_t>& shape) const;
  // Of all headers and of 128 bytes from each tensor: tells fine-tunes of one model apart although
  // their headers are equal, and touches two memory pages per tensor. Weights differing elsewhere
  // only are missed.
  uint64_t Fingerprint() const;
  const std::string& directory() const { return directory_; }

 private:
  WeightFiles() = default;
  Status OpenShards(const std::string& index_path);

  std::string directory_;
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::map<std::string, const SafetensorsFile*, std::less<>> where_;
};

}  // namespace icecache
