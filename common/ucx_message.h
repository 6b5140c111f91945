// One message on its way through UCX, out or in: what UCX reads and writes until it calls back, and
// who owns it. Part of the border to UCX (ucx_transport.cc, ucx_connection.{h,cc},
// ucx_environment.cc).
#pragma once

#include <ucp/api/ucp.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <ratio>
#include <utility>
#include <vector>

#include "common/message_header.h"
#include "common/receive_buffers.h"
#include "common/transport.h"

namespace icecache {

class UcxConnection;

using PatienceStep = std::chrono::duration<int64_t, std::centi>;  // MessageHeader::patience_cs

// On its way out. UCX reads header, parts and what they point to until Callback.
struct UcxSend {
  // Lays out meta and body as a list of parts; small messages and small parts are gathered.
  void Prepare(OutMessage m);
  // For reuse by another message: keeps some memory.
  void Clear();
  static void Callback(void* request, ucs_status_t status, void* user);

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

// A message that has arrived completely. Its data is either a descriptor of UCX's, given back on
// destruction (before the worker goes), or a buffer of ours.
struct UcxReceived {
  UcxReceived() = default;
  UcxReceived(UcxReceived&& other) noexcept { *this = std::move(other); }
  UcxReceived& operator=(UcxReceived&& other) noexcept;
  ~UcxReceived();

  MessageHeader header{};
  const std::byte* data = nullptr;
  uint64_t data_bytes = 0;
  ReceiveBuffers::Buffer buffer;
  ucp_worker_h worker = nullptr;  // set when UCX holds the data
};

// A large message on its way in. UCX writes to the buffer until Callback.
struct UcxReceive {
  static void Callback(void* request, ucs_status_t status, size_t bytes, void* user);
  UcxConnection* connection = nullptr;
  UcxReceived received;
};

}  // namespace icecache
