// Parts of one piece of memory that a device reads: each begins where the widest vector load may.
#pragma once

#include <cstddef>

namespace icecache::gpu {

inline constexpr size_t kPartAlignment = 16;

constexpr size_t Aligned(size_t bytes) {
  return (bytes + kPartAlignment - 1) / kPartAlignment * kPartAlignment;
}

}  // namespace icecache::gpu
