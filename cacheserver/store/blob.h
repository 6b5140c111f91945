// Blobs: the byte form of what the cold store keeps besides pages. A blob is a header (magic,
// format version, length), plain values and arrays in host byte order (all supported machines are
// little-endian), and a checksum.
//
// A reader never trusts a length: every read is bounds-checked. Errors name the blob: DATA_LOSS when
// it is truncated or corrupt, FAILED_PRECONDITION when a newer server has written it.
#pragma once

#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>

#include "common/status.h"

namespace icecache {

// What a blob is, and the newest format that this server writes and reads.
struct BlobFormat {
  uint32_t magic;
  uint16_t version;
  const char* name;
};

class BlobWriter {
 public:
  explicit BlobWriter(const BlobFormat& format);

  template <typename T>
  void Put(const T& value) {
    static_assert(std::is_arithmetic_v<T>);
    out_.append(reinterpret_cast<const char*>(&value), sizeof(T));
  }
  void PutBytes(std::span<const std::byte> bytes);  // length, then bytes
  void PutText(std::string_view text) { PutBytes(std::as_bytes(std::span(text))); }
  // Length and checksum; the blob is complete.
  std::string Finish();

 private:
  const BlobFormat format_;
  std::string out_;
};

// Reads after a failure do nothing and give zeros; ask status() or Finish().
class BlobReader {
 public:
  // Checks header and checksum. `blob` outlives the reader and the spans that it gives.
  BlobReader(const BlobFormat& format, std::string_view blob);

  template <typename T>
  T Get() {
    static_assert(std::is_arithmetic_v<T>);
    T value{};
    if (Has(sizeof(T))) {
      std::memcpy(&value, body_.data(), sizeof(T));
      body_.remove_prefix(sizeof(T));
    }
    return value;
  }
  std::span<const std::byte> GetBytes();
  std::string GetText(size_t bytes_max);
  // The rest of a count that must not exceed what is left at `bytes_each`.
  uint64_t GetCount(size_t bytes_each);
  void Fail(const std::string& what);
  // OK when every read succeeded and nothing is left over.
  Status Finish();
  const Status& status() const { return status_; }
  uint16_t version() const { return version_; }  // of the blob: at most the format's

 private:
  bool Has(size_t bytes);

  const BlobFormat format_;
  uint16_t version_ = 0;
  std::string_view body_;
  Status status_;
};

}  // namespace icecache
