// FrameTable: whose page frames may be read by whom (docs/gpu.md, "Pages of other workers"). A
// worker names the frames of its device that it shares; others of its tenant on its host are told
// the names, and nobody else is. What the names mean is the workers' business.
//
// An entry is of a control connection and ends with it, which is within a lease time of the
// worker's end; an id is never given out twice, so an entry that was replaced is not taken for the
// one before. Thread: control. Costs: Share walks all entries (kConnectionsMax).
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "cacheserver/context/lease_table.h"
#include "common/wire/control_codec.h"

namespace icecache {

class FrameTable {
 public:
  // Takes the worker's frames for what it shares from now on (the same as before: nothing changes;
  // none: no longer any), and names those of the others, oldest first. RESOURCE_EXHAUSTED: the
  // tenant has kSharingWorkersMax on this host; what was shared before stays.
  Result<wire::SharedFramesList> Share(TenantId tenant, ConnectionId connection,
                                       const wire::ShareFrames& request);
  void EndConnection(ConnectionId connection) { entries_.erase(connection); }

  uint32_t count() const { return static_cast<uint32_t>(entries_.size()); }

 private:
  struct Entry {
    TenantId tenant;
    std::string host;
    wire::SharedFrames frames;
  };
  std::map<ConnectionId, Entry> entries_;
  uint64_t next_id_ = 1;
};

}  // namespace icecache
