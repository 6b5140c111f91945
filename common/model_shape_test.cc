#include "common/model_shape.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

namespace icecache {
namespace {

using testing::HasSubstr;

ModelShape Valid() {
  return {.layers = 4, .kv_heads = 2, .query_heads = 8, .head_dim = 64, .dtype = DType::kF16};
}

TEST(ModelShape, DerivedNumbers) {
  const ModelShape s = Valid();
  EXPECT_TRUE(s.Validate().ok());
  EXPECT_EQ(s.group(), 4u);
  EXPECT_EQ(s.row_bytes(), 128u);
  EXPECT_EQ(s.page_bytes(), 16u * (2 * 128 + 4));
  EXPECT_EQ(s.token_bytes(), 4u * 2 * 2 * 128);
  EXPECT_EQ(s.ToString(), "4 layers, 2 kv heads x 4, head_dim 64, f16");
  ModelShape wide = s;
  wide.dtype = DType::kF32;
  EXPECT_EQ(wide.row_bytes(), 256u);
  EXPECT_FALSE(wide == s);
  EXPECT_EQ(ModelShape().ToString(), "0 layers, 0 kv heads x 0, head_dim 0, f16");
}

TEST(ModelShape, ValidateNamesTheFirstBadField) {
  const auto error = [](auto change) {
    ModelShape s = Valid();
    change(s);
    const Status status = s.Validate();
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    return status.message();
  };
  EXPECT_THAT(error([](ModelShape& s) { s.layers = 0; }), HasSubstr("layers = 0"));
  EXPECT_THAT(error([](ModelShape& s) { s.layers = limits::kLayersMax + 1; }),
              HasSubstr("layers = 257, expected 1..256"));
  EXPECT_THAT(error([](ModelShape& s) { s.kv_heads = 0; }), HasSubstr("kv_heads = 0"));
  EXPECT_THAT(error([](ModelShape& s) { s.query_heads = 0; }), HasSubstr("query_heads = 0"));
  EXPECT_THAT(error([](ModelShape& s) { s.query_heads = 7; }), HasSubstr("7 query heads over 2"));
  EXPECT_THAT(error([](ModelShape& s) { s.query_heads = 2 * (limits::kGroupMax + 1); }),
              HasSubstr("1..16 whole query heads"));
  EXPECT_THAT(error([](ModelShape& s) { s.head_dim = 0; }), HasSubstr("head_dim = 0"));
  EXPECT_THAT(error([](ModelShape& s) { s.head_dim = 40; }), HasSubstr("a multiple of 16"));
  EXPECT_THAT(error([](ModelShape& s) { s.head_dim = 512; }), HasSubstr("head_dim = 512"));
  EXPECT_THAT(error([](ModelShape& s) { s.dtype = static_cast<DType>(3); }),
              HasSubstr("unknown dtype 3"));
}

TEST(ModelShape, LargestPublicModelsAreValid) {
  const ModelShape llama405b{.layers = 126, .kv_heads = 8, .query_heads = 128, .head_dim = 128};
  EXPECT_TRUE(llama405b.Validate().ok()) << llama405b.Validate().ToString();
  const ModelShape smollm{.layers = 30, .kv_heads = 3, .query_heads = 9, .head_dim = 64};
  EXPECT_TRUE(smollm.Validate().ok());
}

TEST(ShardOf, CoversAllShardsEvenlyAndStaysInRange) {
  const ModelShape s{.layers = 32, .kv_heads = 8, .query_heads = 32, .head_dim = 128};
  for (const uint32_t shards : {1u, 2u, 3u, 5u, 8u, 64u}) {
    std::vector<uint32_t> slices(shards);
    for (uint16_t layer = 0; layer < s.layers; ++layer) {
      std::set<uint16_t> of_layer;
      for (uint16_t head = 0; head < s.kv_heads; ++head) {
        const ShardId shard = ShardOf(LayerId(layer), KvHeadId(head), s, shards);
        ASSERT_LT(shard.value, shards);
        ++slices[shard.value];
        of_layer.insert(shard.value);
      }
      EXPECT_EQ(of_layer.size(), std::min(shards, s.kv_heads)) << "one layer uses many shards";
    }
    const auto [least, most] = std::minmax_element(slices.begin(), slices.end());
    EXPECT_LE(*most - *least, 1u);
  }
}

}  // namespace
}  // namespace icecache
