// XXH3, 64 bits with a seed, by a block of threads over memory that they read: the checksum that
// pages travel with (common/checksum.h), on a GPU. Source: the algorithm's description in xxHash
// 0.8 (github.com/Cyan4973/xxHash); equal to its results for every length up to kXxh3BytesMax.
//
// Above 240 bytes the input is blocks of 1024: within one, sums that can be made in any order;
// between them, a chain of eight lanes. Warps make the sums of different blocks side by side, then
// each of them follows the chain. Up to 240 bytes every thread computes all by itself.
#pragma once

#include "kernels/gpu/block.h"

namespace icecache::gpu {

inline constexpr uint32_t kXxh3BytesMax = 17 * 1024;
inline constexpr uint32_t kXxh3SharedBytes = 17 * 64;

struct Xxh3 {
  static constexpr uint64_t kPrime1 = 0x9e3779b185ebca87, kPrime2 = 0xc2b2ae3d27d4eb4f,
                            kPrime3 = 0x165667b19e3779f9, kPrime4 = 0x85ebca77c2b2ae63,
                            kPrime5 = 0x27d4eb2f165667c5;
  static constexpr uint64_t kPrime32 = 0x9e3779b1;
  static constexpr uint32_t kStripe = 64, kBlock = 1024, kSecretBytes = 192;

  KV_GPU static uint64_t SecretWord(uint32_t index) {
    constexpr uint64_t kSecret[kSecretBytes / 8] = {
        0xbe4ba423396cfeb8, 0x1cad21f72c81017c, 0xdb979083e96dd4de, 0x1f67b3b7a4a44072,
        0x78e5c0cc4ee679cb, 0x2172ffcc7dd05a82, 0x8e2443f7744608b8, 0x4c263a81e69035e0,
        0xcb00c391bb52283c, 0xa32e531b8b65d088, 0x4ef90da297486471, 0xd8acdea946ef1938,
        0x3f349ce33f76faa8, 0x1d4f0bc7c7bbdcf9, 0x3159b4cd4be0518a, 0x647378d9c97e9fc8,
        0xc3ebd33483acc5ea, 0xeb6313faffa081c5, 0x49daf0b751dd0d17, 0x9e68d429265516d3,
        0xfca1477d58be162b, 0xce31d07ad1b8f88f, 0x280416958f3acb45, 0x7e404bbbcafbd7af};
    return kSecret[index];
  }
  // 8 bytes of the secret from `at`, which the seed has changed word by word.
  KV_GPU static uint64_t SeededSecret(uint32_t at, uint64_t seed) {
    const auto word = [seed](uint32_t index) {
      return index % 2 == 0 ? SecretWord(index) + seed : SecretWord(index) - seed;
    };
    const uint32_t shift = 8 * (at % 8);
    if (shift == 0) return word(at / 8);
    return (word(at / 8) >> shift) | (word(at / 8 + 1) << (64 - shift));
  }
  KV_GPU static uint64_t Secret(uint32_t at) { return SeededSecret(at, 0); }

  // From any address: GPUs read a word from addresses that it divides alone.
  KV_GPU static uint64_t Read64(const std::byte* from) {
    if (reinterpret_cast<uintptr_t>(from) % 8 == 0) return Load<uint64_t>(from);
    uint64_t x = 0;
    for (uint32_t i = 0; i < 8; ++i) x |= uint64_t{Load<uint8_t>(from + i)} << (8 * i);
    return x;
  }
  KV_GPU static uint64_t Read32(const std::byte* from) {
    uint64_t x = 0;
    for (uint32_t i = 0; i < 4; ++i) x |= uint64_t{Load<uint8_t>(from + i)} << (8 * i);
    return x;
  }

  KV_GPU static uint64_t Rotate(uint64_t x, uint32_t by) { return (x << by) | (x >> (64 - by)); }
  KV_GPU static uint64_t SwapBytes(uint64_t x) {
    x = ((x & 0x00ff00ff00ff00ff) << 8) | ((x >> 8) & 0x00ff00ff00ff00ff);
    x = ((x & 0x0000ffff0000ffff) << 16) | ((x >> 16) & 0x0000ffff0000ffff);
    return Rotate(x, 32);
  }
  // Both halves of the product of 128 bits, folded into one.
  KV_GPU static uint64_t MultiplyFold(uint64_t a, uint64_t b) {
    const uint64_t a0 = a & 0xffffffff, a1 = a >> 32, b0 = b & 0xffffffff, b1 = b >> 32;
    const uint64_t low = a0 * b0, cross = a1 * b0 + (low >> 32),
                   other = a0 * b1 + (cross & 0xffffffff);
    const uint64_t high = a1 * b1 + (cross >> 32) + (other >> 32);
    return high ^ ((other << 32) | (low & 0xffffffff));
  }
  KV_GPU static uint64_t Avalanche(uint64_t h) {
    h = (h ^ (h >> 37)) * 0x165667919e3779f9;
    return h ^ (h >> 32);
  }
  KV_GPU static uint64_t Avalanche64(uint64_t h) {
    h = (h ^ (h >> 33)) * kPrime2;
    h = (h ^ (h >> 29)) * kPrime3;
    return h ^ (h >> 32);
  }
  KV_GPU static uint64_t Mix16(const std::byte* in, uint32_t secret_at, uint64_t seed) {
    return MultiplyFold(Read64(in) ^ (Secret(secret_at) + seed),
                        Read64(in + 8) ^ (Secret(secret_at + 8) - seed));
  }

