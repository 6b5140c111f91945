#include "common/ucx_connection.h"

#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "common/file_limit.h"
#include "common/limits.h"
#include "common/ucx_environment.h"

namespace icecache {
namespace {

static_assert(std::endian::native == std::endian::little,
              "MessageHeader travels as it lies in memory");

constexpr size_t kSpareSendsMax = 64;
// One turn makes UCX progress at most this often before messages are delivered.
constexpr int kProgressPerTurn = 4;

std::string UcxReason(ucs_status_t status) {
  const std::string reason = ucs_status_string(status);
  if (status != UCS_ERR_REJECTED) return reason;
  return reason + "; it has no room for another connection, and its log says why";
}

}  // namespace

UcxCore::UcxCore(Reactor& r) : reactor(r), buffers(limits::kReceiveCacheBytesMax) {}
UcxCore::~UcxCore() = default;

Status OpenUcxWorker(const UcxCore& core, ucp_worker_h* worker, int* event_fd) {
  // UCX takes either shortage badly: it dies of SIGBUS, or leaves a worker that nothing wakes.
  if (core.shared_memory) KV_RETURN_IF_ERROR(CheckSharedMemory(kUcxSharedBytesPerWorker));
  KV_RETURN_IF_ERROR(CheckFileDescriptors(kUcxFilesPerWorker));
  ucp_worker_params_t params{};
  params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  params.thread_mode = UCS_THREAD_MODE_SINGLE;
  ucs_status_t status = ucp_worker_create(core.context, &params, worker);
  if (status == UCS_OK) {
    status = ucp_worker_get_efd(*worker, event_fd);
    if (status == UCS_OK) return OkStatus();
    ucp_worker_destroy(std::exchange(*worker, nullptr));
  }
  *worker = nullptr;
  return Unavailable("UCX cannot make a worker: " + UcxReason(status) +
                     "; each takes 12 file descriptors (ulimit -n) and 4 MiB of /dev/shm");
}

// ---- opening and closing
// --------------------------------------------------------------------------

UcxConnection::UcxConnection(UcxCore& core, std::string peer)
    : core_(&core), peer_(std::move(peer)) {}

UcxConnection::~UcxConnection() {
  if (worker_ != nullptr) ucp_worker_destroy(worker_);  // it was never opened
}

Status UcxConnection::OpenWorker() {
  KV_RETURN_IF_ERROR(OpenUcxWorker(*core_, &worker_, &event_fd_));
  ucp_am_handler_param_t handler{};
  handler.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
                       UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
  handler.flags = UCP_AM_FLAG_WHOLE_MSG;
  handler.cb = &UcxConnection::OnMessage;
  handler.arg = this;
  // Under every id, although only kUcxMessageId is sent: UCX 1.13 crashes when messages of several
  // fragments come under an id without a handler, so a peer's nonsense would end the process. Costs
  // 1 ms and 1.5 MiB.
  for (unsigned id = 0; id <= UINT16_MAX; ++id) {
    handler.id = id;
    const ucs_status_t status = ucp_worker_set_am_recv_handler(worker_, &handler);
    if (status != UCS_OK) return Unavailable("setting a message handler: " + UcxReason(status));
  }
  return OkStatus();
}

Status UcxConnection::Open(Role role, ucp_ep_params_t params) {
  params.field_mask |= UCP_EP_PARAM_FIELD_ERR_HANDLER | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE;
  params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
  params.err_handler.arg = this;
  params.err_handler.cb = [](void* self, ucp_ep_h, ucs_status_t status) {
    auto* connection = static_cast<UcxConnection*>(self);
    connection->Fail(
        Unavailable("connection to " + connection->peer_ + " lost: " + UcxReason(status)));
  };
  const ucs_status_t status = ucp_ep_create(worker_, &params, &endpoint_);
  if (status != UCS_OK) {
    endpoint_ = nullptr;
    return Unavailable("cannot connect to " + peer_ + ": " + UcxReason(status));
  }
  core_->connections.emplace(this, shared_from_this());
  core_->reactor.Attach(this);
  if (role == Role::kClient) SayHello();
  return OkStatus();
}

void UcxConnection::SetHandlers(std::function<void(const InMessage&)> on_message,
                                std::function<void(Status)> on_closed) {
  if (ended_) return;
  handlers_ = std::make_shared<Handlers>(Handlers{std::move(on_message), std::move(on_closed)});
}

void UcxConnection::Fail(Status status) {
  if (ended_ || !failure_.ok()) return;
  failure_ = std::move(status);
  wants_attention_ = true;
}

// ---- the loop
// -------------------------------------------------------------------------------------

bool UcxConnection::Progress() {
  bool any = false;
  // Stops at the first message: another look at the sockets (a system call) would delay it.
  for (int i = 0; i < kProgressPerTurn && ready_.empty(); ++i) {
    if (ucp_worker_progress(worker_) == 0) break;
    any = true;
  }
  wants_attention_ |= reads_.any_finished();
  if (ready_.empty() && !wants_attention_ && released_pins_.empty() && !ended_) return any;
  const auto self = shared_from_this();
  KV_CHECK(!core_->delivering);
  core_->delivering = true;
  UcxCore& core = *core_;
  // What arrives while handlers run is delivered in the next turn.
  for (size_t n = ready_.size(); n > 0 && !ready_.empty(); --n) {
    UcxReceived received = std::move(ready_.front());
    ready_.pop_front();
    Deliver(std::move(received));
  }
  Tend();
  std::exchange(released_pins_, {}).clear();
  core.delivering = false;
  TendEnd();
  return true;
}

bool UcxConnection::Arm() {
  if (!ready_.empty() || wants_attention_ || !released_pins_.empty() || reads_.any_finished())
    return false;
  // Anything but OK and BUSY leaves the reactor's safety timer to pump.
  return ucp_worker_arm(worker_) != UCS_ERR_BUSY;
}

void UcxConnection::Tend() {
  wants_attention_ = false;
  if (!ended_ && !failure_.ok()) reads_.FailAll(failure_);
  FinishReads();
  if (ended_) return;
  if (failure_.ok()) {
    if (established_ && lanes_.empty()) FindLanes();
    if (established_ && !said_hello_) SayHello();
    return PumpQueue();
  }
  const std::shared_ptr<Handlers> handlers = handlers_;
  End();
  if (handlers != nullptr && handlers->on_closed) handlers->on_closed(failure_);
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
  core_->reactor.Wake(this);
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
  wants_attention_ = true;  // answers, and sends what waits
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
  bytes_queued_ -= send->bytes;
  // Freed by Progress(): what the pin's destructor does must not happen inside a callback.
  if (send->message.pin != nullptr) released_pins_.push_back(std::move(send->message.pin));
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
  if (!queue_.empty()) wants_attention_ = true;
}

// ---- in
// -------------------------------------------------------------------------------------------

ucs_status_t UcxConnection::OnMessage(void* user, const void* header, size_t header_bytes,
                                      void* data, size_t data_bytes,
                                      const ucp_am_recv_param_t* param) {
  auto* self = static_cast<UcxConnection*>(user);
  const bool rendezvous = (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0;
  const bool ours = self->endpoint_ != nullptr &&
                    (param->recv_attr & UCP_AM_RECV_ATTR_FIELD_REPLY_EP) != 0 &&
                    param->reply_ep == self->endpoint_;
  if (!ours) return rendezvous ? UCS_ERR_CANCELED : UCS_OK;  // closed, or a stranger
  return self->Receive(header, header_bytes, data, data_bytes, param->recv_attr);
}

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
    received.worker = worker_;
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
  const ucs_status_ptr_t result =
      ucp_am_recv_data_nbx(worker_, descriptor, receive->received.buffer.data(), bytes, &param);
  if (UCS_PTR_IS_PTR(result)) return UCS_INPROGRESS;
  ReceiveCompleted(receive, result == nullptr ? UCS_OK : UCS_PTR_STATUS(result));
  return UCS_OK;
}

void UcxConnection::ReceiveCompleted(UcxReceive* receive, ucs_status_t status) {
  const auto node = receiving_.extract(receive);
  UcxReceived received = std::move(receive->received);
  if (ended_) return;
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
  ready_.push_back(std::move(received));
  ++receive_sequence_;
  while (!early_.empty() && early_.begin()->first == receive_sequence_) {
    ready_.push_back(std::move(early_.begin()->second));
    early_.erase(early_.begin());
    ++receive_sequence_;
  }
}

void UcxConnection::Deliver(UcxReceived received) {
  held_bytes_ -= received.data_bytes;
  const std::shared_ptr<Handlers> handlers = handlers_;
  if (ended_ || handlers == nullptr || !handlers->on_message) return;
  const MessageHeader& header = received.header;
  InMessage message;
  message.kind = header.kind;
  message.flags = header.flags;
  message.id = header.id;
  message.patience = PatienceStep(header.patience_cs);
  // UCX's own descriptors must go back before the worker ends, so only our buffers are given away.
  if (received.buffer.data() != nullptr) message.buffer = &received.buffer;
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

// Asked once, of a connection that works: UCX 1.13 prints freed memory for one whose peer has failed.
void UcxConnection::FindLanes() {
  char* text = nullptr;
  size_t length = 0;
  FILE* file = ::open_memstream(&text, &length);
  if (file == nullptr) return;
  ucp_ep_print_info(endpoint_, file);
  std::fclose(file);
  lanes_ = UcxLanes({text, length});
  if (lanes_.empty()) lanes_ = "unknown lanes";
  std::free(text);
}

std::string UcxConnection::Describe() const {
  if (endpoint_ == nullptr) return peer_ + " (closed)";
  return lanes_.empty() ? peer_ + " (connecting)" : peer_ + " over " + lanes_;
}

}  // namespace icecache
