#include "cacheserver/select/image.h"

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "common/checksum.h"

namespace icecache {
namespace {

constexpr PolicyOptions kOptions{DType::kF16, 64, 1};

std::string SmallImage() {
  std::string image;
  ImageWriter writer(PolicyKind::kExact, kOptions, &image);
  writer.Put<uint32_t>(7);
  writer.PutAll(std::vector<float>{1.5f, -2.0f});
  writer.PutAll(std::vector<uint8_t>{});
  writer.Finish();
  return image;
}

TEST(Image, ReadsBackWhatWasWritten) {
  const std::string image = SmallImage();
  ImageReader reader(PolicyKind::kExact, kOptions, image);
  EXPECT_EQ(reader.Get<uint32_t>(), 7u);
  EXPECT_EQ(reader.GetAll<float>(), (std::vector<float>{1.5f, -2.0f}));
  EXPECT_TRUE(reader.GetAll<uint8_t>().empty());
  EXPECT_TRUE(reader.Finish().ok());
}

TEST(Image, AppendsBehindOtherBytes) {
  std::string all = "before";
  ImageWriter writer(PolicyKind::kExact, kOptions, &all);
  writer.Put<uint64_t>(1);
  writer.Finish();
  ImageReader reader(PolicyKind::kExact, kOptions, std::string_view(all).substr(6));
  EXPECT_EQ(reader.Get<uint64_t>(), 1u);
  EXPECT_TRUE(reader.Finish().ok());
}

TEST(Image, NamesWhatIsWrong) {
  const std::string image = SmallImage();
  const auto message = [&](const std::string& bytes, PolicyKind kind, PolicyOptions options) {
    return ImageReader(kind, options, bytes).Finish().message();
  };
  EXPECT_NE(message("", PolicyKind::kExact, kOptions).find("fewer than a header"),
            std::string::npos);
  EXPECT_NE(message(image, PolicyKind::kDciTree, kOptions).find("dci_tree"), std::string::npos);
  EXPECT_NE(message(image, PolicyKind::kExact, {DType::kF16, 128, 1}).find("head_dim"),
            std::string::npos);
  std::string flipped = image;
  flipped[image.size() / 2] ^= 1;
  EXPECT_NE(message(flipped, PolicyKind::kExact, kOptions).find("checksum"), std::string::npos);
  EXPECT_NE(message(image + "x", PolicyKind::kExact, kOptions).find("body"), std::string::npos);
}

TEST(Image, LengthsBeyondTheImageAreRefusedWithoutAllocating) {
  std::string image;
  ImageWriter writer(PolicyKind::kExact, kOptions, &image);
  writer.Put<uint64_t>(~uint64_t{0} / 2);  // an array's count with nothing behind it
  writer.Finish();
  ImageReader reader(PolicyKind::kExact, kOptions, image);
  EXPECT_TRUE(reader.GetAll<float>().empty());
  EXPECT_EQ(reader.Finish().code(), StatusCode::kDataLoss);
}

TEST(Image, LeftoverAndMissingBytesAreRefused) {
  const std::string image = SmallImage();
  ImageReader early(PolicyKind::kExact, kOptions, image);
  (void)early.Get<uint32_t>();
  EXPECT_EQ(early.Finish().code(), StatusCode::kDataLoss);
  ImageReader late(PolicyKind::kExact, kOptions, image);
  for (int i = 0; i < 100; ++i) (void)late.Get<uint64_t>();
  EXPECT_EQ(late.Finish().code(), StatusCode::kDataLoss);
}

}  // namespace
}  // namespace icecache
