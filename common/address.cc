#include "common/address.h"

#include <charconv>

namespace icecache {

Result<HostPort> ParseHostPort(std::string_view address) {
  const auto bad = [&](const char* why) {
    return InvalidArgument("address '" + std::string(address) + "': " + why +
                           "; expected host:port, for example 127.0.0.1:7400 or [::1]:7400");
  };
  const size_t colon = address.rfind(':');
  if (colon == std::string_view::npos) return bad("no port");
  std::string_view host = address.substr(0, colon);
  const std::string_view port = address.substr(colon + 1);
  if (host.size() >= 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);
  } else if (host.find(':') != std::string_view::npos) {
    return bad("an IPv6 host needs brackets");
  }
  if (host.empty()) return bad("no host");
  HostPort parsed{std::string(host), 0};
  const auto [end, error] = std::from_chars(port.data(), port.data() + port.size(), parsed.port);
  if (port.empty() || error != std::errc() || end != port.data() + port.size()) {
    return bad("the port is not a number in 0..65535");
  }
  return parsed;
}

std::string FormatHostPort(const HostPort& address) {
  const bool ipv6 = address.host.find(':') != std::string::npos;
  return (ipv6 ? "[" + address.host + "]" : address.host) + ":" + std::to_string(address.port);
}

}  // namespace icecache
