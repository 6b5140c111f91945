#include "common/checksum.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <vector>

namespace icecache {
namespace {

std::vector<std::byte> Bytes(size_t n, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::byte> out(n);
  for (auto& b : out) b = static_cast<std::byte>(random());
  return out;
}

TEST(Checksum, IsXxh3) {  // published test values of XXH3_64bits: what is on disk stays readable
  EXPECT_EQ(Checksum64({}), 0x2d06800538d394c2ull);
  const char* text = "abc";
  EXPECT_EQ(Checksum64(std::as_bytes(std::span(text, 3))), 0x78af5f94892f3950ull);
}

TEST(Checksum, SeesEveryBitAndTheSeed) {
  auto bytes = Bytes(300, 1);
  const uint64_t whole = Checksum64(bytes);
  EXPECT_NE(Checksum64(bytes, 1), whole);
  for (size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    bytes[bit / 8] ^= static_cast<std::byte>(1u << (bit % 8));
    ASSERT_NE(Checksum64(bytes), whole) << bit;
    bytes[bit / 8] ^= static_cast<std::byte>(1u << (bit % 8));
  }
  EXPECT_EQ(Checksum64(bytes), whole);
}

TEST(PageChecksum, CoversContentAndName) {
  auto k = Bytes(2048, 2), v = Bytes(2048, 3), positions = Bytes(64, 4);
  const PageIdentity id{7, 8, 9};
  const uint64_t right = PageChecksum(id, k, v, positions);
  EXPECT_EQ(PageChecksum(id, k, v, positions), right);
  EXPECT_NE(PageChecksum({8, 8, 9}, k, v, positions), right);
  EXPECT_NE(PageChecksum({7, 9, 9}, k, v, positions), right);
  EXPECT_NE(PageChecksum({7, 8, 10}, k, v, positions), right);
  EXPECT_NE(PageChecksum({7, 9, 8}, k, v, positions), right) << "page and version swapped";
  EXPECT_NE(PageChecksum(id, v, k, positions), right) << "K and V swapped";
  for (auto* part : {&k, &v, &positions}) {
    (*part)[part->size() / 2] ^= std::byte{1};
    EXPECT_NE(PageChecksum(id, k, v, positions), right);
    (*part)[part->size() / 2] ^= std::byte{1};
  }
}

TEST(PageChecksum, RowsCannotSlideBetweenParts) {
  const auto rows = Bytes(4096, 5);
  const std::span<const std::byte> all(rows);
  const PageIdentity id{1, 2, 3};
  EXPECT_NE(PageChecksum(id, all.first(2048), all.subspan(2048), {}),
            PageChecksum(id, all.first(2176), all.subspan(2176), {}));
}

}  // namespace
}  // namespace icecache
