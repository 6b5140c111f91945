#include "common/control_client.h"

#include <algorithm>
#include <array>
#include <boost/asio/connect.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <deque>
#include <map>
#include <optional>
#include <utility>

#include "common/address.h"
#include "common/control_stream.h"
#include "common/limits.h"

namespace icecache {
namespace {

namespace asio = boost::asio;
using boost::system::error_code;
using std::chrono::milliseconds;

// Renewals without an answer before the server counts as lost, and the least time that is given. It
// is longer than on the data plane, whose connections come back by themselves: with this one goes
// the lease, and a cable that is plugged in again after a second should cost a second.
constexpr int kRenewalsUnansweredMax = 3;
constexpr Duration kSilenceMin = std::chrono::seconds(3);

}  // namespace

struct ControlClient::Impl : std::enable_shared_from_this<ControlClient::Impl> {
  Impl(Reactor& r, const ControlClientOptions& o) : reactor(r), options(o) {}

  using Done = std::function<void(Result<wire::ControlReply>)>;

  void Send(decltype(wire::ControlRequest::body) body, Done done) {
    if (!lost.ok()) {
      done(lost);
      return;
    }
    wire::ControlRequest request;
    request.id = next_id++;
    request.body = std::move(body);
    waiting.emplace(request.id, std::move(done));
    out.push_back(wire::EncodeFrame(request));
    if (out.size() == 1) WriteNext();
  }

  void WriteNext() {
    stream->Write(out.front(), [self = shared_from_this()](const error_code& error) {
      if (!self->lost.ok()) return;
      if (error) {
        self->Lose(error.message());
        return;
      }
      self->out.pop_front();
      if (!self->out.empty()) self->WriteNext();
    });
  }

  void ReadNext() {
    in.resize(wire::kFrameHeaderBytes);
    stream->Read(in, [self = shared_from_this()](const error_code& error) {
      if (!self->lost.ok()) return;
      if (error) {
        self->Lose(error.message());
        return;
      }
      self->ReadBody();
    });
  }

  void ReadBody() {
    const Result<size_t> bytes = wire::FrameBytes(
        std::span<const std::byte, wire::kFrameHeaderBytes>(in.data(), wire::kFrameHeaderBytes));
    if (!bytes.ok()) {
      Lose(bytes.status().message());
      return;
    }
    in.resize(*bytes);
    stream->Read(std::span(in).subspan(wire::kFrameHeaderBytes),
                 [self = shared_from_this()](const error_code& error) {
                   if (!self->lost.ok()) return;
                   if (error) {
                     self->Lose(error.message());
                     return;
                   }
                   self->Dispatch();
                 });
  }

  void Dispatch() {
    Result<wire::ControlReply> reply = wire::DecodeReply(in);
    if (!reply.ok()) {
      Lose(reply.status().message());
      return;
    }
    unanswered = 0;
    const auto it = waiting.find(reply->id);
    if (it != waiting.end()) {  // else: it missed its deadline
      const Done done = std::move(it->second);
      waiting.erase(it);
      if (const Status* error = std::get_if<Status>(&reply->body)) {
        done(*error);
      } else {
        done(std::move(reply));
      }
    }
    if (lost.ok()) ReadNext();
  }

  void Lose(const std::string& reason) {
    if (!lost.ok()) return;
    lost = Unavailable("cache server " + options.address + ": connection lost: " + reason +
                       "; is icecache-server still running" +
                       (options.tls_ca.empty() ? ", and without TLS (--tls-ca)?" : "?"));
    Shut();
    auto ended = std::move(waiting);
    waiting.clear();
    for (auto& [id, done] : ended) done(lost);
  }

  void Shut() {
    reactor.Cancel(renew_timer);
    if (stream != nullptr) stream->Close();
  }

  // A renewal answers for the server's life too. A tick after our own long computation counts one
  // miss only, and the replies that came meanwhile are read before the next tick.
  void RenewLater() {
    const Duration every = milliseconds(std::max<uint32_t>(hello.heartbeat_ms, 10));
    renew_timer = reactor.After(every, [this, every] {
      const int limit = std::max(kRenewalsUnansweredMax, static_cast<int>(kSilenceMin / every));
      if (unanswered >= limit) {
        Lose("no answer to " + std::to_string(unanswered) + " renewals of the lease");
        return;
      }
      ++unanswered;
      Send(wire::Renew{}, [self = shared_from_this()](const Result<wire::ControlReply>& reply) {
        if (!reply.ok() && self->lost.ok()) self->Lose("lease lost: " + reply.status().message());
      });
      RenewLater();
    });
  }

