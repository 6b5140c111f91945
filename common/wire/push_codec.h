// The offer of memory that pages are pushed into (page way "ipc"), encoded and decoded with checks
// as in data_codec.h, which has the other messages of the data plane.
#pragma once

#include <cstddef>
#include <vector>

#include "common/status.h"
#include "common/transport.h"

namespace icecache::wire {

struct OfferMemoryRequest {
  std::vector<std::byte> ticket;  // of a context that this connection has attached
  std::vector<std::byte> handle;  // kernels/gpu/memory_handle.h
};
struct OfferMemoryReply {};

void Encode(const OfferMemoryRequest&, OutMessage* out);
void Encode(const OfferMemoryReply&, OutMessage* out);
Result<OfferMemoryRequest> DecodeOfferMemoryRequest(const InMessage& message);
Result<OfferMemoryReply> DecodeOfferMemoryReply(const InMessage& message);

}  // namespace icecache::wire
