// Images of every policy in which one word was forged: of small ones, each word once.
#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "tests/fuzz/sealed.h"
#include "tests/support/forged_index.h"

namespace icecache {
namespace {

class ForgedImage : public testing::TestWithParam<PolicyKind> {};

TEST_P(ForgedImage, IsRefusedOrAnIndexLikeAnyOther) {
  std::mt19937_64 random(1);
  constexpr uint32_t kWords[] = {
      0,          1,          0x7fffffff, 0xffffffff,  // small, large; the last are NaN
      0x7f800000, 0xff800000, 0x7f7fffff, 0xbf800000,  // infinities, the largest float, -1
  };
  const forged::Built built = forged::Build(GetParam(), 20);
  ASSERT_EQ(forged::Use(GetParam(), built.image, built), "");
  constexpr size_t kFirst = forged::kLengthAt + sizeof(uint64_t), kTrialsMax = 1000;
  const size_t step = 1 + built.image.size() / kTrialsMax / sizeof(uint32_t);
  for (size_t word = 0;; word += step) {
    // Mostly aligned, as most columns are; some are bytes.
    const size_t at = kFirst + word * sizeof(uint32_t) + (random() % 8 == 0 ? random() % 4 : 0);
    if (at + sizeof(uint32_t) + sizeof(uint64_t) > built.image.size()) break;
    std::string image = built.image;
    std::memcpy(image.data() + at, &kWords[random() % std::size(kWords)], sizeof(uint32_t));
    ASSERT_EQ(forged::Use(GetParam(), fuzz::Sealed(image, forged::kLengthAt), built), "")
        << "byte " << at;
  }
}

INSTANTIATE_TEST_SUITE_P(Policies, ForgedImage, testing::ValuesIn(AllPolicyKinds()),
                         [](const auto& i) { return std::string(PolicyKindName(i.param)); });

}  // namespace
}  // namespace icecache
