// `icecachectl bench smoke`: a few seconds that say whether a server serves, end to end and right.
// Uploads a small context of its own, selects, compares every page with what was sent, times it,
// and takes the context away again. Not a benchmark: that is icecache-bench.
#pragma once

#include <cstdint>
#include <string>

#include "common/control_client.h"
#include "common/reactor.h"
#include "common/status.h"

namespace icecache {

struct SmokeOptions {
  uint32_t tokens = 2048;
  uint32_t selections = 200;
  uint64_t seed = 1;
};
struct SmokeResult {
  uint64_t rows_bytes = 0;
  double upload_seconds = 0;  // rows and index
  uint64_t pages = 0;         // compared
  double select_p50_us = 0, select_p99_us = 0, select_max_us = 0;
};

// `control` is connected on `reactor`, which is turned meanwhile. DATA_LOSS names the page that is
// not what was sent.
Result<SmokeResult> RunSmoke(Reactor& reactor, ControlClient& control, const SmokeOptions& options);

}  // namespace icecache
