// Records of durable contexts: what is written is read back, and what format 1 wrote still is.
#include "cacheserver/context/manifest.h"

#include <gtest/gtest.h>

#include "cacheserver/store/blob.h"
#include "common/limits.h"

namespace icecache {
namespace {

constexpr size_t kHeaderBytes = 16, kSumBytes = 8;
constexpr uint32_t kMagic = 0x4e4d4349;  // "ICMN"

ContextManifest Sample(uint32_t tokens, size_t keys) {
  ContextManifest m;
  m.tenant = "alice";
  m.name = "doc";
  m.shape = {.layers = 2, .kv_heads = 2, .query_heads = 4, .head_dim = 64, .dtype = DType::kF16};
  m.model = "tiny";
  m.sink_tokens = 4;
  m.window_tokens = 16;
  m.segments = {{SegmentId(7), "alice", 0, tokens - 16, tokens}};
  m.shared = keys > 0;
  m.prefix_keys.resize(keys);
  for (size_t i = 0; i < keys; ++i) m.prefix_keys[i].fill(static_cast<std::byte>(i + 1));
  return m;
}

TEST(Manifest, KeysAndSharingComeBack) {
  const uint32_t tokens = 2 * limits::kPrefixBlockTokens + 5;
  const Result<ContextManifest> back = DecodeManifest(EncodeManifest(Sample(tokens, 3)));
  ASSERT_TRUE(back.ok()) << back.status().ToString();
  EXPECT_TRUE(back->shared);
  EXPECT_EQ(back->prefix_keys, Sample(tokens, 3).prefix_keys);
  EXPECT_EQ(DecodeManifest(EncodeManifest(Sample(tokens, 2))).status().code(),
            StatusCode::kDataLoss);
}

TEST(Manifest, ARecordOfFormat1IsReadAndHasNoKeys) {
  std::string body = EncodeManifest(Sample(400, 0));
  // Format 1 ends before the flag and the length of the keys.
  body = body.substr(kHeaderBytes, body.size() - kHeaderBytes - kSumBytes - 9);
  BlobWriter old({kMagic, 1, "record of a durable context"});
  for (const char c : body) old.Put(c);
  const Result<ContextManifest> back = DecodeManifest(old.Finish());
  ASSERT_TRUE(back.ok()) << back.status().ToString();
  EXPECT_EQ(back->name, "doc");
  EXPECT_EQ(back->segments.back().end, 400u);
  EXPECT_FALSE(back->shared);
  EXPECT_TRUE(back->prefix_keys.empty());
}

}  // namespace
}  // namespace icecache
