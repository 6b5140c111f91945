#include "cacheserver/context/frame_table.h"

#include <string>

#include "common/limits.h"

namespace icecache {

Result<wire::SharedFramesList> FrameTable::Share(TenantId tenant, ConnectionId connection,
                                                 const wire::ShareFrames& request) {
  wire::SharedFramesList list;
  for (const auto& [owner, entry] : entries_) {
    if (owner == connection || entry.tenant != tenant || entry.host != request.host) continue;
    list.others.push_back(entry.frames);
  }
  if (request.memory.empty()) {
    entries_.erase(connection);
    return list;
  }
  if (list.others.size() >= limits::kSharingWorkersMax) {
    return ResourceExhausted("share frames: " + std::to_string(list.others.size()) +
                             " workers of the tenant share theirs on this host, the maximum");
  }
  Entry& entry = entries_[connection];
  const bool same = entry.frames.id != 0 && entry.host == request.host &&
                    entry.frames.memory == request.memory &&
                    entry.frames.directory == request.directory;
  if (!same) entry = {tenant, request.host, {next_id_++, request.memory, request.directory}};
  return list;
}

}  // namespace icecache
