#include "common/message_header.h"

#include <string>

#include "common/limits.h"

namespace icecache {

Status CheckMessageHeader(const MessageHeader& header, uint64_t data_bytes) {
  const auto bad = [](const std::string& what) {
    return DataLoss("malformed message from the peer: " + what);
  };
  if (header.magic != kMessageMagic || header.control > kControlHello) {
    return bad("magic " + std::to_string(header.magic) + ", expected " +
               std::to_string(kMessageMagic) +
               " (another version of icecache, or another program)");
  }
  if (header.meta_bytes > limits::kDataMetaBytesMax) {
    return bad("meta of " + std::to_string(header.meta_bytes) + " bytes, at most " +
               std::to_string(limits::kDataMetaBytesMax));
  }
  if (header.body_bytes > limits::kDataBodyBytesMax) {
    return bad("body of " + std::to_string(header.body_bytes) + " bytes, at most " +
               std::to_string(limits::kDataBodyBytesMax));
  }
  if (header.control == kControlHello && (header.meta_bytes > 0 || header.body_bytes > 0)) {
    return bad("a hello that carries data");
  }
  const uint64_t expected = PaddedMetaBytes(header.meta_bytes) + header.body_bytes;
  if (data_bytes == expected) return OkStatus();
  return bad(std::to_string(data_bytes) + " bytes of data, its header says " +
             std::to_string(expected));
}

}  // namespace icecache
