// ReplyMode: how the pages that a worker lacks come to it (docs/protocol.md, "Reply modes").
#pragma once

#include <cstdint>
#include <string_view>

#include "common/status.h"

namespace icecache {

enum class ReplyMode : uint8_t {
  kAuto,    // mapped where the server is on this host, else inline
  kInline,  // in the reply
  kMapped,  // read from the server's memory, on the same host
  kAttend,  // not at all: the server attends to them
  kRemote,  // read from the server's memory, over a network that can (RDMA)
};

constexpr std::string_view ReplyModeName(ReplyMode mode) {
  constexpr std::string_view kNames[] = {"auto", "inline", "mapped", "attend", "remote"};
  return kNames[static_cast<uint8_t>(mode)];
}

inline Result<ReplyMode> ParseReplyMode(std::string_view name) {
  for (const ReplyMode mode :
       {ReplyMode::kAuto, ReplyMode::kInline, ReplyMode::kMapped, ReplyMode::kAttend,
        ReplyMode::kRemote}) {
    if (ReplyModeName(mode) == name) return mode;
  }
  return InvalidArgument("'" + std::string(name) + "', expected auto, inline, mapped, attend or remote");
}

}  // namespace icecache
