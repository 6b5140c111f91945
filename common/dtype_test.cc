#include "common/dtype.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <random>

namespace icecache {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// The value of a small float by its definition: sign, exponent, fraction. NaN for NaNs.
double Meaning(uint16_t bits, int exponent_bits, int fraction_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits >> fraction_bits) & ((1 << exponent_bits) - 1);
  const int fraction = bits & ((1 << fraction_bits) - 1);
  const double sign = (bits >> 15) != 0 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) {
    return fraction == 0 ? sign * kInf : std::numeric_limits<double>::quiet_NaN();
  }
  const double significand = std::ldexp(fraction, -fraction_bits) + (exponent == 0 ? 0 : 1);
  return sign * std::ldexp(significand, (exponent == 0 ? 1 : exponent) - bias);
}

struct Format {
  const char* name;
  int exponent_bits, fraction_bits;
  uint16_t (*from_f32)(float);
  float (*to_f32)(uint16_t);
  uint16_t infinity;
};
const Format kFormats[] = {{"f16", 5, 10, F32ToF16, F16ToF32, 0x7c00},
                           {"bf16", 8, 7, F32ToBF16, BF16ToF32, 0x7f80}};

TEST(DType, EveryValueWidensToItsMeaningAndComesBack) {
  for (const Format& f : kFormats) {
    for (uint32_t i = 0; i < 65536; ++i) {
      const auto bits = static_cast<uint16_t>(i);
      const float wide = f.to_f32(bits);
      const double meaning = Meaning(bits, f.exponent_bits, f.fraction_bits);
      if (std::isnan(meaning)) {
        ASSERT_TRUE(std::isnan(wide)) << f.name << " " << i;
        ASSERT_TRUE(std::isnan(f.to_f32(f.from_f32(wide)))) << f.name << " " << i;
        continue;
      }
      ASSERT_EQ(double{wide}, meaning) << f.name << " " << i;
      ASSERT_EQ(std::signbit(wide), (bits >> 15) != 0) << f.name << " " << i;
      ASSERT_EQ(f.from_f32(wide), bits) << f.name << " " << i;
    }
  }
}

// Between each two neighbours: below the middle goes down, above goes up, the middle to the even
// one.
TEST(DType, NarrowingRoundsToNearestEven) {
  for (const Format& f : kFormats) {
    for (uint32_t i = 0; i + 1 < f.infinity; ++i) {
      const auto low = static_cast<uint16_t>(i), high = static_cast<uint16_t>(i + 1);
      const float a = f.to_f32(low), b = f.to_f32(high);
      const float middle = a + (b - a) / 2;  // exact: one bit more than the format has
      const uint16_t even = low % 2 == 0 ? low : high;
      const auto sign = static_cast<uint16_t>(0x8000);
      ASSERT_EQ(f.from_f32(middle), even) << f.name << " " << i;
      ASSERT_EQ(f.from_f32(-middle), even | sign) << f.name << " " << i;
      ASSERT_EQ(f.from_f32(std::nextafterf(middle, -kInf)), low) << f.name << " " << i;
      ASSERT_EQ(f.from_f32(std::nextafterf(middle, kInf)), high) << f.name << " " << i;
    }
  }
}

TEST(DType, OverflowBecomesInfinity) {
  for (const Format& f : kFormats) {
    const auto largest_bits = static_cast<uint16_t>(f.infinity - 1);
    const float largest = f.to_f32(largest_bits);
    const float below = f.to_f32(static_cast<uint16_t>(f.infinity - 2));
    const float limit = largest + (largest - below) / 2;  // the middle to the next power of two
    EXPECT_EQ(f.from_f32(std::nextafterf(limit, 0)), largest_bits) << f.name;
    EXPECT_EQ(f.from_f32(limit), f.infinity) << f.name;
    EXPECT_EQ(f.from_f32(kInf), f.infinity) << f.name;
    EXPECT_EQ(f.from_f32(-kInf), f.infinity | 0x8000) << f.name;
  }
  EXPECT_EQ(F32ToF16(65504.0f), 0x7bff);
  EXPECT_EQ(F32ToF16(65520.0f), 0x7c00);
}

TEST(DType, NanStaysNanWithAnyPayload) {
  for (const uint32_t payload : {0x7f800001u, 0x7fc00000u, 0x7fffffffu, 0xff800001u, 0x7f80ffffu}) {
    const auto nan = std::bit_cast<float>(payload);
    EXPECT_TRUE(std::isnan(F16ToF32(F32ToF16(nan))));
    EXPECT_TRUE(std::isnan(BF16ToF32(F32ToBF16(nan))));
  }
}

TEST(DType, NamesAndSizes) {
  for (const DType t : {DType::kF32, DType::kF16, DType::kBF16}) {
    EXPECT_EQ(ParseDType(DTypeName(t)), t);
  }
  EXPECT_EQ(ParseDType("bfloat16"), DType::kBF16);
  EXPECT_EQ(ParseDType("float16"), DType::kF16);
  EXPECT_EQ(ParseDType("float32"), DType::kF32);
  EXPECT_EQ(ParseDType("int8"), std::nullopt);
  EXPECT_EQ(DTypeName(static_cast<DType>(9)), "?");
  EXPECT_EQ(DTypeBytes(DType::kF32), 4u);
  EXPECT_EQ(DTypeBytes(DType::kF16), 2u);
  EXPECT_EQ(DTypeBytes(DType::kBF16), 2u);
}

}  // namespace
}  // namespace icecache
