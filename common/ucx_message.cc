#include "common/ucx_message.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>

#include "common/limits.h"
#include "common/ucx_connection.h"

namespace icecache {
namespace {

// Up to this size a message is gathered by us and sent as one part: UCX's path for lists of parts
// costs more than the copy.
constexpr uint64_t kGatherBytesMax = 8192;
// Smaller parts (positions of a page) are copied next to each other.
constexpr size_t kSmallPartBytes = 512;
constexpr size_t kSpareStagingBytesMax = 256 << 10;

uint16_t PatienceOnWire(Duration patience) {
  const auto steps = std::chrono::ceil<PatienceStep>(std::max(patience, Duration(0))).count();
  return static_cast<uint16_t>(std::min<int64_t>(steps, UINT16_MAX));
}

}  // namespace

void UcxSend::Callback(void* request, ucs_status_t status, void* user) {
  ucp_request_free(request);
  auto* send = static_cast<UcxSend*>(user);
  send->connection->SendCompleted(send, status);
}

void UcxReceive::Callback(void* request, ucs_status_t status, size_t, void* user) {
  ucp_request_free(request);
  auto* receive = static_cast<UcxReceive*>(user);
  receive->connection->ReceiveCompleted(receive, status);
}

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
            kControlNone,
            PatienceOnWire(message.patience)};
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

}  // namespace icecache
