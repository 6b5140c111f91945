// What of the data plane writes into memory that a worker has offered (page way "ipc",
// docs/gpu.md): the offer, and replies that wait until their pages are there.
#include <utility>

#include "cacheserver/data_service.h"
#include "common/limits.h"
#include "common/log.h"
#include "common/wire/push_codec.h"
#include "kernels/gpu/aligned.h"

namespace icecache {

Status DataService::OfferMemory(Connection& connection, const InMessage& message) {
  KV_ASSIGN_OR_RETURN(const wire::OfferMemoryRequest request,
                      wire::DecodeOfferMemoryRequest(message));
  const Lease* lease = shard_.FindTicket(request.ticket);
  if (lease == nullptr || connection.tenant != lease->tenant ||
      !connection.attached.contains(lease->context)) {
    return PermissionDenied(
        "offer memory: the ticket is of no context that is attached on this connection; send "
        "Attach first");
  }
  if (options_.push == nullptr) {
    return Unimplemented("offer memory: this server pushes no pages; its log says why");
  }
  options_.push->Open(request.handle,
                      [this, alive = std::weak_ptr<int>(alive_), id = connection.id,
                       request_id = message.id](Result<std::shared_ptr<PushTarget>> target) {
                        if (alive.expired()) return;
                        const auto found = connections_.find(id);
                        if (found == connections_.end())
                          return;  // the memory is let go with `target`
                        InMessage answered;
                        answered.kind = wire::kOfferMemory;
                        answered.id = request_id;
                        if (!target.ok()) return Refuse(*found->second, answered, target.status());
                        found->second->push = std::move(*target);
                        OutMessage reply;
                        wire::Encode(wire::OfferMemoryReply{}, &reply);
                        Reply(*found->second, answered, std::move(reply));
                      });
  return OkStatus();
}

// Missing pages of the tenant's extents, as far as the region goes. What is left stays where it is.
// Positions go in the body in any case: the worker needs them on its host.
std::vector<PushSpan> DataService::PlaceInRegion(const Connection& connection,
                                                 const wire::SelectRequest& request) {
  std::vector<PushSpan> spans;
  if (request.push_bytes == 0 || connection.push == nullptr) return spans;
  const uint64_t room = PagePush::Room(*connection.push);
  uint64_t at = request.push_offset;
  const uint64_t end = at + request.push_bytes;
  if (end > room) return spans;
  for (wire::HeadSelection& head : scratch_.heads) {
    for (wire::PagePayload& page : head.pages) {
      const size_t bytes = page.k_rows.size() + page.v_rows.size();
      if (page.place != wire::PagePlace::kBody || bytes == 0 || page.extent == 0 ||
          gpu::Aligned(bytes) > end - at) {
        continue;
      }
      const size_t rows = size_t{page.fill} - page.from;
      const std::byte* const base =
          page.k_rows.data() - page.from * (page.k_rows.size() / rows) - page.offset;
      const auto to = static_cast<uint32_t>(at);
      if (page.k_rows.data() + page.k_rows.size() == page.v_rows.data()) {
        spans.push_back({page.extent, base, {page.k_rows.data(), bytes}, to});
      } else {
        spans.push_back({page.extent, base, page.k_rows, to});
        spans.push_back(
            {page.extent, base, page.v_rows, static_cast<uint32_t>(to + page.k_rows.size())});
      }
      page.place = wire::PagePlace::kPushed;
      page.offset = to;
      page.k_rows = page.v_rows = {};
      at += gpu::Aligned(bytes);
    }
  }
  return spans;
}

// The reply goes also when the push has failed: the worker verifies what it finds, and asks again
// for what is not there.
void DataService::ReplyWhenPushed(Connection& connection, const InMessage& message,
                                  OutMessage reply, const std::vector<PushSpan>& spans) {
  std::shared_ptr<const void> pin = reply.pin;
  options_.push->Push(
      connection.push, spans, std::move(pin),
      [this, alive = std::weak_ptr<int>(alive_), id = connection.id, request_id = message.id,
       kept = std::make_shared<OutMessage>(std::move(reply))](const Status& status) {
        if (alive.expired()) return;
        const auto found = connections_.find(id);
        if (found == connections_.end()) return;
        if (!status.ok()) {
          LogWarn("pages are no longer pushed to a worker",
                  {{"peer", found->second->channel->endpoint().Describe()},
                   {"reason", status.ToString()}});
          found->second->push.reset();
        }
        InMessage answered;
        answered.kind = wire::kSelect;
        answered.id = request_id;
        Reply(*found->second, answered, std::move(*kept));
      });
}

}  // namespace icecache
