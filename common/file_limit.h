// The limit on a process's open files (RLIMIT_NOFILE): a data connection takes a dozen descriptors
// (docs/dataplane.md) and each extent of memory one, so the usual soft limit of 1024 ends a server
// at some 80 connections.
#pragma once

#include <cstdint>

#include "common/status.h"

namespace icecache {

// Call in main(): raises the soft limit to the hard one. Harmless here, since nothing uses
// select(2). The limit in force afterwards.
uint64_t RaiseFileLimit();

// RESOURCE_EXHAUSTED with the remedy unless `needed` more files can be opened now. Some
// microseconds.
Status CheckFileDescriptors(uint32_t needed);

}  // namespace icecache
