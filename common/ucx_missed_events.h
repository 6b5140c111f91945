// UCX's connection manager learns of its sockets on a thread of UCX's own. What that thread sees
// while we are inside UCX it notes, and UCX 1.13 acts on the note at the end of a later
// ucp_worker_progress, whatever has become of the socket: it ends the process when the connection
// has failed meanwhile (tcp_sockcm_ep.c, "DISCONNECTING"; UCX issue 11455), or when the
// descriptor's number is another worker's by then (async.c, "handler->async == async"). One such
// call can find the failure and the note, so no order of ours prevents it. But the notes are not
// needed: the thread waits by level, so what it could not deliver it sees again at once. So they
// are dropped, by a function that stands in for UCX's own: docs/adr/0021-notes-of-ucx-dropped.md.
#pragma once

#include <cstdint>

namespace icecache {

// False when UCX was linked in a way that leaves it its own function: the assertions above remain.
bool UcxNotesAreDropped();

// How many so far, in this process. Any thread.
uint64_t UcxNotesDropped();

}  // namespace icecache
