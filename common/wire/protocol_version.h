// The version of the messages of both planes, frames included. Peers of different versions part at
// Hello or Attach, with both numbers.
#pragma once

#include <cstdint>

namespace icecache::wire {

// 2: frames of the data plane carry the sender's patience in two bytes that were zero; version 1
// takes such a frame for a broken one.
inline constexpr uint16_t kProtocolVersion = 2;

}  // namespace icecache::wire
