// Images of policies: the flat bytes that SelectionPolicy::Save appends and Restore reads.
//
// An image is a header (magic, version, policy kind, dtype, head_dim, body length), a body of plain
// values and arrays in host byte order (all supported machines are little-endian), and a checksum.
// A reader never trusts a length: every read is bounds-checked and fails as DATA_LOSS. A checksum
// does not prove that the values make sense: whoever restores checks what its searches rely on.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "cacheserver/select/selection_policy.h"
#include "common/status.h"

namespace icecache {

// Appends one image to *out: construct, Put..., Finish.
class ImageWriter {
 public:
  ImageWriter(PolicyKind kind, const PolicyOptions& options, std::string* out);

  template <typename T>
  void Put(const T& value) {
    static_assert(std::is_arithmetic_v<T> || std::has_unique_object_representations_v<T>);
    out_->append(reinterpret_cast<const char*>(&value), sizeof(T));
  }
  template <typename T>
  void PutAll(const std::vector<T>& values) {
    static_assert(std::is_arithmetic_v<T>);
    Put<uint64_t>(values.size());
    if (!values.empty())
      out_->append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
  }
  void Finish();

 private:
  std::string* out_;
  size_t start_;
};

// Reads one image that fills `image` exactly. Reads after a failure do nothing; ask status() at the
// end.
class ImageReader {
 public:
  // Checks header and checksum.
  ImageReader(PolicyKind kind, const PolicyOptions& options, std::string_view image);

  template <typename T>
  T Get() {
    T value{};
    if (Has(sizeof(T))) {
      std::memcpy(&value, body_.data(), sizeof(T));
      body_.remove_prefix(sizeof(T));
    }
    return value;
  }
  // REQUIRES by the caller: a semantic check of the size that comes back.
  template <typename T>
  std::vector<T> GetAll() {
    const auto count = Get<uint64_t>();
    if (count > body_.size() / sizeof(T)) {
      Fail("an array is longer than the image");
      return {};
    }
    std::vector<T> values(count);
    if (count > 0) std::memcpy(values.data(), body_.data(), count * sizeof(T));
    body_.remove_prefix(count * sizeof(T));
    return values;
  }
  // The same of floats; NaN and infinity fail.
  float GetFinite();
  std::vector<float> GetAllFinite();
  void Fail(std::string_view what);
  // OK when every read succeeded and nothing is left over.
  Status Finish();
  bool ok() const { return status_.ok(); }

 private:
  bool Has(size_t bytes);

  std::string_view body_;
  Status status_;
};

}  // namespace icecache
