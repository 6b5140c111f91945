#include "common/ucx_missed_events.h"

#include <dlfcn.h>
#include <ucs/type/status.h>

#include <atomic>

namespace icecache {
namespace {

std::atomic<uint64_t> dropped = 0;

}  // namespace
}  // namespace icecache

// libucs calls this through its procedure linkage table, and a program's symbols come before a
// library's. UCX uses such queues for the notes of its thread and for nothing else.
extern "C" [[gnu::visibility("default")]] ucs_status_t ucs_mpmc_queue_push(void* /*queue*/,
                                                                           uint64_t /*note*/) {
  icecache::dropped.fetch_add(1, std::memory_order_relaxed);
  return UCS_OK;
}

namespace icecache {

bool UcxNotesAreDropped() {
  return ::dlsym(RTLD_DEFAULT, "ucs_mpmc_queue_push") ==
         reinterpret_cast<void*>(&ucs_mpmc_queue_push);
}

uint64_t UcxNotesDropped() { return dropped.load(std::memory_order_relaxed); }

}  // namespace icecache
