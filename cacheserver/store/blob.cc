#include "cacheserver/store/blob.h"

#include "common/checksum.h"

namespace icecache {
namespace {

// Magic, version, reserved, body bytes; then the body; then the checksum of all before it.
constexpr size_t kHeaderBytes = 4 + 2 + 2 + 8;
constexpr size_t kSumBytes = 8;

uint64_t SumOf(const BlobFormat& format, std::string_view bytes) {
  return Checksum64(std::as_bytes(std::span(bytes)), format.magic);
}

template <typename T>
T ValueAt(std::string_view bytes, size_t at) {
  T value;
  std::memcpy(&value, bytes.data() + at, sizeof(T));
  return value;
}

}  // namespace

BlobWriter::BlobWriter(const BlobFormat& format) : format_(format) {
  Put(format.magic);
  Put(format.version);
  Put(uint16_t{0});
  Put(uint64_t{0});  // Finish knows
}

void BlobWriter::PutBytes(std::span<const std::byte> bytes) {
  Put<uint64_t>(bytes.size());
  out_.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

std::string BlobWriter::Finish() {
  const uint64_t body_bytes = out_.size() - kHeaderBytes;
  std::memcpy(out_.data() + 8, &body_bytes, sizeof(body_bytes));
  Put<uint64_t>(SumOf(format_, out_));
  return std::move(out_);
}

BlobReader::BlobReader(const BlobFormat& format, std::string_view blob) : format_(format) {
  if (blob.size() < kHeaderBytes + kSumBytes) {
    Fail("it has " + std::to_string(blob.size()) + " bytes, fewer than a header");
    return;
  }
  if (ValueAt<uint32_t>(blob, 0) != format.magic) {
    Fail("it does not start with its magic number");
    return;
  }
  if (const auto version = ValueAt<uint16_t>(blob, 4); version > format.version) {
    status_ = FailedPrecondition(std::string(format.name) + ": written in format " +
                                 std::to_string(version) + ", this server reads up to " +
                                 std::to_string(format.version) +
                                 "; use a newer server or another --data-dir");
    return;
  }
  if (ValueAt<uint16_t>(blob, 4) == 0 || ValueAt<uint16_t>(blob, 6) != 0) {
    Fail("its header holds what was never written");
    return;
  }
  version_ = ValueAt<uint16_t>(blob, 4);
  const uint64_t body_bytes = blob.size() - kHeaderBytes - kSumBytes;
  const size_t sum_at = blob.size() - kSumBytes;
  if (ValueAt<uint64_t>(blob, 8) != body_bytes) {
    Fail("its body has " + std::to_string(body_bytes) + " bytes, its header says " +
         std::to_string(ValueAt<uint64_t>(blob, 8)));
  } else if (ValueAt<uint64_t>(blob, sum_at) != SumOf(format, blob.substr(0, sum_at))) {
    Fail("its checksum does not match");
  } else {
    body_ = blob.substr(kHeaderBytes, body_bytes);
  }
}

std::span<const std::byte> BlobReader::GetBytes() {
  const uint64_t count = GetCount(1);
  const auto bytes = std::as_bytes(std::span(body_.substr(0, count)));
  body_.remove_prefix(bytes.size());
  return bytes;
}

std::string BlobReader::GetText(size_t bytes_max) {
  const std::span<const std::byte> bytes = GetBytes();
  if (bytes.size() > bytes_max) {
    Fail("a text of " + std::to_string(bytes.size()) + " bytes, at most " +
         std::to_string(bytes_max));
    return {};
  }
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

uint64_t BlobReader::GetCount(size_t bytes_each) {
  const auto count = Get<uint64_t>();
  if (count <= body_.size() / bytes_each) return count;
  Fail("a list is longer than the blob");
  return 0;
}

void BlobReader::Fail(const std::string& what) {
  if (status_.ok()) status_ = DataLoss(std::string(format_.name) + ": " + what);
  body_ = {};
}

bool BlobReader::Has(size_t bytes) {
  if (!status_.ok()) return false;
  if (body_.size() >= bytes) return true;
  Fail("it ends in the middle of a value");
  return false;
}

Status BlobReader::Finish() {
  if (status_.ok() && !body_.empty()) {
    Fail(std::to_string(body_.size()) + " bytes are left over at its end");
  }
  return status_;
}

}  // namespace icecache
