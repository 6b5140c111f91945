#include "common/control_stream.h"

#include <sys/stat.h>

#include <boost/asio/read.hpp>
#include <boost/asio/ssl.hpp>
#include <boost/asio/write.hpp>
#include <optional>
#include <utility>

namespace icecache {

namespace asio = boost::asio;
namespace ssl = boost::asio::ssl;
using boost::system::error_code;

struct TlsContext::Impl {
  explicit Impl(ssl::context::method method) : context(method) {
    context.set_options(ssl::context::default_workarounds | ssl::context::no_sslv2 |
                        ssl::context::no_sslv3 | ssl::context::no_tlsv1 | ssl::context::no_tlsv1_1);
  }
  ssl::context context;
};

namespace {

Status BadFile(const char* what, const std::string& path, const error_code& error,
               const char* remedy) {
  return InvalidArgument(std::string(what) + " " + path + ": " + error.message() + "; " + remedy);
}

Status CheckReadable(const char* what, const std::string& path, bool secret) {
  struct stat info {};
  if (stat(path.c_str(), &info) != 0)
    return NotFound(std::string(what) + " " + path + ": no such file");
  if (secret && (info.st_mode & (S_IRGRP | S_IWGRP | S_IROTH | S_IWOTH)) != 0) {
    return PermissionDenied(std::string(what) + " " + path +
                            ": others than its owner may read it; run: chmod 600 " + path);
  }
  return OkStatus();
}

}  // namespace

TlsContext::TlsContext(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
TlsContext::~TlsContext() = default;

Result<std::shared_ptr<TlsContext>> TlsContext::Server(const std::string& certificate_file,
                                                       const std::string& key_file) {
  KV_RETURN_IF_ERROR(CheckReadable("certificate", certificate_file, false));
  KV_RETURN_IF_ERROR(CheckReadable("private key", key_file, true));
  auto impl = std::make_unique<Impl>(ssl::context::tls_server);
  error_code error;
  impl->context.use_certificate_chain_file(certificate_file, error);
  if (error) {
    return BadFile("certificate", certificate_file, error,
                   "give a PEM file with the certificate and its chain");
  }
  impl->context.use_private_key_file(key_file, ssl::context::pem, error);
  if (error) {
    return BadFile("private key", key_file, error,
                   "give the PEM file of the key that the certificate was made for");
  }
  return std::shared_ptr<TlsContext>(new TlsContext(std::move(impl)));
}

Result<std::shared_ptr<TlsContext>> TlsContext::Client(const std::string& roots_file) {
  auto impl = std::make_unique<Impl>(ssl::context::tls_client);
  error_code error;
  if (roots_file == "system") {
    impl->context.set_default_verify_paths(error);
  } else {
    KV_RETURN_IF_ERROR(CheckReadable("trusted certificates", roots_file, false));
    impl->context.load_verify_file(roots_file, error);
  }
  if (error) {
    return BadFile("trusted certificates", roots_file, error,
                   "give a PEM file, or the word system for those of this machine");
  }
  impl->context.set_verify_mode(ssl::verify_peer);
  return std::shared_ptr<TlsContext>(new TlsContext(std::move(impl)));
}

struct ControlStream::Impl {
  Impl(Socket s, std::shared_ptr<TlsContext> t) : tls(std::move(t)) {
    if (tls != nullptr) {
      secure.emplace(std::move(s), tls->impl().context);
    } else {
      plain.emplace(std::move(s));
    }
  }
  std::shared_ptr<TlsContext> tls;
  std::optional<Socket> plain;  // one of the two
  std::optional<ssl::stream<Socket>> secure;
};

ControlStream::ControlStream(Socket socket, std::shared_ptr<TlsContext> tls)
    : impl_(std::make_unique<Impl>(std::move(socket), std::move(tls))) {}
ControlStream::~ControlStream() = default;

ControlStream::Socket& ControlStream::socket() {
  return impl_->plain ? *impl_->plain : impl_->secure->next_layer();
}

void ControlStream::HandshakeAsServer(Done done) {
  if (impl_->plain) return done({});
  impl_->secure->async_handshake(ssl::stream_base::server, std::move(done));
}

void ControlStream::HandshakeAsClient(const std::string& host, Done done) {
  if (impl_->plain) return done({});
  error_code error;
  impl_->secure->set_verify_callback(ssl::host_name_verification(host), error);
  error_code not_an_address;
  asio::ip::make_address(host, not_an_address);
  // A server with several names chooses its certificate by this; addresses are not sent (RFC 6066).
  if (not_an_address && !error)
    SSL_set_tlsext_host_name(impl_->secure->native_handle(), host.c_str());
  impl_->secure->async_handshake(ssl::stream_base::client, std::move(done));
}

void ControlStream::Read(std::span<std::byte> to, Done done) {
  const auto buffer = asio::buffer(to.data(), to.size());
  const auto handler = [done = std::move(done)](const error_code& error, size_t) { done(error); };
  if (impl_->plain) return asio::async_read(*impl_->plain, buffer, handler);
  asio::async_read(*impl_->secure, buffer, handler);
}

void ControlStream::Write(std::span<const std::byte> from, Done done) {
  const auto buffer = asio::buffer(from.data(), from.size());
  const auto handler = [done = std::move(done)](const error_code& error, size_t) { done(error); };
  if (impl_->plain) return asio::async_write(*impl_->plain, buffer, handler);
  asio::async_write(*impl_->secure, buffer, handler);
}

// Without TLS's own farewell: frames say where they end, so a cut-off stream cannot pass for a
// finished one.
void ControlStream::Close() {
  error_code ignored;
  socket().shutdown(Socket::shutdown_both, ignored);
  socket().close(ignored);
}

std::string ControlStream::Describe() const {
  if (impl_->plain) return "";
  const SSL* const handle = impl_->secure->native_handle();
  return std::string(SSL_get_version(handle)) + " " + SSL_get_cipher_name(handle);
}

}  // namespace icecache
