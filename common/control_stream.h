// ControlStream: one TCP connection of the control plane, in the clear or under TLS, read and
// written in whole spans. Server and client use it alike; what they say over it is theirs.
//
// TlsContext holds what one side of TLS needs and is shared by its connections: a server's
// certificate and key, a client's trusted roots. TLS 1.2 and 1.3. A client verifies the chain and
// that the certificate is for the host (name or address) that it wanted. OpenSSL stays behind
// control_stream.cc.
//
// Thread: the reactor's. Spans given to Read and Write, and whatever the handlers need, must live
// until the handler has run or the stream's io_context is gone; Close makes open operations end
// with an error on a later turn.
#pragma once

#include <boost/asio/ip/tcp.hpp>
#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "common/status.h"

namespace icecache {

class TlsContext {
 public:
  // PEM files: the certificate with its chain, and its private key. NOT_FOUND, INVALID_ARGUMENT
  // (they do not belong together, expired formats), PERMISSION_DENIED: others may read the key.
  static Result<std::shared_ptr<TlsContext>> Server(const std::string& certificate_file,
                                                    const std::string& key_file);
  // PEM file of the certificates to trust; "system": those of this machine.
  static Result<std::shared_ptr<TlsContext>> Client(const std::string& roots_file);
  ~TlsContext();

  struct Impl;
  Impl& impl() { return *impl_; }

 private:
  explicit TlsContext(std::unique_ptr<Impl> impl);
  const std::unique_ptr<Impl> impl_;
};

class ControlStream {
 public:
  using Socket = boost::asio::ip::tcp::socket;
  using Done = std::function<void(const boost::system::error_code&)>;

  // tls: nullptr for a connection in the clear; kept as long as the stream.
  ControlStream(Socket socket, std::shared_ptr<TlsContext> tls);
  ~ControlStream();
  ControlStream(const ControlStream&) = delete;
  ControlStream& operator=(const ControlStream&) = delete;

  // For options and addresses, and for connecting before the handshake.
  Socket& socket();

  // Once, before anything is read or written. In the clear it is done at once, within the call.
  // host: whose certificate it must be.
  void HandshakeAsServer(Done done);
  void HandshakeAsClient(const std::string& host, Done done);

  void Read(std::span<std::byte> to, Done done);  // all of it
  // One at a time.
  void Write(std::span<const std::byte> from, Done done);
  void Close();

  // "TLSv1.3 TLS_AES_256_GCM_SHA384"; "" in the clear.
  std::string Describe() const;

 private:
  struct Impl;
  const std::unique_ptr<Impl> impl_;
};

}  // namespace icecache
