#include "cacheserver/listen.h"

#include "common/address.h"

namespace icecache {

namespace asio = boost::asio;
using asio::ip::tcp;

std::string EndpointText(const tcp::endpoint& endpoint) {
  return FormatHostPort({endpoint.address().to_string(), endpoint.port()});
}

namespace {

Result<tcp::endpoint> Resolve(asio::io_context& io, const std::string& host, uint16_t port) {
  boost::system::error_code error;
  tcp::resolver resolver(io);
  const auto found = resolver.resolve(
      host, std::to_string(port), tcp::resolver::passive | tcp::resolver::numeric_service, error);
  if (!error && !found.empty()) return found.begin()->endpoint();
  return InvalidArgument("host " + host + ": " + error.message() +
                         "; give an address of this machine, such as 127.0.0.1");
}

}  // namespace

Result<std::string> ResolveHost(const std::string& host) {
  asio::io_context io;
  KV_ASSIGN_OR_RETURN(const tcp::endpoint endpoint, Resolve(io, host, 0));
  return endpoint.address().to_string();
}

Result<tcp::acceptor> ListenTcp(asio::io_context& io, const std::string& host, uint16_t port,
                                const std::string& flag) {
  KV_ASSIGN_OR_RETURN(const tcp::endpoint endpoint, Resolve(io, host, port));
  boost::system::error_code error;
  tcp::acceptor acceptor(io);
  acceptor.open(endpoint.protocol(), error);
  if (!error) acceptor.set_option(tcp::acceptor::reuse_address(true), error);
  if (!error) acceptor.bind(endpoint, error);
  if (!error) acceptor.listen(asio::socket_base::max_listen_connections, error);
  if (!error) return acceptor;
  const std::string where = "listen on " + EndpointText(endpoint) + ": " + error.message();
  if (error == asio::error::address_in_use) {
    return Unavailable(where + "; another program has port " + std::to_string(port) +
                       " (see: ss -ltnp 'sport = :" + std::to_string(port) +
                       "'); end it or give another " + flag);
  }
  if (error == asio::error::access_denied) {
    return PermissionDenied(where + "; ports below 1024 are for root: give another " + flag);
  }
  return Unavailable(where + "; give an address of this machine and a free " + flag);
}

}  // namespace icecache
