// "host:port" as people write it. IPv6 hosts stand in brackets: "[::1]:7400". Nothing is resolved
// here.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "common/status.h"

namespace icecache {

struct HostPort {
  std::string host;   // never empty, no brackets
  uint16_t port = 0;  // 0: any free port, for listeners
};

// INVALID_ARGUMENT with the text found and the form expected.
Result<HostPort> ParseHostPort(std::string_view address);
std::string FormatHostPort(const HostPort& address);

}  // namespace icecache
