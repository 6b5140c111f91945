#include "kernels/int8_rows.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "common/limits.h"
#include "kernels/distance.h"

namespace icecache {
namespace {

struct Page {
  Page(DType type, uint32_t n, uint32_t d) : dtype(type), rows(n), dim(d), k(n * d), v(n * d) {}
  // Rounds to the dtype, sends there and back.
  void Travel() {
    for (std::vector<float>* x : {&k, &v}) {
      std::vector<std::byte> bytes(x->size() * DTypeBytes(dtype));
      FromF32(x->data(), x->size(), dtype, bytes.data());
      ToF32(bytes.data(), dtype, x->size(), x->data());
      (x == &k ? k_bytes : v_bytes) = std::move(bytes);
    }
    code.resize(Int8RowsBytesMax(dtype, rows, dim));
    code.resize(EncodeInt8Rows({dtype, dim, rows, k_bytes.data(), v_bytes.data()}, code.data()));
    k_back.resize(k.size());
    v_back.resize(v.size());
    std::vector<std::byte> k_out(k_bytes.size()), v_out(v_bytes.size());
    ASSERT_TRUE(DecodeInt8Rows(code, dtype, rows, dim, k_out.data(), v_out.data()));
    ToF32(k_out.data(), dtype, k.size(), k_back.data());
    ToF32(v_out.data(), dtype, v.size(), v_back.data());
  }
  // The dtype's own rounding of a value of this size, and of what was computed on the way to it.
  float Rounding(float x) const {
    const float relative = dtype == DType::kF16 ? 0x1p-10f : dtype == DType::kBF16 ? 0x1p-7f : 0x1p-21f;
    return std::fabs(x) * relative + 0x1p-24f;
  }
  // Half of the step that the range over `count` elements `stride` apart asks for.
  static float HalfStep(const float* x, uint32_t count, uint32_t stride) {
    float low = x[0], high = x[0];
    for (uint32_t i = 0; i < count; ++i) {
      low = std::min(low, x[i * stride]);
      high = std::max(high, x[i * stride]);
    }
    return (high / 2 - low / 2) / 255;
  }
  void ExpectWithinBounds() const {
    for (uint32_t r = 0; r < rows; ++r) {
      const float token = HalfStep(v.data() + r * dim, dim, 1);
      for (uint32_t d = 0; d < dim; ++d) {
        const size_t at = size_t{r} * dim + d;
        const float channel = HalfStep(k.data() + d, rows, dim);
        ASSERT_TRUE(std::isfinite(k_back[at]) && std::isfinite(v_back[at]));
        EXPECT_LE(std::fabs(k_back[at] - k[at]), 1.01f * channel + Rounding(k[at]) +
                                                      Rounding(255 * channel)) << r << " " << d;
        EXPECT_LE(std::fabs(v_back[at] - v[at]), 1.01f * token + Rounding(v[at]) +
                                                      Rounding(255 * token)) << r << " " << d;
      }
    }
  }

