#include "common/wire/push_codec.h"

#include "common/limits.h"
#include "common/wire/capnp_message.h"
#include "common/wire/data_codec.h"
#include "common/wire/message_checks.h"
#include "wire/data.capnp.h"

namespace icecache::wire {

void Encode(const OfferMemoryRequest& in, OutMessage* out) {
  capnp::MallocMessageBuilder message;
  auto root = message.initRoot<schema::OfferMemoryRequest>();
  root.setTicket(Bytes(in.ticket));
  root.setHandle(Bytes(in.handle));
  out->kind = kOfferMemory;
  out->meta = FlatBytes(message);
}

void Encode(const OfferMemoryReply&, OutMessage* out) {
  capnp::MallocMessageBuilder message;
  message.initRoot<schema::OfferMemoryReply>();
  out->kind = kOfferMemory;
  out->meta = FlatBytes(message);
}

Result<OfferMemoryRequest> DecodeOfferMemoryRequest(const InMessage& message) {
  const MessageChecks check("OfferMemoryRequest");
  KV_RETURN_IF_ERROR(check.Kind(message.kind, kOfferMemory));
  KV_RETURN_IF_ERROR(check.BodyBytes(message.body.size(), 0));
  return ReadFlat<schema::OfferMemoryRequest>(
      check.message(), message.meta,
      [&](schema::OfferMemoryRequest::Reader root) -> Result<OfferMemoryRequest> {
        OfferMemoryRequest out;
        const auto ticket = View(root.getTicket());
        const auto handle = View(root.getHandle());
        KV_RETURN_IF_ERROR(check.Between("ticket.size", ticket.size(), 1, limits::kTicketBytesMax));
        KV_RETURN_IF_ERROR(
            check.Between("handle.size", handle.size(), 1, limits::kMemoryHandleBytesMax));
        out.ticket.assign(ticket.begin(), ticket.end());
        out.handle.assign(handle.begin(), handle.end());
        return out;
      });
}

Result<OfferMemoryReply> DecodeOfferMemoryReply(const InMessage& message) {
  const MessageChecks check("OfferMemoryReply");
  KV_RETURN_IF_ERROR(check.Kind(message.kind, kOfferMemory));
  KV_RETURN_IF_ERROR(check.BodyBytes(message.body.size(), 0));
  return ReadFlat<schema::OfferMemoryReply>(
      check.message(), message.meta,
      [](schema::OfferMemoryReply::Reader) -> Result<OfferMemoryReply> {
        return OfferMemoryReply{};
      });
}

}  // namespace icecache::wire
