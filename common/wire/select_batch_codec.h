// Several Selects in one message: what the sequences of a batch ask one shard in one layer. Each is a
// request of its own, with its own context and id, and is answered by itself. Checked as all messages
// are (data_codec.h).
#pragma once

#include <span>
#include <vector>

#include "common/wire/data_codec.h"

namespace icecache::wire {

// Takes bodies and pins of the Selects. The id of the whole, under which a refusal of the whole is
// answered, is the first one's. REQUIRES: 1 to limits::kSelectsPerBatchMax encoded SelectRequests
// with their bodies, each id set. Cost: a copy of the metas, none of the bodies.
OutMessage JoinSelects(std::span<OutMessage> selects);

// The Selects as they were before joining. Spans point into `message`.
Result<std::vector<InMessage>> SplitSelects(const InMessage& message);

}  // namespace icecache::wire
