// Sampling on a device chooses the token that the CPU's sampler chooses.
#include <cmath>
#include <limits>
#include <random>

#include "tests/conformance/device_suite.h"
#include "worker/model/sampler.h"

namespace icecache::gpu {
namespace {

class DeviceSamplerSuite : public DeviceSuite {
 protected:
  int32_t SampleOnDevice(const std::vector<float>& logits, const SamplerOptions& options,
                         double uniform) {
    auto* const token = Room<int32_t>(1);
    device_->Launch(SampleArgs{Upload(logits), Upload(std::vector<double>{uniform}), token, 1,
                               static_cast<uint32_t>(logits.size()), options.temperature,
                               options.top_p});
    return Download(token, 1)[0];
  }
  // The number that a Sampler of this seed draws first.
  static double FirstUniform(uint64_t seed) {
    return Sampler({.temperature = 1, .seed = seed}).Next().uniform;
  }
};

TEST_P(DeviceSamplerSuite, AgreesWithTheCpuForEveryKindOfSampling) {
  std::mt19937_64 rng(5);
  std::normal_distribution<float> normal;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const SamplerOptions& options :
       {SamplerOptions{0, 1, 0}, SamplerOptions{1, 1, 0}, SamplerOptions{0.7, 0.9, 0},
        SamplerOptions{2, 0.3, 0}, SamplerOptions{1, 0.0001, 0}}) {
    for (uint64_t seed = 1; seed <= 8; ++seed) {
      SCOPED_TRACE(testing::Message() << "temperature " << options.temperature << " top_p "
                                      << options.top_p << " seed " << seed);
      std::vector<float> logits(seed == 8 ? 3 : 1000);
      for (float& x : logits) x = 3 * normal(rng);
      if (seed == 2) logits[17] = logits[400] = 20;  // equal ones at the top
      if (seed == 3) logits[0] = logits[999] = nan;
      if (seed == 4) std::fill(logits.begin(), logits.end(), 1.5f);
      SamplerOptions with_seed = options;
      with_seed.seed = seed;
      Sampler sampler(with_seed);
      EXPECT_EQ(SampleOnDevice(logits, options, FirstUniform(seed)), sampler.Sample(logits));
    }
  }
}

INSTANTIATE_DEVICES(DeviceSamplerSuite);

}  // namespace
}  // namespace icecache::gpu
