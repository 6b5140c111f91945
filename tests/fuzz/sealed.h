// Mutation seldom guesses a checksum. Blobs (store/blob.h) end in one, over all before it, seeded
// with the magic number that they begin with: Sealed makes length and checksum right again, so that
// what lies behind them is fuzzed too.
#pragma once

#include <cstdint>
#include <cstring>
#include <span>
#include <string>

#include "common/checksum.h"

namespace icecache::fuzz {

// length_at: where the header, which ends there, holds the length of the body.
inline std::string Sealed(std::string bytes, size_t length_at) {
  const size_t header = length_at + sizeof(uint64_t);
  if (bytes.size() < header + sizeof(uint64_t)) return bytes;
  const uint64_t body = bytes.size() - header - sizeof(uint64_t);
  std::memcpy(bytes.data() + length_at, &body, sizeof body);
  uint32_t magic = 0;
  std::memcpy(&magic, bytes.data(), sizeof magic);
  const std::span<const char> summed(bytes.data(), header + body);
  const uint64_t sum = Checksum64(std::as_bytes(summed), magic);
  std::memcpy(bytes.data() + header + body, &sum, sizeof sum);
  return bytes;
}

}  // namespace icecache::fuzz
