// Private to the *_codec.cc files: flat Cap'n Proto messages to and from byte vectors, with its
// exceptions caught.
#pragma once

#include <capnp/message.h>
#include <capnp/serialize.h>
#include <kj/exception.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/limits.h"
#include "common/status.h"

namespace icecache::wire {

// The flat message behind `prefix_bytes` zero bytes. Cost: one copy of the message.
inline std::vector<std::byte> FlatBytes(capnp::MessageBuilder& message, size_t prefix_bytes = 0) {
  class Appender final : public kj::OutputStream {
   public:
    explicit Appender(std::vector<std::byte>* out) : out_(out) {}
    void write(const void* data, size_t bytes) override {
      const auto* begin = static_cast<const std::byte*>(data);
      out_->insert(out_->end(), begin, begin + bytes);
    }

   private:
    std::vector<std::byte>* out_;
  };
  std::vector<std::byte> out;
  out.reserve(prefix_bytes + capnp::computeSerializedSizeInWords(message) * sizeof(capnp::word));
  out.resize(prefix_bytes);
  Appender appender(&out);
  capnp::writeMessage(appender, message);
  return out;
}

// read(root) over a flat message, whatever bytes it is made of. Unaligned bytes are copied first.
// `read` calls each getter once: the traversal limit leaves room for that and not for lists that
// share their content.
template <typename Root, typename Read>
auto ReadFlat(std::string_view name, std::span<const std::byte> bytes, Read&& read)
    -> std::invoke_result_t<Read, typename Root::Reader> {
  constexpr size_t kWord = sizeof(capnp::word);
  if (bytes.empty() || bytes.size() % kWord != 0 || bytes.size() > limits::kDataMetaBytesMax) {
    return InvalidArgument(std::string(name) + ": " + std::to_string(bytes.size()) +
                           " bytes of meta, expected a positive multiple of 8 up to " +
                           std::to_string(limits::kDataMetaBytesMax));
  }
  std::vector<uint64_t> aligned;
  const auto* begin = reinterpret_cast<const capnp::word*>(bytes.data());
  if (reinterpret_cast<uintptr_t>(bytes.data()) % kWord != 0) {
    aligned.resize(bytes.size() / kWord);
    std::memcpy(aligned.data(), bytes.data(), bytes.size());
    begin = reinterpret_cast<const capnp::word*>(aligned.data());
  }
  const kj::ArrayPtr<const capnp::word> words(begin, bytes.size() / kWord);
  capnp::ReaderOptions options;
  options.traversalLimitInWords = 2 * words.size() + 64;
  options.nestingLimit = limits::kWireNestingMax;
  try {
    capnp::FlatArrayMessageReader reader(words, options);
    if (reader.getEnd() != words.end()) {
      return InvalidArgument(std::string(name) + ": bytes behind the end of the message");
    }
    return std::forward<Read>(read)(reader.getRoot<Root>());
  } catch (const kj::Exception& e) {
    return InvalidArgument(std::string(name) +
                           ": not a valid message: " + std::string(e.getDescription().cStr()));
  }
}

inline std::string_view View(capnp::Text::Reader text) { return {text.begin(), text.size()}; }
inline std::span<const std::byte> View(capnp::Data::Reader data) {
  return {reinterpret_cast<const std::byte*>(data.begin()), data.size()};
}
inline capnp::Data::Reader Bytes(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const kj::byte*>(bytes.data()), bytes.size()};
}
inline capnp::Text::Reader Chars(const std::string& text) { return {text.c_str(), text.size()}; }

}  // namespace icecache::wire
