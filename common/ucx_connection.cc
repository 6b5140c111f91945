#include "common/ucx_connection.h"

#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "common/limits.h"
#include "common/ucx_environment.h"

namespace icecache {
namespace {

static_assert(std::endian::native == std::endian::little,
              "MessageHeader travels as it lies in memory");

// Up to this size a message is gathered by us and sent as one part: UCX's path for lists of parts
// costs more than the copy.
constexpr uint64_t kGatherBytesMax = 8192;
// Smaller parts (positions of a page) are copied next to each other.
constexpr size_t kSmallPartBytes = 512;
constexpr size_t kSpareSendsMax = 64;
constexpr size_t kSpareStagingBytesMax = 256 << 10;

std::string UcxReason(ucs_status_t status) { return ucs_status_string(status); }

}  // namespace

// One message on its way out. UCX reads header, parts and what they point to until it calls back.
struct UcxSend {
  void Prepare(OutMessage m);
  void Clear();
  static void Callback(void* request, ucs_status_t status, void* user) {
    ucp_request_free(request);
    auto* send = static_cast<UcxSend*>(user);
    send->connection->SendCompleted(send, status);
  }

  UcxConnection* connection = nullptr;
  MessageHeader header{};
  OutMessage message;
  std::vector<std::byte> staging;
  std::vector<ucp_dt_iov_t> parts;
  uint64_t bytes = 0;  // of data, without the header
  bool complete = false;

