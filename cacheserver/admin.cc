#include "cacheserver/admin.h"

#include <boost/asio/ip/tcp.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/core/tcp_stream.hpp>
#include <boost/beast/http.hpp>
#include <set>
#include <utility>

#include "cacheserver/listen.h"
#include "common/limits.h"
#include "common/log.h"

namespace icecache {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = boost::beast::http;
using asio::ip::tcp;
using boost::system::error_code;

struct Admin::Impl {
  Impl(Reactor& r, MetricsRegistry& m, AdminPages p)
      : reactor(r), metrics(m), pages(std::move(p)), acceptor(r.io()) {}

  void Accept(const std::shared_ptr<Impl>& self);

  Reactor& reactor;
  MetricsRegistry& metrics;
  const AdminPages pages;
  tcp::acceptor acceptor;
  bool accepting = false;
  std::set<std::shared_ptr<Session>> sessions;
};

// One connection: reads a request, answers it, reads the next. The stream's own timer ends what
// takes too long.
class Admin::Session : public std::enable_shared_from_this<Session> {
 public:
  Session(Impl& impl, tcp::socket socket) : impl_(&impl), stream_(std::move(socket)) {}

  void Start() { Read(); }

  void Abandon() {
    impl_ = nullptr;
    stream_.close();
  }

 private:
  using Request = http::request<http::empty_body>;
  using Response = http::response<http::string_body>;

  void Close() {
    if (impl_ == nullptr) return;
    Impl* impl = std::exchange(impl_, nullptr);
    error_code ignored;
    stream_.socket().shutdown(tcp::socket::shutdown_send, ignored);
    stream_.close();
    impl->sessions.erase(shared_from_this());
  }

  void Read() {
    parser_.emplace();
    parser_->header_limit(limits::kHttpRequestBytesMax);
    parser_->body_limit(0);
    stream_.expires_after(limits::kHttpTimeout);
    auto self = shared_from_this();
    http::async_read(stream_, buffer_, *parser_, [self](const error_code& error, size_t) {
      if (self->impl_ == nullptr) return;
      if (!error) return self->Handle(self->parser_->get());
      // A request that is too long or no HTTP at all gets an answer; whoever left gets none.
      if (error == http::error::end_of_stream || error == asio::error::eof ||
          error == asio::error::connection_reset || error == beast::error::timeout ||
          error == http::error::partial_message) {
        return self->Close();
      }
      self->keep_alive_ = false;
      self->Reply(http::status::bad_request, "text/plain",
                  "not a request this server reads: " + error.message() + "\n");
    });
  }

  bool Authorized(const Request& request) const {
    if (!impl_->pages.authorize) return true;
    const auto header = request[http::field::authorization];
    const std::string_view value(header.data(), header.size());
    constexpr std::string_view kBearer = "Bearer ";
    return value.starts_with(kBearer) && impl_->pages.authorize(value.substr(kBearer.size()));
  }

  void Handle(const Request& request) {
    keep_alive_ = request.keep_alive();
    head_ = request.method() == http::verb::head;
    std::string target(request.target().data(), request.target().size());
    target = target.substr(0, target.find('?'));
    if (request.method() != http::verb::get && !head_) {
      keep_alive_ = false;  // its body is not read
      return Reply(http::status::method_not_allowed, "text/plain", "only GET\n");
    }
    const AdminPages& pages = impl_->pages;
    if (target == "/live") return Reply(http::status::ok, "text/plain", "live\n");
    if (target == "/ready") {
      const bool ready = pages.ready();
      return Reply(ready ? http::status::ok : http::status::service_unavailable, "text/plain",
                   ready ? "ready\n" : "draining\n");
    }
    if (!Authorized(request)) {
      return Reply(http::status::unauthorized, "text/plain",
                   "send Authorization: Bearer TENANT:SECRET of a tenant with the admin right\n");
    }
    if (target == "/version") return Reply(http::status::ok, "application/json", pages.version);
    if (target == "/config") return Reply(http::status::ok, "application/toml", pages.config);
    if (target == "/metrics")
      return ReplyLater(pages.metrics, "text/plain; version=0.0.4; charset=utf-8");
    if (target == "/status") return ReplyLater(pages.status, "application/json");
    Reply(http::status::not_found, "text/plain",
          "no such page; there are /metrics /live /ready /version /config /status\n");
  }

  void ReplyLater(const std::function<void(AdminPages::Answer)>& page, const char* type) {
    page([weak = weak_from_this(), type](std::string body) {
      const std::shared_ptr<Session> self = weak.lock();
      if (self != nullptr && self->impl_ != nullptr)
        self->Reply(http::status::ok, type, std::move(body));
    });
  }

  void Reply(http::status status, const char* type, std::string body) {
    impl_->metrics
        .GetCounter("icecache_http_requests_total", "Admin requests by status.",
                    {{"status", std::to_string(static_cast<int>(status))}})
        .Add();
    response_ = Response(status, 11);
    response_.set(http::field::content_type, type);
    response_.set(http::field::cache_control, "no-store");
    if (status == http::status::unauthorized)
      response_.set(http::field::www_authenticate, "Bearer");
    if (status == http::status::method_not_allowed) response_.set(http::field::allow, "GET, HEAD");
    response_.keep_alive(keep_alive_);
    const size_t length = body.size();
    if (!head_) response_.body() = std::move(body);
    response_.content_length(length);
    stream_.expires_after(limits::kHttpTimeout);
    auto self = shared_from_this();
    http::async_write(stream_, response_, [self](const error_code& error, size_t) {
      if (self->impl_ == nullptr) return;
      if (error || !self->keep_alive_) return self->Close();
      self->Read();
    });
  }

  Impl* impl_;  // nullptr: closed
  beast::tcp_stream stream_;
  beast::flat_buffer buffer_{limits::kHttpRequestBytesMax};
  std::optional<http::request_parser<http::empty_body>> parser_;
  Response response_;
  bool keep_alive_ = false;
  bool head_ = false;
};

void Admin::Impl::Accept(const std::shared_ptr<Impl>& self) {
  acceptor.async_accept(
      [weak = std::weak_ptr<Impl>(self)](const error_code& error, tcp::socket socket) {
        const std::shared_ptr<Impl> impl = weak.lock();
        if (impl == nullptr || !impl->accepting) return;
        if (error) {
          impl->reactor.After(std::chrono::milliseconds(kAcceptPauseMs), [weak] {
            if (auto again = weak.lock(); again != nullptr && again->accepting)
              again->Accept(again);
          });
          return;
        }
        if (impl->sessions.size() < limits::kHttpConnectionsMax) {
          auto session = std::make_shared<Session>(*impl, std::move(socket));
          impl->sessions.insert(session);
          session->Start();
        }
        impl->Accept(impl);
      });
}

Admin::Admin(Reactor& reactor, MetricsRegistry& metrics, AdminPages pages)
    : impl_(std::make_shared<Impl>(reactor, metrics, std::move(pages))) {}

Admin::~Admin() {
  impl_->accepting = false;
  error_code ignored;
  impl_->acceptor.close(ignored);
  for (const std::shared_ptr<Session>& session : impl_->sessions) session->Abandon();
  impl_->sessions.clear();
}

Result<std::string> Admin::Listen(const std::string& host, uint16_t port) {
  KV_ASSIGN_OR_RETURN(impl_->acceptor, ListenTcp(impl_->reactor.io(), host, port, "--http-port"));
  impl_->accepting = true;
  impl_->Accept(impl_);
  return EndpointText(impl_->acceptor.local_endpoint());
}

}  // namespace icecache
