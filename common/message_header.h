// MessageHeader: what stands in front of every message on the data plane, as the header of a UCX
// active message. Little-endian. The data follows: meta, zeroes up to a multiple of 8, body.
#pragma once

#include <cstdint>

#include "common/status.h"

namespace icecache {

struct MessageHeader {
  uint32_t magic;
  uint16_t kind;
  uint16_t flags;
  uint64_t id;
  uint32_t sequence;  // counts the messages of one direction: UCX does not keep small and large
                      // ones in order
  uint32_t meta_bytes;
  uint32_t body_bytes;
  uint16_t control;      // kControlNone or kControlHello
  uint16_t patience_cs;  // hundredths of a second that the sender waits for the answer, rounded up;
                         // 0: not said
};
static_assert(sizeof(MessageHeader) == 32);
inline constexpr uint32_t kMessageMagic =
    0x31454349;  // "ICE1"; the digit is the version of this framing

inline constexpr uint16_t kControlNone = 0;  // a message
// The first thing each side sends, the client before the server; carries nothing and is not
// counted. Nobody sends messages before the other's hello has come: UCX 1.13 crashes when it
// replays what was queued during its wire-up.
inline constexpr uint16_t kControlHello = 1;

// Bytes of meta with the zeroes that align the body.
constexpr uint64_t PaddedMetaBytes(uint64_t meta_bytes) { return (meta_bytes + 7) & ~uint64_t{7}; }

// DATA_LOSS unless magic and sizes are sound (common/limits.h) and agree with `data_bytes`, which
// is what has come.
Status CheckMessageHeader(const MessageHeader& header, uint64_t data_bytes);

}  // namespace icecache
