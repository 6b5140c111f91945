// The request for keys to extents (reply mode "remote"), encoded and decoded with checks as in
// data_codec.h, which has the other messages of the data plane.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/ids.h"
#include "common/status.h"
#include "common/transport.h"

namespace icecache::wire {

struct ExtentKeysRequest {
  ContextId context;
  Epoch epoch;
  std::vector<uint64_t> serials;  // 1 to kExtentsPerReplyMax
};
struct ExtentKeysReply {
  std::vector<uint64_t> serials;
  std::vector<std::vector<std::byte>> keys;  // of each
};

void Encode(const ExtentKeysRequest&, OutMessage* out);
void Encode(const ExtentKeysReply&, OutMessage* out);
Result<ExtentKeysRequest> DecodeExtentKeysRequest(const InMessage& message);
Result<ExtentKeysReply> DecodeExtentKeysReply(const InMessage& message);

}  // namespace icecache::wire
