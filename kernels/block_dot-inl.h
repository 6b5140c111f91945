// Dot products of blocks of 16 rows of 8 bits (quantized.h) or 4 (sketch.h) with query digits,
// shared by the files that scan them. Compiled once per instruction set by each file that includes
// it.
#include "kernels/quantized.h"

#if defined(ICECACHE_KERNELS_BLOCK_DOT_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef ICECACHE_KERNELS_BLOCK_DOT_INL_H
#undef ICECACHE_KERNELS_BLOCK_DOT_INL_H
#else
#define ICECACHE_KERNELS_BLOCK_DOT_INL_H
#endif

#include <algorithm>
#include <cstring>

#include "hwy/highway.h"

// Stands behind HWY_BEFORE_NAMESPACE in every file that includes this one: Highway checks the CPU
// for VNNI before it picks this target, but does not ask the compiler for it.
#undef ICECACHE_WITH_VNNI
#if HWY_TARGET == HWY_AVX3_DL && HWY_COMPILER_GCC_ACTUAL
#define ICECACHE_WITH_VNNI _Pragma("GCC target(\"avx512vnni\")")
#else
#define ICECACHE_WITH_VNNI
#endif

HWY_BEFORE_NAMESPACE();
ICECACHE_WITH_VNNI
namespace icecache {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL

using Int32s = hn::ScalableTag<int32_t>;
using IntVec = hn::Vec<Int32s>;

// acc[lane] += sum of the lane's four products of unsigned bytes and signed query digits.
HWY_INLINE IntVec Dot4(IntVec acc, IntVec bytes, IntVec query) {
#if HWY_TARGET == HWY_AVX2
  const __m256i pairs = _mm256_maddubs_epi16(bytes.raw, query.raw);
  return hn::Add(acc, IntVec{_mm256_madd_epi16(pairs, _mm256_set1_epi16(1))});
#elif HWY_TARGET == HWY_AVX3
  const __m512i pairs = _mm512_maddubs_epi16(bytes.raw, query.raw);
  return hn::Add(acc, IntVec{_mm512_madd_epi16(pairs, _mm512_set1_epi16(1))});
#else
  return IntVec{_mm512_dpbusd_epi32(acc.raw, bytes.raw, query.raw)};
#endif
}

HWY_INLINE IntVec BroadcastQuad(const int8_t* quad) {
  int32_t bits;
  std::memcpy(&bits, quad, sizeof(bits));
  return hn::Set(Int32s(), bits);
}

// Blocks that are scored together. Each sum is one chain of dpbusd (5 cycles each, two start per
// cycle), so that ten or more chains must run side by side; the two-instruction forms have shorter
// chains and fewer registers.
template <int kRows>
constexpr int kBlocksTogether = HWY_TARGET == HWY_AVX3_DL ? (kRows <= 4 ? 4 : 2) : 1;

// Of each row, the four unsigned numbers of quad `half` in a load: kBits = 8 has one quad, 4 two.
template <int kBits>
HWY_INLINE IntVec QuadOf(IntVec bytes, int half) {
  if constexpr (kBits == 8) return bytes;
  const Int32s d;
  return hn::And(half == 0 ? bytes : hn::ShiftRight<4>(bytes), hn::Set(d, 0x0f0f0f0f));
}

// dots[b][r][16] of kRows query digit rows (row_stride bytes apart) with kBlocks blocks, whose
// numbers have 8 or 4 bits. Few rows leave registers for whole blocks, so that a query's bytes are
// broadcast once for all of them.
template <int kBits, int kRows, int kBlocks>
HWY_INLINE void DotBlocks(const uint8_t* const* blocks, const int8_t* query, size_t row_stride,
                          uint32_t dim, int32_t (*dots)[kRows][kBlockRows]) {
  const Int32s d32;
  const hn::ScalableTag<uint8_t> d8;
  constexpr size_t kLanes = HWY_MAX_BYTES / sizeof(int32_t);
  constexpr int kParts = static_cast<int>(kBlockRows / kLanes);
  constexpr int kTogether = kRows <= 4 ? kParts : 1;
  constexpr int kVecs = kTogether * kBlocks;
  constexpr int kQuads = 8 / kBits;
  for (int part = 0; part < kParts; part += kTogether) {
    IntVec acc[kRows][kVecs];
    for (auto& row : acc) {
      for (auto& sum : row) sum = hn::Zero(d32);
    }
    for (uint32_t j = 0; j < dim; j += 4 * kQuads) {
      const size_t at = size_t{j} / kQuads * kBlockRows + part * kLanes * 4;
      IntVec bytes[kVecs];
      for (int v = 0; v < kVecs; ++v) {
        const uint8_t* from = blocks[v / kTogether] + at + v % kTogether * kLanes * 4;
        bytes[v] = hn::BitCast(d32, hn::LoadU(d8, from));
      }
      for (int half = 0; half < kQuads; ++half) {
        IntVec numbers[kVecs];
        for (int v = 0; v < kVecs; ++v) numbers[v] = QuadOf<kBits>(bytes[v], half);
        for (int r = 0; r < kRows; ++r) {
          const IntVec quad = BroadcastQuad(query + r * row_stride + j + 4 * half);
          for (int v = 0; v < kVecs; ++v) acc[r][v] = Dot4(acc[r][v], numbers[v], quad);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVecs; ++v) {
        hn::StoreU(acc[r][v], d32, dots[v / kTogether][r] + (part + v % kTogether) * kLanes);
      }
    }
  }
}
#else

template <int kRows>
constexpr int kBlocksTogether = 1;

template <int kBits, int kRows, int kBlocks>
void DotBlocks(const uint8_t* const* blocks, const int8_t* query, size_t row_stride, uint32_t dim,
               int32_t (*dots)[kRows][kBlockRows]) {
  constexpr uint32_t kQuads = 8 / kBits;
  for (int b = 0; b < kBlocks; ++b) {
    for (int r = 0; r < kRows; ++r) {
      std::fill_n(dots[b][r], kBlockRows, 0);
      for (uint32_t j = 0; j < dim; ++j) {
        const int32_t q = query[r * row_stride + j];
        const uint8_t* at = blocks[b] + size_t{j / (4 * kQuads)} * kBlockRows * 4 + j % 4;
        const uint32_t shift = j / 4 % kQuads * kBits, mask = (1u << kBits) - 1;
        for (uint32_t lane = 0; lane < kBlockRows; ++lane)
          dots[b][r][lane] += q * static_cast<int32_t>((at[lane * 4] >> shift) & mask);
      }
    }
  }
}
#endif

}  // namespace HWY_NAMESPACE
}  // namespace icecache
HWY_AFTER_NAMESPACE();

#endif
