// Gaussian numbers at a few nanoseconds each, equal on every machine: traces are named by their
// seed.
#pragma once

#include <cmath>
#include <cstdint>

namespace icecache {

// xoshiro256** seeded by splitmix64; normals by Marsaglia's polar method. A value; copy it to fork
// it.
class TraceRandom {
 public:
  explicit TraceRandom(uint64_t seed) {
    for (uint64_t& s : state_) {
      seed += 0x9e3779b97f4a7c15ull;
      uint64_t z = seed;
      z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
      z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
      s = z ^ (z >> 31);
    }
  }

  uint64_t Bits() {
    const uint64_t result = Rotate(state_[1] * 5, 7) * 9, t = state_[1] << 17;
    state_[2] ^= state_[0];
    state_[3] ^= state_[1];
    state_[1] ^= state_[2];
    state_[0] ^= state_[3];
    state_[2] ^= t;
    state_[3] = Rotate(state_[3], 45);
    return result;
  }
  uint32_t Below(uint32_t n) { return static_cast<uint32_t>((Bits() >> 32) * n >> 32); }
  float Uniform() { return static_cast<float>(Bits() >> 40) * 0x1p-24f; }  // [0, 1)
  bool Chance(float p) { return Uniform() < p; }
  float Exponential(float mean) { return -mean * std::log(1.0f - Uniform()); }
  float Normal() {
    if (has_spare_) {
      has_spare_ = false;
      return spare_;
    }
    float x, y, r;
    do {
      const uint64_t bits = Bits();
      x = static_cast<float>(static_cast<int32_t>(bits >> 32)) * 0x1p-31f;
      y = static_cast<float>(static_cast<int32_t>(bits)) * 0x1p-31f;
      r = x * x + y * y;
    } while (r >= 1.0f || r == 0.0f);
    const float scale = std::sqrt(-2.0f * std::log(r) / r);
    spare_ = y * scale;
    has_spare_ = true;
    return x * scale;
  }
  void Fill(float* x, size_t count, float scale) {
    for (size_t i = 0; i < count; ++i) x[i] = scale * Normal();
  }

 private:
  static uint64_t Rotate(uint64_t x, int k) { return (x << k) | (x >> (64 - k)); }

  uint64_t state_[4];
  float spare_ = 0;
  bool has_spare_ = false;
};

}  // namespace icecache
