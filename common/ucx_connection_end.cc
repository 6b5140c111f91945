// The end of a connection: lifecycle steps 2 and 3.
#include <chrono>
#include <utility>

#include "common/ucx_connection.h"
#include "common/ucx_peer.h"

namespace icecache {
namespace {

// After the end of a connection UCX has this long to let go of its buffers by itself.
constexpr auto kFinishMax = std::chrono::milliseconds(500);

}  // namespace

void UcxConnection::Close() {
  if (!ended_) End();
}

// Step 1 -> 2 of the lifecycle.
void UcxConnection::End() {
  ended_ = true;
  ended_at_ = std::chrono::steady_clock::now();
  handlers_ = nullptr;
  const auto dropped = std::move(queue_);
  queue_.clear();
  for (const auto& send : dropped) bytes_queued_ -= send->bytes;
  early_.clear();
  ready_.clear();
  CloseEndpoint();
  core_->reactor.Wake(this);  // to be removed when finished
}

void UcxConnection::CloseEndpoint() {
  if (endpoint_ == nullptr) return;
  const ucp_ep_h endpoint = std::exchange(endpoint_, nullptr);
  ucp_request_param_t param{};
  param.op_attr_mask =
      UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.flags = UCP_EP_CLOSE_FLAG_FORCE;  // a flush never ends when the peer is stopped
  param.user_data = this;
  param.cb.send = [](void* request, ucs_status_t, void* self) {
    ucp_request_free(request);
    static_cast<UcxConnection*>(self)->closing_ = false;
  };
  closing_ = true;
  // NULL or an error (the peer was faster): closed.
  if (!UCS_PTR_IS_PTR(ucp_ep_close_nbx(endpoint, &param))) closing_ = false;
}

bool UcxConnection::Finished() const {
  return ended_ && endpoint_ == nullptr && !closing_ && incomplete_sends_ == 0 &&
         receiving_.empty() && !reads_.any_in_flight();
}

// Removes this when nothing is left to wait for.
void UcxConnection::TendEnd() {
  if (!ended_) return;
  if (Finished() || std::chrono::steady_clock::now() > ended_at_ + kFinishMax) Remove();
}

// Step 2 -> 3. REQUIRES: somebody holds a reference, and no UCX frame is on the stack.
void UcxConnection::Remove() {
  core_->reactor.Detach(this);
  reads_.DestroyKeys();
  const std::vector<int> were_open = UcxMemoryDescriptors();
  ucp_worker_destroy(std::exchange(worker_, nullptr));
  KeepNumbers(were_open);
  // With the worker gone nothing reads or writes the buffers of what never completed.
  in_flight_.clear();
  receiving_.clear();
  released_pins_.clear();
  bytes_queued_ = 0;
  std::exchange(core_, nullptr)->connections.erase(this);
}

void UcxConnection::Drain(std::chrono::steady_clock::time_point until) {
  if (core_ == nullptr) return;
  Close();
  while (!Finished() && std::chrono::steady_clock::now() < until) {
    ucp_worker_progress(worker_);
  }
  Remove();
}

}  // namespace icecache