  const DType dtype;
  const uint32_t rows, dim;
  std::vector<float> k, v, k_back, v_back;
  std::vector<std::byte> k_bytes, v_bytes, code;
};

class Int8Rows : public ::testing::TestWithParam<DType> {
 protected:
  std::mt19937_64 rng_{7};
  std::normal_distribution<float> normal_;
  void Fill(Page& page, float scale = 1) {
    for (float& x : page.k) x = scale * normal_(rng_);
    for (float& x : page.v) x = scale * normal_(rng_);
  }
};

INSTANTIATE_TEST_SUITE_P(DTypes, Int8Rows,
                         ::testing::Values(DType::kF32, DType::kF16, DType::kBF16),
                         [](const auto& i) { return std::string(DTypeName(i.param)); });

TEST_P(Int8Rows, ErrorIsAtMostHalfAStep) {
  for (const uint32_t dim : {16u, 64u, 128u, 256u}) {
    for (const uint32_t rows : {1u, 2u, 9u, 16u}) {
      Page page(GetParam(), rows, dim);
      Fill(page);
      page.Travel();
      page.ExpectWithinBounds();
    }
  }
}

TEST_P(Int8Rows, ACodeOfAFullPageIsAboutHalfOfIt) {
  Page page(GetParam(), 16, 128);
  Fill(page);
  page.Travel();
  EXPECT_LT(static_cast<double>(page.code.size()),
            0.58 * static_cast<double>(page.k_bytes.size() + page.v_bytes.size()));
}

// A channel with a large constant, as keys of trained models have, costs the others nothing.
TEST_P(Int8Rows, OffsetsOfChannelsDoNotMatter) {
  Page page(GetParam(), 16, 64);
  Fill(page);
  for (uint32_t r = 0; r < 16; ++r) page.k[r * 64 + 5] = 30 + 0.25f * normal_(rng_);
  page.Travel();
  page.ExpectWithinBounds();
}

TEST_P(Int8Rows, OutlierChannelsAreExactAndSpareTheRest) {
  Page page(GetParam(), 16, 128);
  Fill(page);
  for (uint32_t r = 0; r < 16; ++r) {
    for (const uint32_t d : {3u, 90u}) {
      page.k[r * 128 + d] *= 60;
      page.v[r * 128 + d + 1] *= 60;
    }
  }
  page.Travel();
  double others = 0;
  for (uint32_t r = 0; r < 16; ++r) {
    for (uint32_t d = 0; d < 128; ++d) {
      const size_t at = r * 128 + d;
      if (d == 3 || d == 90) {
        EXPECT_EQ(page.k_back[at], page.k[at]);
      }
      if (d == 4 || d == 91) {
        EXPECT_EQ(page.v_back[at], page.v[at]);
      } else {
        others = std::max(others, double{std::fabs(page.v_back[at] - page.v[at])});
      }
    }
  }
  EXPECT_LT(others, 0.04);  // half a step of about 6 / 255, and bf16's rounding
}

TEST_P(Int8Rows, ZerosAndConstantsAreExact) {
  Page page(GetParam(), 16, 32);
  page.Travel();
  EXPECT_EQ(page.k_back, page.k);
  EXPECT_EQ(page.v_back, page.v);
  std::fill(page.k.begin(), page.k.end(), 1.5f);
  std::fill(page.v.begin(), page.v.end(), -2.25f);
  page.Travel();
  EXPECT_EQ(page.k_back, page.k);
  EXPECT_EQ(page.v_back, page.v);
}

TEST_P(Int8Rows, HugeAndTinyValuesStayFiniteAndInBounds) {
  const float largest = GetParam() == DType::kF16 ? 65504.0f : 3.3e38f;
  for (const float scale : {largest, 1e-6f}) {
    Page page(GetParam(), 16, 32);
    std::uniform_real_distribution<float> uniform(-1, 1);
    for (float& x : page.k) x = scale * uniform(rng_);
    for (float& x : page.v) x = scale * uniform(rng_);
    page.k[0] = page.v[0] = scale;
    page.k[32] = page.v[1] = -scale;
    page.Travel();
    page.ExpectWithinBounds();
  }
}

TEST_P(Int8Rows, BrokenCodesAreRefused) {
  Page page(GetParam(), 12, 48);
  Fill(page);
  for (uint32_t r = 0; r < 12; ++r) page.k[r * 48 + 7] *= 100;
  page.Travel();
  std::vector<std::byte> k(page.k_bytes.size()), v(page.v_bytes.size());
  const auto decode = [&](std::span<const std::byte> code) {
    const std::vector<std::byte> exact(code.begin(), code.end());  // ASan sees a byte too many
    return DecodeInt8Rows(exact, page.dtype, 12, 48, k.data(), v.data());
  };
  EXPECT_TRUE(decode(page.code));
  for (size_t size = 0; size < page.code.size(); ++size) {
    EXPECT_FALSE(decode(std::span(page.code).first(size))) << size;
  }
  EXPECT_FALSE(DecodeInt8Rows(page.code, page.dtype, 13, 48, k.data(), v.data()));
  for (int i = 0; i < 3000; ++i) {  // whatever is in it, decoding stays within its rows
    std::vector<std::byte> code = page.code;
    code[rng_() % code.size()] = static_cast<std::byte>(rng_());
    decode(code);
  }
}

}  // namespace
}  // namespace icecache
