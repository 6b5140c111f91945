// Verifies pages where attention will read them: the checksum that a page travels with
// (PageChecksum, common/checksum.h), computed over the device's own copy. So it does not matter
// what happened to the source while it was being read: what was copied is what is judged.
//
// One block per page. Cost: one read of the page, which has just been written and is in the cache.
#pragma once

#include "common/limits.h"
#include "kernels/gpu/xxh3.h"

namespace icecache::gpu {

// Words that the kernel writes; anything else: not yet.
inline constexpr uint32_t kPageIntact = 1, kPageDamaged = 2;

struct PageToVerify {
  uint64_t seed = 0;  // of the page's name: PageNameSeed
  uint64_t expected = 0;
  const std::byte* k = nullptr;  // K rows, or the int8 code of both
  const std::byte* v = nullptr;  // V rows, or nothing
  uint32_t k_bytes = 0;          // up to kXxh3BytesMax
  uint32_t v_bytes = 0;
  uint32_t* verdict = nullptr;
  uint32_t fill = 0;
  uint32_t positions[limits::kPageTokens] = {};  // the host's copy: attention needs none
};

struct VerifyArgs {
  const PageToVerify* pages = nullptr;
  uint32_t count = 0;
};

struct VerifyKernel {
  using Args = VerifyArgs;
  static constexpr uint32_t kThreads = 128;
  static constexpr uint32_t kMinBlocks = 8;
  static constexpr uint32_t kSharedBytes = 2 * kXxh3SharedBytes;

  template <typename Block>
  KV_GPU static void Run(Block& block, const VerifyArgs& args) {
    const PageToVerify& page = args.pages[block.x()];
    auto* const sums = block.template shared<uint64_t>();
    uint64_t h = Xxh3::Hash(block, page.k, page.k_bytes, page.seed, kThreads, sums);
    h = Xxh3::Hash(block, page.v, page.v_bytes, h, kThreads, sums + kXxh3SharedBytes / 8);
    const auto* const positions = reinterpret_cast<const std::byte*>(page.positions);
    h = Xxh3::Hash(block, positions, page.fill * 4, h, kThreads, sums);  // short: no sums
    if (block.thread() == 0) {
      const uint32_t verdict = h == page.expected ? uint32_t{kPageIntact} : uint32_t{kPageDamaged};
      Store(page.verdict, verdict);
    }
  }
};

}  // namespace icecache::gpu