 private:
  void AddPart(const std::byte* data, size_t size);
};

// One large message on its way in.
struct UcxReceive {
  static void Callback(void* request, ucs_status_t status, size_t, void* user) {
    ucp_request_free(request);
    auto* receive = static_cast<UcxReceive*>(user);
    receive->connection->ReceiveCompleted(receive, status);
  }
  UcxConnection* connection = nullptr;
  UcxReceived received;
};
// ---- values
// ---------------------------------------------------------------------------------------

UcxReceived& UcxReceived::operator=(UcxReceived&& other) noexcept {
  std::swap(header, other.header);
  std::swap(data, other.data);
  std::swap(data_bytes, other.data_bytes);
  std::swap(buffer, other.buffer);
  std::swap(worker, other.worker);
  return *this;
}

UcxReceived::~UcxReceived() {
  if (worker != nullptr) ucp_am_data_release(worker, const_cast<std::byte*>(data));
}

UcxCore::UcxCore() : buffers(limits::kReceiveCacheBytesMax) {}
UcxCore::~UcxCore() = default;

void UcxSend::AddPart(const std::byte* data, size_t size) {
  if (!parts.empty()) {
    ucp_dt_iov_t& last = parts.back();
    if (static_cast<const std::byte*>(last.buffer) + last.length == data) {
      last.length += size;
      return;
    }
  }
  parts.push_back({const_cast<std::byte*>(data), size});
}

void UcxSend::Prepare(OutMessage m) {
  KV_CHECK(m.meta.size() <= limits::kDataMetaBytesMax && m.body.size() <= limits::kBodyPartsMax);
  message = std::move(m);
  uint64_t body_bytes = 0, small_bytes = 0;
  for (const auto& part : message.body) {
    body_bytes += part.size();
    if (part.size() < kSmallPartBytes) small_bytes += part.size();
  }
  KV_CHECK(body_bytes <= limits::kDataBodyBytesMax);
  header = {kMessageMagic,
            message.kind,
            message.flags,
            message.id,
            0,
            static_cast<uint32_t>(message.meta.size()),
            static_cast<uint32_t>(body_bytes),
            0};
  message.meta.resize(PaddedMetaBytes(message.meta.size()));
  bytes = message.meta.size() + body_bytes;

  const bool gather = bytes <= kGatherBytesMax;
  staging.resize(gather ? bytes : small_bytes);  // before any pointer into it is taken
  std::byte* free_staging = staging.data();
  const auto add = [&](std::span<const std::byte> part) {
    if (part.empty()) return;
    if (!gather && part.size() >= kSmallPartBytes) return AddPart(part.data(), part.size());
    std::memcpy(free_staging, part.data(), part.size());
    AddPart(free_staging, part.size());
    free_staging += part.size();
  };
  if (gather) {
    add(message.meta);
  } else if (!message.meta.empty()) {
    AddPart(message.meta.data(), message.meta.size());
  }
  for (const auto& part : message.body) add(part);
  if (gather) message.body.clear();
}

void UcxSend::Clear() {
  message = {};
  parts.clear();
  if (staging.capacity() > kSpareStagingBytesMax) staging = {};
  complete = false;
}

// ---- opening and closing
// --------------------------------------------------------------------------

UcxConnection::UcxConnection(UcxCore& core, std::string peer)
    : core_(&core), peer_(std::move(peer)) {}

UcxConnection::~UcxConnection() = default;

Status UcxConnection::Open(Role role, ucp_ep_params_t params) {
  params.field_mask |= UCP_EP_PARAM_FIELD_ERR_HANDLER | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE;
  params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
  params.err_handler.arg = this;
  params.err_handler.cb = [](void* self, ucp_ep_h, ucs_status_t status) {
    auto* connection = static_cast<UcxConnection*>(self);
    connection->Fail(
        Unavailable("connection to " + connection->peer_ + " lost: " + UcxReason(status)));
  };
  const ucs_status_t status = ucp_ep_create(core_->worker, &params, &endpoint_);
  if (status != UCS_OK) {
    endpoint_ = nullptr;
    ended_ = true;
    return Unavailable("cannot connect to " + peer_ + ": " + UcxReason(status));
  }
  core_->by_endpoint.emplace(endpoint_, this);
  core_->connections.emplace(this, shared_from_this());
  if (role == Role::kClient) SayHello();
  return OkStatus();
}

void UcxConnection::SetHandlers(std::function<void(const InMessage&)> on_message,
                                std::function<void(Status)> on_closed) {
  if (ended_) return;
  handlers_ = std::make_shared<Handlers>(Handlers{std::move(on_message), std::move(on_closed)});
}

void UcxConnection::NeedAttention() {
  if (core_ == nullptr || wants_attention_) return;
  wants_attention_ = true;
  core_->attention.push_back(shared_from_this());
}

void UcxConnection::Fail(Status status) {
  if (ended_ || !failure_.ok()) return;
  failure_ = std::move(status);
  NeedAttention();
}

void UcxConnection::Close() {
  if (ended_) return;
  End();
}

// Step 1 -> 2 of the lifecycle.
void UcxConnection::End() {
  ended_ = true;
  handlers_ = nullptr;
  const auto dropped = std::move(queue_);
  queue_.clear();
  for (const auto& send : dropped) bytes_queued_ -= send->bytes;
  early_.clear();
  CloseEndpoint();
  NeedAttention();  // to be removed when finished
}

void UcxConnection::CloseEndpoint() {
  if (endpoint_ == nullptr) return;
  core_->by_endpoint.erase(endpoint_);
  const ucp_ep_h endpoint = std::exchange(endpoint_, nullptr);
  ucp_request_param_t param{};
  param.op_attr_mask =
      UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.flags = UCP_EP_CLOSE_FLAG_FORCE;  // a flush never ends when the peer is stopped
  param.user_data = this;
  param.cb.send = [](void* request, ucs_status_t, void* self) {
    ucp_request_free(request);
    auto* connection = static_cast<UcxConnection*>(self);
    connection->closing_ = false;
    connection->NeedAttention();
  };
  closing_ = true;
  // NULL or an error (the peer was faster): closed.
  if (!UCS_PTR_IS_PTR(ucp_ep_close_nbx(endpoint, &param))) closing_ = false;
}

void UcxConnection::Tend() {
  wants_attention_ = false;
  if (ended_) return;
  if (failure_.ok()) {
    if (established_ && !said_hello_) SayHello();
    return PumpQueue();
  }
  const std::shared_ptr<Handlers> handlers = handlers_;
  End();
  if (handlers != nullptr && handlers->on_closed) handlers->on_closed(failure_);
}

bool UcxConnection::Finished() const {
  return ended_ && endpoint_ == nullptr && !closing_ && incomplete_sends_ == 0 &&
         receiving_.empty();
}

void UcxConnection::Orphan() {
  core_ = nullptr;
  ended_ = true;
  handlers_ = nullptr;
  queue_.clear();
  in_flight_.clear();
  receiving_.clear();
  early_.clear();
  bytes_queued_ = 0;
}

// ---- out
// ------------------------------------------------------------------------------------------

void UcxConnection::Send(OutMessage message) {
  if (ended_ || !failure_.ok()) return;
  auto send = TakeSend();
  send->Prepare(std::move(message));
  bytes_queued_ += send->bytes;
  queue_.push_back(std::move(send));
  PumpQueue();
}

std::unique_ptr<UcxSend> UcxConnection::TakeSend() {
  std::unique_ptr<UcxSend> send;
  if (core_->spare_sends.empty()) {
    send = std::make_unique<UcxSend>();
  } else {
    send = std::move(core_->spare_sends.back());
    core_->spare_sends.pop_back();
  }
  send->connection = this;
  return send;
}

void UcxConnection::SayHello() {
  said_hello_ = true;
  auto send = TakeSend();
  send->Prepare({});
  send->header.control = kControlHello;
  Submit(std::move(send));
}

void UcxConnection::HearHello() {
  if (established_) return Fail(DataLoss("malformed message from " + peer_ + ": a second hello"));
  established_ = true;
  NeedAttention();  // answers, and sends what waits
}

// Bounds what the peer may have to hold for order's sake, in messages and bytes.
bool UcxConnection::WindowOpen(const UcxSend& send) const {
  if (in_flight_.empty()) return true;
  return in_flight_.size() < limits::kSendWindowMessages &&
         in_flight_bytes_ + send.bytes <= limits::kDataBodyBytesMax;
}

void UcxConnection::PumpQueue() {
  while (established_ && said_hello_ && !ended_ && failure_.ok() && !queue_.empty() &&
         WindowOpen(*queue_.front())) {
    auto send = std::move(queue_.front());
    queue_.pop_front();
    Submit(std::move(send));
  }
}

void UcxConnection::Submit(std::unique_ptr<UcxSend> owned) {
  UcxSend* send = owned.get();
  if (send->header.control == kControlNone) send->header.sequence = send_sequence_++;
  bytes_sent_ += send->bytes;
  in_flight_bytes_ += send->bytes;
  ++incomplete_sends_;
  ++core_->incomplete_sends;
  in_flight_.push_back(std::move(owned));

  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA |
                       UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FIELD_MEMORY_TYPE;
  param.flags = UCP_AM_SEND_FLAG_REPLY;  // tells the peer on which endpoint the message has come
  param.memory_type = UCS_MEMORY_TYPE_HOST;
  param.user_data = send;
  param.cb.send = &UcxSend::Callback;
  const void* data = nullptr;
  size_t count = 0;
  if (send->parts.size() == 1) {
    data = send->parts[0].buffer;
    count = send->parts[0].length;
  } else if (send->parts.size() > 1) {
    param.op_attr_mask |= UCP_OP_ATTR_FIELD_DATATYPE;
    param.datatype = ucp_dt_make_iov();
    data = send->parts.data();
    count = send->parts.size();
  }
  const ucs_status_ptr_t result = ucp_am_send_nbx(endpoint_, kUcxMessageId, &send->header,
                                                  sizeof send->header, data, count, &param);
  if (UCS_PTR_IS_PTR(result)) return;  // the callback follows
  SendCompleted(send, result == nullptr ? UCS_OK : UCS_PTR_STATUS(result));
}

void UcxConnection::SendCompleted(UcxSend* send, ucs_status_t status) {
  send->complete = true;
  --incomplete_sends_;
  --core_->incomplete_sends;
  bytes_queued_ -= send->bytes;
  // Freed by Progress(): what the pin's destructor does must not happen inside a callback.
  if (send->message.pin != nullptr) core_->released_pins.push_back(std::move(send->message.pin));
  send->message = {};
  if (status != UCS_OK) {
    Fail(Unavailable("connection to " + peer_ + " lost while sending: " + UcxReason(status)));
  }
  while (!in_flight_.empty() && in_flight_.front()->complete) {
    auto done = std::move(in_flight_.front());
    in_flight_.pop_front();
    in_flight_bytes_ -= done->bytes;
    done->Clear();
    if (core_->spare_sends.size() < kSpareSendsMax) core_->spare_sends.push_back(std::move(done));
  }
  if (ended_ || !queue_.empty()) NeedAttention();
}

// ---- in
// -------------------------------------------------------------------------------------------

ucs_status_t UcxConnection::Receive(const void* header_data, size_t header_bytes, void* data,
                                    size_t data_bytes, uint64_t attributes) {
  const bool rendezvous = (attributes & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0;
  // To UCX an error means: the sender's rendezvous fails. Eager data is dropped by UCS_OK.
  const ucs_status_t refuse = rendezvous ? UCS_ERR_CANCELED : UCS_OK;
  if (ended_ || !failure_.ok()) return refuse;
  MessageHeader header;
  if (header_bytes != sizeof header) {
    Fail(DataLoss("malformed message from " + peer_ + ": header of " +
                  std::to_string(header_bytes) + " bytes, expected " +
                  std::to_string(sizeof header)));
    return refuse;
  }
  std::memcpy(&header, header_data, sizeof header);  // it comes unaligned
  if (Status status = CheckMessageHeader(header, data_bytes); !status.ok()) {
    Fail(std::move(status));
    return refuse;
  }
  if (header.control == kControlHello) {
    HearHello();
    return refuse;
  }
  const uint32_t ahead = header.sequence - static_cast<uint32_t>(receive_sequence_);
  if (ahead > limits::kSendWindowMessages ||
      held_bytes_ + data_bytes > limits::kReceiveHeldBytesMax) {
    Fail(DataLoss("malformed message from " + peer_ + ": sequence number " +
                  std::to_string(header.sequence) + " is " + std::to_string(ahead) + " ahead"));
    return refuse;
  }
  if (rendezvous) return ReceiveRendezvous(header, data, data_bytes);
  return ReceiveEager(header, data, data_bytes, (attributes & UCP_AM_RECV_ATTR_FLAG_DATA) != 0);
}

ucs_status_t UcxConnection::ReceiveEager(const MessageHeader& header, void* data, size_t bytes,
                                         bool keep) {
  UcxReceived received;
  received.header = header;
  received.data_bytes = bytes;
  keep = keep && bytes > 0;
  if (keep) {
    received.data = static_cast<const std::byte*>(data);
    received.worker = core_->worker;
  } else if (bytes > 0) {
    received.buffer = core_->buffers.Take(bytes);
    std::memcpy(received.buffer.data(), data, bytes);
    received.data = received.buffer.data();
  }
  held_bytes_ += bytes;
  Enqueue(std::move(received));
  return keep ? UCS_INPROGRESS : UCS_OK;
}

ucs_status_t UcxConnection::ReceiveRendezvous(const MessageHeader& header, void* descriptor,
                                              size_t bytes) {
  auto owned = std::make_unique<UcxReceive>();
  UcxReceive* receive = owned.get();
  receive->connection = this;
  receive->received.header = header;
  receive->received.data_bytes = bytes;
  receive->received.buffer = core_->buffers.Take(bytes);
  receive->received.data = receive->received.buffer.data();
  receiving_.emplace(receive, std::move(owned));
  held_bytes_ += bytes;

  ucp_request_param_t param{};
  param.op_attr_mask =
      UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMORY_TYPE;
  param.memory_type = UCS_MEMORY_TYPE_HOST;
  param.user_data = receive;
  param.cb.recv_am = &UcxReceive::Callback;
  const ucs_status_ptr_t result = ucp_am_recv_data_nbx(
      core_->worker, descriptor, receive->received.buffer.data(), bytes, &param);
  if (UCS_PTR_IS_PTR(result)) return UCS_INPROGRESS;
  ReceiveCompleted(receive, result == nullptr ? UCS_OK : UCS_PTR_STATUS(result));
  return UCS_OK;
}

void UcxConnection::ReceiveCompleted(UcxReceive* receive, ucs_status_t status) {
  const auto node = receiving_.extract(receive);
  UcxReceived received = std::move(receive->received);
  if (ended_) return NeedAttention();  // perhaps this was the last one
  if (status != UCS_OK) {
    held_bytes_ -= received.data_bytes;
    return Fail(
        Unavailable("connection to " + peer_ + " lost while receiving: " + UcxReason(status)));
  }
  Enqueue(std::move(received));
}

void UcxConnection::Enqueue(UcxReceived received) {
  const uint32_t ahead = received.header.sequence - static_cast<uint32_t>(receive_sequence_);
  if (ahead > 0) {
    if (!early_.emplace(receive_sequence_ + ahead, std::move(received)).second) {
      Fail(DataLoss("malformed message from " + peer_ + ": a sequence number came twice"));
    }
    return;
  }
  const auto self = shared_from_this();
  core_->ready.emplace_back(self, std::move(received));
  ++receive_sequence_;
  while (!early_.empty() && early_.begin()->first == receive_sequence_) {
    core_->ready.emplace_back(self, std::move(early_.begin()->second));
    early_.erase(early_.begin());
    ++receive_sequence_;
  }
}

void UcxConnection::Deliver(const UcxReceived& received) {
  held_bytes_ -= received.data_bytes;
  const std::shared_ptr<Handlers> handlers = handlers_;
  if (ended_ || handlers == nullptr || !handlers->on_message) return;
  const MessageHeader& header = received.header;
  InMessage message{header.kind, header.flags, header.id, {}, {}};
  const std::byte* meta = received.data;
  if (header.meta_bytes > 0 && reinterpret_cast<uintptr_t>(meta) % 8 != 0) {
    core_->aligned_meta.resize(PaddedMetaBytes(header.meta_bytes) / 8);
    std::memcpy(core_->aligned_meta.data(), meta, header.meta_bytes);
    meta = reinterpret_cast<const std::byte*>(core_->aligned_meta.data());
  }
  message.meta = {meta, header.meta_bytes};
  if (header.body_bytes > 0) {
    message.body = {received.data + PaddedMetaBytes(header.meta_bytes), header.body_bytes};
  }
  handlers->on_message(message);
}

std::string UcxConnection::Describe() const {
  if (endpoint_ == nullptr) return peer_ + " (closed)";
  char* text = nullptr;
  size_t length = 0;
  FILE* file = ::open_memstream(&text, &length);
  if (file == nullptr) return peer_;
  ucp_ep_print_info(endpoint_, file);
  std::fclose(file);
  const std::string lanes = UcxLanes({text, length});
  std::free(text);
  return lanes.empty() ? peer_ + " (connecting)" : peer_ + " over " + lanes;
}

}  // namespace icecache
