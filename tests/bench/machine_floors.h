// What this machine takes for the least things that a decode step is made of: memory in a row, a
// random line, blocks fetched ahead, the first touch of a page, waking a thread, a system call.
// Each result is checked before it is believed. Own buffers, freed on return; threads have ended by
// then.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/status.h"

namespace icecache {

struct Floor {
  std::string what;      // "random_line"
  uint64_t bytes = 0;    // that it was measured on; 0: on none
  uint32_t threads = 1;  // at once
  const char* unit = "";
  double p50 = 0, p99 = 0;   // of `samples` times; of bandwidth the p99 is the low end
  uint64_t samples = 0;      // 1: the best of some, in both
  int64_t page_faults = -1;  // that the kernel counted; -1: not asked
};

// GB/s of 256 MiB per thread, all at once, together.
Floor MemoryRead(uint32_t threads);
// In a buffer of `bytes` (down to a power of two, at least 1 MiB), in this order: a dependent load
// of a random 64-byte line, ns; random 512-byte blocks (a page's token sketches), fetched 16 ahead,
// GB/s. RESOURCE_EXHAUSTED: no such memory. DATA_LOSS: a wrong line was read.
Result<std::vector<Floor>> RandomReads(uint64_t bytes, uint64_t seed);
// Of 4 KiB pages, us: anonymous ones written for the first time; pages of a memfd that exist and
// that a second, populated mapping reads for the first time, and again.
Result<std::vector<Floor>> PageTouches(uint32_t pages);
// From a write to an eventfd to the return from epoll_wait in another thread, us (half of a round
// trip): at once, and after 2 ms in which both have slept. DEADLINE_EXCEEDED: ten seconds without.
Result<std::vector<Floor>> WakeUps(uint32_t rounds);
// ns: a reading of the clock, the least system call.
std::vector<Floor> SmallCalls();

}  // namespace icecache
