// For tests of the server: a control connection over a real socket, and the data plane with replies
// that own their bytes. `Turn` is called while waiting: a test that runs the server on its own
// thread turns its reactor there.
#pragma once

#include <arpa/inet.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "common/address.h"
#include "common/channel.h"
#include "common/log.h"
#include "common/wire/control_codec.h"
#include "common/wire/data_codec.h"

namespace icecache {

// Once per program; what goes wrong still shows.
inline void QuietLog() {
  static const bool once = [] {
    InitLogging(LogLevel::kError, LogFormat::kText, "test");
    return true;
  }();
  (void)once;
}

class ControlClient {
 public:
  using Turn = std::function<void()>;
  explicit ControlClient(const std::string& address, Turn turn = {}) : turn_(std::move(turn)) {
    const HostPort at = *ParseHostPort(address);
    sockaddr_in to{};
    to.sin_family = AF_INET;
    to.sin_port = htons(at.port);
    inet_pton(AF_INET, at.host.c_str(), &to.sin_addr);
    fd_ = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    connected_ = connect(fd_, reinterpret_cast<sockaddr*>(&to), sizeof to) == 0;
  }
  ~ControlClient() { Close(); }
  ControlClient(const ControlClient&) = delete;
  ControlClient& operator=(const ControlClient&) = delete;

  bool connected() const { return connected_; }
  void Close() {
    if (fd_ >= 0) close(fd_);
    fd_ = -1;
  }
  void SendBytes(std::span<const std::byte> bytes) {
    (void)!send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
  }
  uint64_t Send(decltype(wire::ControlRequest::body) body) {
    SendBytes(wire::EncodeFrame(wire::ControlRequest{++id_, std::move(body)}));
    return id_;
  }
  // Waits for the next reply. UNAVAILABLE when the server has closed the connection.
  Result<wire::ControlReply> Receive() {
    std::vector<std::byte> frame(wire::kFrameHeaderBytes);
    if (!Read(frame.data(), frame.size())) return Unavailable("closed");
    const Result<size_t> bytes =
        wire::FrameBytes(std::span(frame).first<wire::kFrameHeaderBytes>());
    if (!bytes.ok()) return bytes.status();
    frame.resize(*bytes);
    const size_t header = wire::kFrameHeaderBytes;
    if (!Read(frame.data() + header, frame.size() - header)) return Unavailable("closed");
    return wire::DecodeReply(frame);
  }
  // The reply of type T, or the server's error.
  template <typename T>
  Result<T> Call(decltype(wire::ControlRequest::body) body) {
    const uint64_t id = Send(std::move(body));
    KV_ASSIGN_OR_RETURN(wire::ControlReply reply, Receive());
    EXPECT_EQ(reply.id, id);
    if (const Status* error = std::get_if<Status>(&reply.body)) return *error;
    return std::get<T>(std::move(reply.body));
  }
  Result<wire::HelloReply> Hello(const std::string& tenant = "", const std::string& secret = "") {
    return Call<wire::HelloReply>(
        wire::Hello{.tenant = tenant, .secret = secret, .client = "test"});
  }
  Status Do(decltype(wire::ControlRequest::body) body) {
    const Result<wire::Done> done = Call<wire::Done>(std::move(body));
    return done.ok() ? OkStatus() : done.status();
  }
  // True when the server closes the connection before `limit`.
  bool WaitClosed() {
    std::byte byte;
    return !Read(&byte, 1);
  }

  // False: closed before that many bytes came.
  bool Read(std::byte* to, size_t count) {
    const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (count > 0) {
      if (turn_) turn_();
      pollfd ready{fd_, POLLIN, 0};
      if (poll(&ready, 1, turn_ ? 1 : 100) > 0) {
        const ssize_t n = recv(fd_, to, count, 0);
        if (n <= 0) return false;
        to += n;
        count -= static_cast<size_t>(n);
      }
      if (std::chrono::steady_clock::now() > limit) {
        ADD_FAILURE() << "no answer in 20 s";
        return false;
      }
    }
    return true;
  }

 private:
  Turn turn_;
  int fd_ = -1;
  bool connected_ = false;
  uint64_t id_ = 0;
};

// Body of GET `path`; empty when there is no answer.
inline std::string HttpGet(const std::string& address, const std::string& path) {
  ControlClient client(address);
  const std::string request =
      "GET " + path + " HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n";
  client.SendBytes(std::as_bytes(std::span(request)));
  std::string text;
  for (std::byte b; client.Read(&b, 1);) text += static_cast<char>(b);
  const size_t body = text.find("\r\n\r\n");
  return body == std::string::npos ? "" : text.substr(body + 4);
}

// A reply that outlives its callback.
struct OwnedMessage {
  uint16_t kind = 0;
  uint16_t flags = 0;
  uint64_t id = 0;
  std::vector<std::byte> meta, body;
  InMessage view() const { return {kind, flags, id, meta, body}; }
};

// One data-plane connection, used synchronously.
class DataClient {
 public:
  // The reactor is turned while a call waits.
  DataClient(Reactor& reactor, Transport& transport, const std::string& address)
      : reactor_(reactor) {
    Result<std::unique_ptr<Endpoint>> endpoint = transport.Connect(address);
    EXPECT_TRUE(endpoint.ok()) << endpoint.status().ToString();
    ChannelOptions options;
    options.heartbeat_misses =
        50;  // the test's thread waits in control calls without turning this reactor
    channel_ = std::make_unique<Channel>(reactor, std::move(endpoint).value(), options);
  }
  Result<OwnedMessage> Call(OutMessage request) {
    std::optional<Result<OwnedMessage>> answer;
    channel_->Call(std::move(request), std::chrono::seconds(20), [&](Result<InMessage> reply) {
      if (!reply.ok()) {
        answer.emplace(reply.status());
        return;
      }
      OwnedMessage owned{
          .kind = reply->kind, .flags = reply->flags, .id = reply->id, .meta = {}, .body = {}};
      owned.meta.assign(reply->meta.begin(), reply->meta.end());
      owned.body.assign(reply->body.begin(), reply->body.end());
      answer.emplace(std::move(owned));
    });
    reactor_.RunUntil([&] { return answer.has_value(); },
                      reactor_.clock().Now() + std::chrono::seconds(30));
    if (!answer) return DeadlineExceeded("the channel never answered");
    return std::move(*answer);
  }
  Status Attach(const std::vector<std::byte>& ticket) {
    OutMessage request;
    wire::Encode(wire::AttachRequest{.ticket = ticket}, &request);
    const Result<OwnedMessage> reply = Call(std::move(request));
    if (!reply.ok()) return reply.status();
    const Result<wire::AttachReply> attached = wire::DecodeAttachReply(reply->view());
    return attached.ok() ? OkStatus() : attached.status();
  }
  Channel& channel() { return *channel_; }

 private:
  Reactor& reactor_;
  std::unique_ptr<Channel> channel_;
};

}  // namespace icecache
