// Strong integers for everything that is named by a number: a LayerId is never passed as a
// KvHeadId.
#pragma once

#include <compare>
#include <cstdint>
#include <functional>

namespace icecache {

template <typename Tag, typename Int>
struct StrongInt {
  using Value = Int;
  Int value = 0;

  constexpr StrongInt() = default;
  constexpr explicit StrongInt(Int v) : value(v) {}
  friend constexpr auto operator<=>(StrongInt, StrongInt) = default;
};

using LayerId = StrongInt<struct LayerTag, uint16_t>;    // 0-based transformer layer
using KvHeadId = StrongInt<struct KvHeadTag, uint16_t>;  // 0-based key/value head of a layer
using TokenPos =
    StrongInt<struct TokenPosTag, uint32_t>;  // 0-based position in a context (RoPE position)
using PageId = StrongInt<struct PageTag, uint32_t>;        // dense, 0-based, within one head slice
using ContextId = StrongInt<struct ContextTag, uint64_t>;  // unique for the life of a server
using SegmentId = StrongInt<struct SegmentTag, uint64_t>;  // unique for the life of a store
using TenantId = StrongInt<struct TenantTag, uint32_t>;    // index in the token file; 0 = "default"
using Epoch = StrongInt<struct EpochTag, uint64_t>;        // fences a lease: larger = later
using ShardId = StrongInt<struct ShardTag, uint16_t>;

}  // namespace icecache

template <typename Tag, typename Int>
struct std::hash<icecache::StrongInt<Tag, Int>> {
  size_t operator()(icecache::StrongInt<Tag, Int> id) const noexcept {
    return std::hash<Int>{}(id.value);
  }
};
