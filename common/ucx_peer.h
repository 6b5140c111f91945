// Whether whoever asked for a UCX connection still waits for it.
//
// Shared memory of UCX 1.13 is named by its owner's process and file descriptor. A peer that has given up,
// closed its connection and opened the next has other memory under the same number by then: accepting
// the old request would write into the new connection, or end this process by an assertion on memory
// that is not set up yet (mm_posix.c, "length > 0").
#pragma once

#include <sys/socket.h>

namespace icecache {

// True when a TCP connection of this process to `peer` has been closed there. Looks at every
// descriptor of the process: tens of microseconds for some hundreds.
bool PeerHasClosed(const sockaddr_storage& peer);

}  // namespace icecache
