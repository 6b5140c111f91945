// Checksums of pages and files. XXH3 (64 bit): ~10 GB/s and more per core, so one 8 KiB page costs
// under a microsecond; strong against corruption, not against forgery.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace icecache {

uint64_t Checksum64(std::span<const std::byte> bytes, uint64_t seed = 0);

// The checksum of a page's content: its K rows [fill], V rows [fill] and positions [fill], seeded
// with (segment, page, version), so that a right page in the wrong place does not pass either.
struct PageIdentity {
  uint64_t segment = 0;
  uint32_t page = 0;
  uint32_t version = 0;
};
uint64_t PageNameSeed(const PageIdentity& identity);  // with which the rows are hashed in turn
uint64_t PageChecksum(const PageIdentity& identity, std::span<const std::byte> k_rows,
                      std::span<const std::byte> v_rows, std::span<const std::byte> positions);

}  // namespace icecache
