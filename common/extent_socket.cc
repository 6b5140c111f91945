#include "common/extent_socket.h"

#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

#include "common/limits.h"

namespace icecache {
namespace {

constexpr uint32_t kRequestMark = 0x69636571;  // "qeci"
constexpr uint32_t kReplyMark = 0x69636572;    // "reci"
constexpr int kBacklog = 64;

struct RequestHeader {
  uint32_t mark = kRequestMark;
  uint32_t ticket_bytes = 0;
  uint32_t serials = 0;
  uint32_t unused = 0;
};
struct ReplyHeader {
  uint32_t mark = kReplyMark;
  uint32_t code = 0;  // StatusCode
  uint32_t serials = 0;
  uint32_t unused = 0;
};

constexpr size_t kRequestBytesMax = sizeof(RequestHeader) + limits::kTicketBytesMax +
                                    limits::kExtentsPerReplyMax * sizeof(uint64_t);
constexpr size_t kReplyBytesMax =
    sizeof(ReplyHeader) + limits::kExtentsPerReplyMax * sizeof(uint64_t);

std::string ErrnoText() { return std::strerror(errno); }

// An abstract address: its path begins with a zero byte and is no file.
socklen_t AddressOf(const std::string& name, sockaddr_un* address) {
  static_assert(limits::kExtentSocketNameBytesMax < sizeof(address->sun_path));
  KV_CHECK(!name.empty() && name.size() <= limits::kExtentSocketNameBytesMax);
  *address = {};
  address->sun_family = AF_UNIX;
  std::memcpy(address->sun_path + 1, name.data(), name.size());
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
}

// One whole message or nothing.
Status SendWhole(int fd, msghdr* message, size_t bytes) {
  const ssize_t sent = ::sendmsg(fd, message, MSG_NOSIGNAL | MSG_DONTWAIT);
  if (sent == static_cast<ssize_t>(bytes)) return OkStatus();
  return Unavailable("extent socket: " + (sent < 0 ? ErrnoText() : "a message was cut"));
}

std::vector<OwnedFd> TakeDescriptors(msghdr* message) {
  std::vector<OwnedFd> fds;
  for (cmsghdr* c = CMSG_FIRSTHDR(message); c != nullptr; c = CMSG_NXTHDR(message, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
      fds.emplace_back(fd);
    }
  }
  return fds;
}

}  // namespace

OwnedFd& OwnedFd::operator=(OwnedFd&& other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}

OwnedFd::~OwnedFd() {
  if (fd_ >= 0) ::close(fd_);
}

int OwnedFd::Release() { return std::exchange(fd_, -1); }

std::string FreshExtentSocketName() {
  std::array<unsigned char, 16> random{};
  KV_CHECK(::getrandom(random.data(), random.size(), 0) == static_cast<ssize_t>(random.size()));
  std::string name = "icecache-";
  for (const unsigned char byte : random) {
    char text[3];
    std::snprintf(text, sizeof(text), "%02x", byte);
    name += text;
  }
  return name;
}

Result<OwnedFd> ListenExtents(const std::string& name) {
  OwnedFd fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  sockaddr_un address;
  const socklen_t length = AddressOf(name, &address);
  if (!fd.valid() || ::bind(fd.get(), reinterpret_cast<sockaddr*>(&address), length) != 0 ||
      ::listen(fd.get(), kBacklog) != 0) {
    return Unavailable("extent socket '@" + name + "': " + ErrnoText());
  }
  return fd;
}

OwnedFd AcceptExtents(int listener) {
  return OwnedFd(::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
}

Result<OwnedFd> ConnectExtents(const std::string& name) {
  if (name.empty() || name.size() > limits::kExtentSocketNameBytesMax) {
    return InvalidArgument("extent socket name of " + std::to_string(name.size()) + " bytes");
  }
  OwnedFd fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  sockaddr_un address;
  const socklen_t length = AddressOf(name, &address);
  if (!fd.valid() || ::connect(fd.get(), reinterpret_cast<sockaddr*>(&address), length) != 0) {
    return Unavailable("extent socket '@" + name + "': " + ErrnoText());
  }
  return fd;
}

Status SendExtentRequest(int fd, const ExtentRequest& request) {
  KV_CHECK(request.ticket.size() <= limits::kTicketBytesMax &&
           request.serials.size() <= limits::kExtentsPerReplyMax);
  RequestHeader header;
  header.ticket_bytes = static_cast<uint32_t>(request.ticket.size());
  header.serials = static_cast<uint32_t>(request.serials.size());
  const size_t serial_bytes = request.serials.size() * sizeof(uint64_t);
  iovec parts[3] = {{&header, sizeof(header)},
                    {const_cast<std::byte*>(request.ticket.data()), request.ticket.size()},
                    {const_cast<uint64_t*>(request.serials.data()), serial_bytes}};
  msghdr message{};
  message.msg_iov = parts;
  message.msg_iovlen = 3;
  return SendWhole(fd, &message, sizeof(header) + request.ticket.size() + serial_bytes);
}

Result<ExtentRequest> ReceiveExtentRequest(int fd) {
  std::array<std::byte, kRequestBytesMax + 1> bytes;
  const ssize_t got = ::recv(fd, bytes.data(), bytes.size(), MSG_DONTWAIT);
  if (got <= 0) return Unavailable("extent socket: " + (got == 0 ? "closed" : ErrnoText()));
  RequestHeader header;
  const auto size = static_cast<size_t>(got);
  if (size < sizeof(header)) return InvalidArgument("extent request: too short");
  std::memcpy(&header, bytes.data(), sizeof(header));
  if (header.mark != kRequestMark || header.ticket_bytes > limits::kTicketBytesMax ||
      header.serials > limits::kExtentsPerReplyMax ||
      size != sizeof(header) + header.ticket_bytes + header.serials * sizeof(uint64_t)) {
    return InvalidArgument("extent request: " + std::to_string(size) +
                           " bytes that are not a request");
  }
  ExtentRequest request;
  const std::byte* at = bytes.data() + sizeof(header);
  request.ticket.assign(at, at + header.ticket_bytes);
  request.serials.resize(header.serials);
  if (header.serials > 0) {
    std::memcpy(request.serials.data(), at + header.ticket_bytes, header.serials * sizeof(uint64_t));
  }
  return request;
}

Status SendExtents(int fd, StatusCode code, std::span<const uint64_t> serials,
                   std::span<const int> fds) {
  KV_CHECK(serials.size() == fds.size() && fds.size() <= limits::kExtentsPerReplyMax);
  ReplyHeader header;
  header.code = static_cast<uint32_t>(code);
  header.serials = static_cast<uint32_t>(serials.size());
  iovec parts[2] = {{&header, sizeof(header)},
                    {const_cast<uint64_t*>(serials.data()), serials.size_bytes()}};
  msghdr message{};
  message.msg_iov = parts;
  message.msg_iovlen = 2;
  alignas(cmsghdr) std::array<char, CMSG_SPACE(limits::kExtentsPerReplyMax * sizeof(int))>
      control{};
  if (!fds.empty()) {
    message.msg_control = control.data();
    message.msg_controllen = CMSG_SPACE(fds.size_bytes());
    cmsghdr* rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(fds.size_bytes());
    std::memcpy(CMSG_DATA(rights), fds.data(), fds.size_bytes());
  }
  return SendWhole(fd, &message, sizeof(header) + serials.size_bytes());
}

Result<std::vector<LentExtent>> ReceiveExtents(int fd, Duration at_most) {
  pollfd wait{fd, POLLIN, 0};
  const auto millis = std::chrono::ceil<std::chrono::milliseconds>(at_most).count();
  if (::poll(&wait, 1, static_cast<int>(millis)) <= 0) {
    return DeadlineExceeded("extent socket: no answer within " + std::to_string(millis) + " ms");
  }
  std::array<std::byte, kReplyBytesMax + 1> bytes;
  alignas(cmsghdr) std::array<char, CMSG_SPACE(limits::kExtentsPerReplyMax * sizeof(int))>
      control{};
  iovec part{bytes.data(), bytes.size()};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  const ssize_t got = ::recvmsg(fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (got <= 0) return Unavailable("extent socket: " + (got == 0 ? "closed" : ErrnoText()));
  std::vector<OwnedFd> fds = TakeDescriptors(&message);
  ReplyHeader header;
  const auto size = static_cast<size_t>(got);
  if (size < sizeof(header)) return DataLoss("extent reply: too short");
  std::memcpy(&header, bytes.data(), sizeof(header));
  if (header.mark != kReplyMark || header.serials != fds.size() ||
      size != sizeof(header) + header.serials * sizeof(uint64_t) ||
      header.code > static_cast<uint32_t>(StatusCode::kInternal)) {
    return DataLoss("extent reply: " + std::to_string(size) + " bytes and " +
                    std::to_string(fds.size()) + " descriptors that are not a reply");
  }
  if (header.code != 0) {
    return Status(static_cast<StatusCode>(header.code), "the server lends no memory");
  }
  std::vector<LentExtent> lent(fds.size());
  for (size_t i = 0; i < fds.size(); ++i) {
    std::memcpy(&lent[i].serial, bytes.data() + sizeof(header) + i * sizeof(uint64_t),
                sizeof(uint64_t));
    lent[i].fd = std::move(fds[i]);
  }
  return lent;
}

}  // namespace icecache
