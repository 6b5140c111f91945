// A listening TCP socket for the control plane or the admin pages, or the reason why not.
#pragma once

#include <boost/asio/ip/tcp.hpp>
#include <cstdint>
#include <string>

#include "common/status.h"

namespace icecache {

// host: an address or a name that resolves here. `flag` is the option that a refusal names
// ("--port"). UNAVAILABLE when the port is taken or the address is not this machine's.
Result<boost::asio::ip::tcp::acceptor> ListenTcp(boost::asio::io_context& io,
                                                 const std::string& host, uint16_t port,
                                                 const std::string& flag);

// The first address that a name stands for; an address stands for itself. INVALID_ARGUMENT: there
// is none.
Result<std::string> ResolveHost(const std::string& host);

// "127.0.0.1:7400", "[::1]:7400".
std::string EndpointText(const boost::asio::ip::tcp::endpoint& endpoint);

// accept() failed because this process or the machine is out of descriptors or buffers: try again
// after a pause instead of spinning.
inline constexpr int kAcceptPauseMs = 100;

}  // namespace icecache
