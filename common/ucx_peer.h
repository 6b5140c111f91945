// Shared memory of UCX 1.13 is named by its owner's process and file descriptor (/proc/PID/fd/N). Who attaches
// late, when the owner has given up that connection and opened the next, finds other memory under the same
// number: it writes into a stranger's queue, or ends its process by an assertion on memory that is not set
// up yet (mm_posix.c, "length > 0"). Two things keep numbers and connections together.
#pragma once

#include <sys/socket.h>

#include <vector>

namespace icecache {

// 1. A request is not accepted when whoever asked has left. True when a TCP connection of this process to
// `peer` has been closed there. Looks at every descriptor of the process: tens of microseconds for some
// hundreds.
bool PeerHasClosed(const sockaddr_storage& peer);

// 2. The numbers of a connection that is closed are not used again for a while. In their place is a socket,
// which nobody can attach. At most 256, for at most 15 s; of the process, since descriptors are, and a
// worker makes a new transport for each new link. Any thread.
//
// Descriptors of UCX's shared memory in this process, before a UCX worker is destroyed ...
std::vector<int> UcxMemoryDescriptors();
// ... and after: those that are closed now are kept. A number that another thread has taken meanwhile is
// left to it.
void KeepNumbers(const std::vector<int>& were_open);

}  // namespace icecache
