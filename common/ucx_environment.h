// The UCX settings that icecache depends on, each with its reason, applied in code so that nobody
// can forget them. A variable that the user has set is never changed. Together with
// ucx_transport.cc and ucx_connection.{h,cc} the border to UCX.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "common/status.h"

namespace icecache {

struct UcxSetting {
  const char* name;    // environment variable
  const char* value;   // what is applied when it is not set
  const char* reason;  // for --help, logs and docs
};
std::span<const UcxSetting> UcxSettings();

// Call first in main(), before other threads start (it sets environment variables), and before own
// signal handlers are installed: libucs has put its own on SEGV, ILL, BUS, FPE and HUP when it was
// loaded, and this takes them back unless the user asked for them. Runs once; MakeUcxTransport
// calls it too.
void ApplyUcxEnvironment();

// RESOURCE_EXHAUSTED with the remedy when /dev/shm has less free space than `needed_bytes` and UCX
// would use it: UCX 1.13 does not check, and the process dies of SIGBUS at the first touch (a
// container's default is 64 MiB). `directory` is for tests.
Status CheckSharedMemory(uint64_t needed_bytes, const std::string& directory = "/dev/shm");

// What one worker may take of /dev/shm: the FIFO and the segments of the posix transport.
inline constexpr uint64_t kUcxSharedBytesPerWorker = 8u << 20;
// Descriptors that one worker and its endpoint take, with some to spare.
inline constexpr uint32_t kUcxFilesPerWorker = 20;

// True when the list of transports (the value of UCX_TLS) includes shared memory.
bool UsesSharedMemory(std::string_view transports);

// The transports in the output of ucp_ep_print_info, each once: "posix/memory,tcp/lo (shared
// memory)". Empty when there are none yet.
std::string UcxLanes(std::string_view endpoint_info);

}  // namespace icecache