  bool Interrupted() const { return options.interrupted && options.interrupted(); }

  // Waits for `done`, the deadline or SIGINT.
  Status Wait(const std::function<bool()>& done, const std::string& what, Duration deadline) {
    reactor.RunUntil([&] { return done() || Interrupted(); }, reactor.clock().Now() + deadline);
    if (done()) return OkStatus();
    if (Interrupted()) return Cancelled("interrupted");
    return DeadlineExceeded("cache server " + options.address + " did not answer to " + what +
                            " within " + std::to_string(deadline / milliseconds(1)) + " ms");
  }

  Status ConnectSocket() {
    const auto refused = [this](const std::string& reason) {
      return Unavailable("cannot connect to the cache server at " + options.address + ": " +
                         reason + "; start it with `icecache-server` or name it with --server");
    };
    KV_ASSIGN_OR_RETURN(const HostPort where, ParseHostPort(options.address));
    error_code error;
    asio::ip::tcp::resolver resolver(reactor.io());
    const auto endpoints = resolver.resolve(where.host, std::to_string(where.port), error);
    if (error) return refused(error.message());
    std::shared_ptr<TlsContext> tls;
    if (!options.tls_ca.empty()) {
      KV_ASSIGN_OR_RETURN(tls, TlsContext::Client(options.tls_ca));
    }
    stream = std::make_unique<ControlStream>(asio::ip::tcp::socket(reactor.io()), std::move(tls));
    const auto result = std::make_shared<std::optional<error_code>>();
    asio::async_connect(
        stream->socket(), endpoints,
        [self = shared_from_this(), result](const error_code& e, const auto&) { *result = e; });
    KV_RETURN_IF_ERROR(Wait([&] { return result->has_value(); }, "connect", options.deadline));
    if (**result) return refused((**result).message());
    stream->socket().set_option(asio::ip::tcp::no_delay(true), error);
    result->reset();
    stream->HandshakeAsClient(
        where.host, [self = shared_from_this(), result](const error_code& e) { *result = e; });
    KV_RETURN_IF_ERROR(
        Wait([&] { return result->has_value(); }, "the TLS handshake", options.deadline));
    if (!**result) return OkStatus();
    return Unauthenticated("cache server " + options.address + ": TLS: " + (**result).message() +
                           "; does it serve TLS, with a certificate for " + where.host +
                           " that --tls-ca " + options.tls_ca + " vouches for?");
  }

  // One request and its reply. `Reply` is the alternative that is expected.
  template <typename Reply, typename Request>
  Result<Reply> Ask(Request request, const std::string& what) {
    return Ask<Reply>(std::move(request), what, options.deadline);
  }
  template <typename Reply, typename Request>
  Result<Reply> Ask(Request request, const std::string& what, Duration deadline) {
    const auto answer = std::make_shared<std::optional<Result<wire::ControlReply>>>();
    Send(std::move(request),
         [answer](Result<wire::ControlReply> r) { answer->emplace(std::move(r)); });
    KV_RETURN_IF_ERROR(Wait([&] { return answer->has_value(); }, what, deadline));
    Result<wire::ControlReply>& reply = **answer;
    if (!reply.ok()) return reply.status().WithContext(what);
    Reply* body = std::get_if<Reply>(&reply->body);
    if (body == nullptr) return Internal(what + ": the server's reply is of another kind");
    return std::move(*body);
  }