  KV_GPU static uint64_t UpTo16(const std::byte* in, uint32_t bytes, uint64_t seed) {
    if (bytes == 0) return Avalanche64(seed ^ Secret(56) ^ Secret(64));
    if (bytes < 4) {
      const uint64_t first = Load<uint8_t>(in), middle = Load<uint8_t>(in + bytes / 2),
                     last = Load<uint8_t>(in + bytes - 1);
      const uint64_t all = (first << 16) | (middle << 24) | last | (bytes << 8);
      return Avalanche64(all ^ (((Secret(0) ^ (Secret(0) >> 32)) & 0xffffffff) + seed));
    }
    if (bytes <= 8) {
      seed ^= SwapBytes(seed) & 0xffffffff00000000;
      uint64_t h =
          (Read32(in + bytes - 4) + (Read32(in) << 32)) ^ ((Secret(8) ^ Secret(16)) - seed);
      h = (h ^ Rotate(h, 49) ^ Rotate(h, 24)) * 0x9fb21c651e98df25;
      h = (h ^ ((h >> 35) + bytes)) * 0x9fb21c651e98df25;
      return h ^ (h >> 28);
    }
    const uint64_t low = Read64(in) ^ ((Secret(24) ^ Secret(32)) + seed);
    const uint64_t high = Read64(in + bytes - 8) ^ ((Secret(40) ^ Secret(48)) - seed);
    return Avalanche(bytes + SwapBytes(low) + high + MultiplyFold(low, high));
  }

  KV_GPU static uint64_t UpTo240(const std::byte* in, uint32_t bytes, uint64_t seed) {
    uint64_t sum = bytes * kPrime1;
    if (bytes <= 128) {  // from both ends toward the middle
      for (uint32_t i = 0; i <= (bytes - 1) / 32; ++i) {
        sum += Mix16(in + 16 * i, 32 * i, seed);
        sum += Mix16(in + bytes - 16 * (i + 1), 32 * i + 16, seed);
      }
      return Avalanche(sum);
    }
    for (uint32_t i = 0; i < 8; ++i) sum += Mix16(in + 16 * i, 16 * i, seed);
    sum = Avalanche(sum);
    for (uint32_t i = 8; i < bytes / 16; ++i) sum += Mix16(in + 16 * i, 16 * (i - 8) + 3, seed);
    return Avalanche(sum + Mix16(in + bytes - 16, 119, seed));
  }

  // The sums of lane / 8 and every fourth stripe after it, over the block from `at` on.
  template <typename Block>
  KV_GPU static uint64_t BlockPart(Block& block, const std::byte* in, uint32_t bytes, uint32_t at,
                                   uint64_t seed) {
    const uint32_t i = block.lane() % 8;
    const bool last = bytes - at <= kBlock;
    const uint32_t stripes = last ? (bytes - 1 - at) / kStripe : kBlock / kStripe;
    uint64_t products = 0, words = 0;
    for (uint32_t s = block.lane() / 8; s < stripes + (last ? 1 : 0); s += 4) {
      const bool end = s == stripes;  // the last 64 bytes, whatever they overlap
      const uint64_t x = Read64(end ? in + bytes - kStripe + 8 * i : in + at + kStripe * s + 8 * i);
      const uint64_t key = x ^ SeededSecret(end ? 121 + 8 * i : 8 * (s + i), seed);
      products += (key & 0xffffffff) * (key >> 32);
      words += x;
    }
    products += block.ShuffleXor(words, 1);
    products += block.ShuffleXor(products, 8);
    return products + block.ShuffleXor(products, 16);
  }

  // `sums`: kXxh3SharedBytes of shared memory, nobody else's until the next barrier after the
  // result is used. All threads call it and get the result; `threads` of them, whole warps.
  template <typename Block>
  KV_GPU static uint64_t Long(Block& block, const std::byte* in, uint32_t bytes, uint64_t seed,
                              uint32_t threads, uint64_t* sums) {
    const uint32_t full = (bytes - 1) / kBlock, i = block.lane() % 8;
    for (uint32_t b = block.warp(); b <= full; b += threads / kWarpLanes) {
      const uint64_t sum = BlockPart(block, in, bytes, b * kBlock, seed);
      if (block.lane() < 8) sums[8 * b + i] = sum;
    }
    block.Sync();
    constexpr uint64_t kStart[8] = {0xc2b2ae3d, kPrime1,    kPrime2, kPrime3,
                                    kPrime4,    0x85ebca77, kPrime5, kPrime32};
    uint64_t chain = kStart[i];
    for (uint32_t b = 0; b < full; ++b) {
      chain += sums[8 * b + i];
      chain = (chain ^ (chain >> 47) ^ SeededSecret(128 + 8 * i, seed)) * kPrime32;
    }
    chain += sums[8 * full + i];
    chain ^= SeededSecret(11 + 8 * i, seed);
    const uint64_t neighbour = block.ShuffleXor(chain, 1);
    const uint64_t folded = i % 2 == 0 ? MultiplyFold(chain, neighbour) : 0;
    return Avalanche(bytes * kPrime1 + LaneSum(block, folded, 8));
  }

  // XXH3_64bits_withSeed(in, bytes, seed) in every thread; at most one barrier.
  template <typename Block>
  KV_GPU static uint64_t Hash(Block& block, const std::byte* in, uint32_t bytes, uint64_t seed,
                              uint32_t threads, uint64_t* sums) {
    if (bytes <= 16) return UpTo16(in, bytes, seed);
    if (bytes <= 240) return UpTo240(in, bytes, seed);
    return Long(block, in, bytes, seed, threads, sums);
  }
};

}  // namespace icecache::gpu
