// Where the parts of an int8 code lie (int8_rows.h says what they mean), for the host that writes
// and checks codes and for kernels that read them.
#pragma once

#include <cmath>

#include "kernels/gpu/block.h"

namespace icecache {

inline constexpr uint32_t kInt8OutliersMax = 8;  // of K, and of V

// `Byte`: const std::byte or std::byte. Parts in the order of the code.
template <typename Byte>
struct Int8Parts {
  Byte* k_min;
  Byte* k_step;
  Byte* v_min;
  Byte* v_step;
  Byte* counts;    // K outliers, V outliers
  Byte* channels;  // of both
  Byte* columns;
  Byte* k_codes;
  Byte* v_codes;
  Byte* end;

  KV_GPU Int8Parts(Byte* code, DType dtype, uint32_t rows, uint32_t dim, uint32_t outliers) {
    const size_t e = dtype == DType::kF32 ? 4 : 2;
    k_min = code;
    k_step = k_min + dim * e;
    v_min = k_step + dim * e;
    v_step = v_min + rows * e;
    counts = v_step + rows * e;
    channels = counts + 2;
    columns = channels + outliers + outliers % 2;
    k_codes = columns + size_t{outliers} * rows * e;
    v_codes = k_codes + size_t{rows} * dim;
    end = v_codes + size_t{rows} * dim;
  }
};

// Decoded elements beyond it are clamped: a code never makes an infinity.
KV_GPU float LargestOf(DType dtype) {
  return dtype == DType::kF16 ? 65504.0f : dtype == DType::kBF16 ? 3.3895314e38f : 3.4028235e38f;
}

// The element of a code byte. Halves of its minimum and step, since a range may be twice the
// largest float; one rounding, said explicitly, so that every compiler makes the same bits.
KV_GPU float DecodeInt8(float half_min, float half_step, uint8_t code, float largest) {
  const float x = 2 * fmaf(static_cast<float>(code), half_step, half_min);
  return x < -largest ? -largest : x > largest ? largest : x;
}

}  // namespace icecache