  Reactor& reactor;
  const ControlClientOptions options;
  std::unique_ptr<ControlStream> stream;
  wire::HelloReply hello;
  Status lost;
  uint64_t next_id = 1;
  std::map<uint64_t, Done> waiting;
  std::deque<std::vector<std::byte>> out;
  std::vector<std::byte> in;
  Reactor::TimerId renew_timer = 0;
  int unanswered = 0;
};

ControlClient::ControlClient(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}

ControlClient::~ControlClient() {
  impl_->lost = Cancelled("the control client was closed");
  impl_->Shut();
  impl_->waiting.clear();
}

Result<std::unique_ptr<ControlClient>> ControlClient::Connect(Reactor& reactor,
                                                              const ControlClientOptions& options) {
  std::unique_ptr<ControlClient> client(
      new ControlClient(std::make_shared<Impl>(reactor, options)));
  Impl& impl = *client->impl_;
  KV_RETURN_IF_ERROR(impl.ConnectSocket());
  impl.ReadNext();
  wire::Hello hello;
  hello.tenant = options.tenant;
  hello.secret = options.secret;
  hello.client = options.client;
  KV_ASSIGN_OR_RETURN(impl.hello, impl.Ask<wire::HelloReply>(hello, "hello"));
  if (impl.hello.protocol_version != hello.protocol_version) {
    return Unimplemented("cache server " + options.address + " speaks protocol " +
                         std::to_string(impl.hello.protocol_version) + ", this worker " +
                         std::to_string(hello.protocol_version) + "; use the same release");
  }
  // A server that listens on every interface is reached where the control plane was.
  KV_ASSIGN_OR_RETURN(const HostPort control, ParseHostPort(options.address));
  for (std::string& shard : impl.hello.shards) {
    KV_ASSIGN_OR_RETURN(HostPort address, ParseHostPort(shard));
    if (address.host == "0.0.0.0" || address.host == "::") address.host = control.host;
    shard = FormatHostPort(address);
  }
  impl.RenewLater();
  return client;
}

const wire::HelloReply& ControlClient::hello() const { return impl_->hello; }

Result<wire::Grant> ControlClient::Create(const wire::Create& request) {
  return impl_->Ask<wire::Grant>(request, "create context '" + request.name + "'");
}

Result<wire::Grant> ControlClient::Open(const std::string& name) {
  return impl_->Ask<wire::Grant>(wire::Open{name}, "open context '" + name + "'");
}

Result<wire::Grant> ControlClient::Fork(const wire::Fork& request) {
  return impl_->Ask<wire::Grant>(request, "fork context '" + request.parent + "'");
}

Status ControlClient::Seal(ContextId context, std::vector<PrefixKey> keys) {
  return impl_->Ask<wire::Done>(wire::Seal{context, std::move(keys)}, "seal context").status();
}

Result<std::vector<wire::PrefixCandidate>> ControlClient::MatchPrefix(
    const wire::MatchPrefix& request) {
  KV_ASSIGN_OR_RETURN(wire::Prefixes found, impl_->Ask<wire::Prefixes>(request, "match a prefix"));
  return std::move(found.candidates);
}

Status ControlClient::Publish(ContextId context, bool durable, bool shared) {
  // Gigabytes may have to reach the disk.
  const Duration deadline = durable ? Duration(limits::kPublishDeadline) : impl_->options.deadline;
  return impl_
      ->Ask<wire::Done>(wire::Publish{context, durable, shared}, "publish context", deadline)
      .status();
}

Status ControlClient::Release(ContextId context) {
  return impl_->Ask<wire::Done>(wire::Release{context}, "release context").status();
}

Status ControlClient::Drop(const std::string& name) {
  return impl_->Ask<wire::Done>(wire::Drop{name}, "drop context '" + name + "'").status();
}

Result<std::vector<wire::ContextInfo>> ControlClient::List() {
  KV_ASSIGN_OR_RETURN(wire::ContextList list,
                      impl_->Ask<wire::ContextList>(wire::List{}, "list contexts"));
  return std::move(list.contexts);
}

Result<wire::ContextInfo> ControlClient::Describe(const std::string& name) {
  const std::string what = "describe context '" + name + "'";
  KV_ASSIGN_OR_RETURN(wire::ContextList list,
                      impl_->Ask<wire::ContextList>(wire::Describe{name}, what));
  if (list.contexts.size() != 1) return Internal(what + ": the server named not exactly one");
  return std::move(list.contexts[0]);
}

Result<std::string> ControlClient::Inspect(wire::InspectTopic topic, const std::string& name) {
  KV_ASSIGN_OR_RETURN(wire::Report report,
                      impl_->Ask<wire::Report>(wire::Inspect{topic, name}, "report"));
  return std::move(report.json);
}

void ControlClient::ShareFrames(const wire::ShareFrames& request,
                                std::function<void(Result<std::vector<wire::SharedFrames>>)> done) {
  impl_->Send(request, [done = std::move(done)](Result<wire::ControlReply> reply) {
    if (!reply.ok()) return done(reply.status());
    auto* const list = std::get_if<wire::SharedFramesList>(&reply->body);
    if (list == nullptr) return done(Internal("share frames: the reply is of another kind"));
    done(std::move(list->others));
  });
}

Status ControlClient::Drain() { return impl_->Ask<wire::Done>(wire::Drain{}, "drain").status(); }

Status ControlClient::Health() const { return impl_->lost; }

}  // namespace icecache
