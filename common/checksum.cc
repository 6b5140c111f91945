#include "common/checksum.h"

#include <xxhash.h>

namespace icecache {

uint64_t Checksum64(std::span<const std::byte> bytes, uint64_t seed) {
  return XXH3_64bits_withSeed(bytes.data(), bytes.size(), seed);
}

uint64_t PageNameSeed(const PageIdentity& identity) {
  const uint64_t words[2] = {identity.segment, (uint64_t{identity.page} << 32) | identity.version};
  return Checksum64(std::as_bytes(std::span(words)));
}

uint64_t PageChecksum(const PageIdentity& identity, std::span<const std::byte> k_rows,
                      std::span<const std::byte> v_rows, std::span<const std::byte> positions) {
  // Chained seeds, not a streaming state: three one-shot calls are faster at page size.
  uint64_t h = Checksum64(k_rows, PageNameSeed(identity));
  h = Checksum64(v_rows, h);
  return Checksum64(positions, h);
}

}  // namespace icecache
