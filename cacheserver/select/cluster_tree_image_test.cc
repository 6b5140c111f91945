// Images of earlier servers, whose sketches had 8 bits for each dimension of a token.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <string>

#include "cacheserver/select/cluster_tree_slice.h"
#include "common/checksum.h"
#include "kernels/quantized.h"
#include "kernels/sketch.h"

namespace icecache {
namespace {

constexpr uint32_t kDim = 64, kTokens = 3000;
constexpr size_t kLengthAt = 16;  // of the body, in an image's header

uint64_t LengthAt(const std::string& image, size_t at) {
  uint64_t length;
  std::memcpy(&length, image.data() + at, sizeof length);
  return length;
}

// Where the array of `bytes` bytes begins, the only one that long.
size_t ArrayOf(const std::string& image, uint64_t bytes) {
  for (size_t at = 0; at + sizeof bytes + bytes <= image.size(); ++at)
    if (LengthAt(image, at) == bytes) return at + sizeof bytes;
  return 0;
}

// The same deviations, as rows of 8 bits in units of the same scale. The largest is 15 of them, not
// the 16 that it was before it became a code, so that all come back a sixteenth smaller.
std::string InEightBits(const std::string& blocks) {
  std::string out(blocks.size() * 2, '\0');
  const size_t block_bytes = SketchBytes(kDim);
  for (size_t page = 0; page * block_bytes < blocks.size(); ++page) {
    auto* to = reinterpret_cast<uint8_t*>(out.data() + page * 2 * block_bytes);
    for (uint32_t t = 0; t < kBlockRows; ++t) {
      int8_t row[kDim];
      for (uint32_t j = 0; j < kDim; ++j) {
        const auto byte = static_cast<uint8_t>(
            blocks[page * block_bytes + j / 8 * kBlockRows * 4 + t * 4 + j % 4]);
        row[j] = static_cast<int8_t>(2 * ((byte >> (j / 4 % 2 * 4)) & 15) - 15);
      }
      PackBlockRow(row, kDim, t, to);
    }
  }
  return out;
}

void Sign(std::string* image) {
  const uint64_t body = image->size() - kLengthAt - 2 * sizeof(uint64_t);
  std::memcpy(image->data() + kLengthAt, &body, sizeof body);
  uint32_t magic;
  std::memcpy(&magic, image->data(), sizeof magic);
  const std::string_view all = std::string_view(*image).substr(0, image->size() - sizeof(uint64_t));
  const uint64_t sum = Checksum64(std::as_bytes(std::span<const char>(all)), magic);
  std::memcpy(image->data() + all.size(), &sum, sizeof sum);
}

TEST(ClusterTreeImage, SketchesOf8BitsAreReadAndAnswerAlike) {
  Slice slice(kDim, {.sketch = Sketch::kOn});
  slice.Draw(kTokens);
  ASSERT_TRUE(slice.Build().ok());
  std::string image;
  slice.policy().Save(&image);
  const size_t bytes = slice.store().page_count() * SketchBytes(kDim);
  const size_t at = ArrayOf(image, bytes);
  ASSERT_GT(at, 0u);
  const std::string wide = InEightBits(image.substr(at, bytes));
  std::string old = image.substr(0, at - sizeof(uint64_t));
  const uint64_t wide_bytes = wide.size();
  old.append(reinterpret_cast<const char*>(&wide_bytes), sizeof wide_bytes);
  old += wide + image.substr(at + bytes);
  Sign(&old);

  const auto restored = slice.Make();
  ASSERT_EQ(restored->Restore(old).ToString(), "OK");
  std::string again;
  restored->Save(&again);
  EXPECT_EQ(again.size(), image.size());
  for (int i = 0; i < 20; ++i) {
    const std::vector<float> queries = slice.Queries(2, 4);
    Selection want, got;
    const SelectRequest request{.queries = queries.data(), .group = 2, .max_pages = 8};
    slice.policy().Select(request, slice.store().kv(), &want);
    restored->Select(request, slice.store().kv(), &got);
    EXPECT_NEAR(got.covered_mass, want.covered_mass, 0.05f);
    ASSERT_EQ(got.pages.size(), want.pages.size());
    EXPECT_EQ(got.pages[0].page, want.pages[0].page);
  }

  std::string cut = image;  // neither
  const uint64_t odd = bytes - 1;
  cut.erase(at, 1);
  std::memcpy(cut.data() + at - sizeof odd, &odd, sizeof odd);
  Sign(&cut);
  const Status refused = slice.Make()->Restore(cut);
  EXPECT_EQ(refused.code(), StatusCode::kDataLoss);
  EXPECT_THAT(refused.message(), testing::HasSubstr("the table of sketches has the wrong size"));
}

}  // namespace
}  // namespace icecache
