#include "cacheserver/select/image.h"

#include <cmath>

#include "common/checksum.h"
#include "common/dtype.h"
#include "kernels/distance.h"

namespace icecache {
namespace {

constexpr uint32_t kMagic = 0x58444949;  // "IIDX"
constexpr uint16_t kVersion = 1;

struct Header {
  uint32_t magic;
  uint16_t version;
  uint8_t kind;
  uint8_t dtype;
  uint32_t head_dim;
  uint32_t reserved;
  uint64_t body_bytes;
};
static_assert(std::has_unique_object_representations_v<Header>);

uint64_t SumOf(std::string_view bytes) {
  return Checksum64(std::as_bytes(std::span<const char>(bytes.data(), bytes.size())), kMagic);
}

}  // namespace

ImageWriter::ImageWriter(PolicyKind kind, const PolicyOptions& options, std::string* out)
    : out_(out), start_(out->size()) {
  const Header header{kMagic,
                      kVersion,
                      static_cast<uint8_t>(kind),
                      static_cast<uint8_t>(options.dtype),
                      options.head_dim,
                      0,
                      0};
  Put(header);
}

void ImageWriter::Finish() {
  const uint64_t body_bytes = out_->size() - start_ - sizeof(Header);
  std::memcpy(out_->data() + start_ + offsetof(Header, body_bytes), &body_bytes,
              sizeof(body_bytes));
  Put<uint64_t>(SumOf(std::string_view(*out_).substr(start_)));
}

ImageReader::ImageReader(PolicyKind kind, const PolicyOptions& options, std::string_view image) {
  Header header;
  if (image.size() < sizeof(Header) + sizeof(uint64_t)) {
    Fail("it has " + std::to_string(image.size()) + " bytes, fewer than a header");
    return;
  }
  std::memcpy(&header, image.data(), sizeof(header));
  const uint64_t expected_bytes = image.size() - sizeof(Header) - sizeof(uint64_t);
  uint64_t sum;
  std::memcpy(&sum, image.data() + image.size() - sizeof(sum), sizeof(sum));
  if (header.magic != kMagic) {
    Fail("it does not start with the magic number");
  } else if (header.version != kVersion) {
    const std::string what = "it has version " + std::to_string(header.version) +
                             ", this build reads version " + std::to_string(kVersion);
    Fail(what + "; rebuild the index from its pages");
    if (header.version > kVersion)
      status_ = FailedPrecondition("index image: " + what + "; use a newer server");
  } else if (header.body_bytes != expected_bytes) {
    Fail("its body has " + std::to_string(expected_bytes) + " bytes, its header says " +
         std::to_string(header.body_bytes));
  } else if (sum != SumOf(image.substr(0, image.size() - sizeof(sum)))) {
    Fail("its checksum does not match");
  } else if (header.kind != static_cast<uint8_t>(kind)) {
    Fail("it belongs to policy number " + std::to_string(header.kind) + ", expected " +
         std::string(PolicyKindName(kind)));
  } else if (header.dtype != static_cast<uint8_t>(options.dtype) ||
             header.head_dim != options.head_dim) {
    Fail("it was made for another dtype or head_dim (" + std::to_string(header.head_dim) + ")");
  } else {
    body_ = image.substr(sizeof(Header), expected_bytes);
  }
}

float ImageReader::GetFinite() {
  const auto value = Get<float>();
  if (!std::isfinite(value)) Fail("a number is NaN or infinite");
  return value;
}

std::vector<float> ImageReader::GetAllFinite() {
  std::vector<float> values = GetAll<float>();
  if (!AllFinite(reinterpret_cast<const std::byte*>(values.data()), DType::kF32, values.size()))
    Fail("a number is NaN or infinite");
  return values;
}

void ImageReader::Fail(std::string_view what) {
  if (status_.ok()) status_ = DataLoss("index image: " + std::string(what));
  body_ = {};
}

bool ImageReader::Has(size_t bytes) {
  if (!status_.ok()) return false;
  if (body_.size() >= bytes) return true;
  Fail("it ends in the middle of a value");
  return false;
}

Status ImageReader::Finish() {
  if (status_.ok() && !body_.empty())
    Fail(std::to_string(body_.size()) + " bytes are left over at its end");
  return status_;
}

}  // namespace icecache
