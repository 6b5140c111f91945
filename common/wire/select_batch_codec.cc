#include "common/wire/select_batch_codec.h"

#include <memory>
#include <utility>

#include "common/limits.h"
#include "common/wire/capnp_message.h"
#include "common/wire/message_checks.h"
#include "wire/data.capnp.h"

namespace icecache::wire {

OutMessage JoinSelects(std::span<OutMessage> selects) {
  KV_CHECK(!selects.empty() && selects.size() <= limits::kSelectsPerBatchMax);
  size_t words = 16;
  for (const OutMessage& select : selects) words += 4 + (select.meta.size() + 7) / 8;
  capnp::MallocMessageBuilder message(static_cast<unsigned>(words));
  const auto count = static_cast<unsigned>(selects.size());
  auto list = message.initRoot<schema::SelectBatch>().initSelects(count);
  OutMessage out;
  auto pins = std::make_shared<std::vector<std::shared_ptr<const void>>>();
  for (unsigned i = 0; i < count; ++i) {
    OutMessage& select = selects[i];
    KV_CHECK(select.kind == kSelect);
    size_t body_bytes = 0;
    for (const std::span<const std::byte> part : select.body) {
      body_bytes += part.size();
      out.body.push_back(part);
    }
    KV_CHECK(body_bytes <= limits::kDataBodyBytesMax);
    list[i].setId(select.id);
    list[i].setMeta(Bytes(select.meta));
    list[i].setBodyBytes(static_cast<uint32_t>(body_bytes));
    pins->push_back(std::move(select.pin));
  }
  out.kind = kSelectBatch;
  out.id = selects[0].id;
  out.meta = FlatBytes(message);
  out.pin = std::move(pins);
  return out;
}

Result<std::vector<InMessage>> SplitSelects(const InMessage& message) {
  const MessageChecks check("SelectBatch");
  KV_RETURN_IF_ERROR(check.Kind(message.kind, kSelectBatch));
  // What is handed out points into the meta itself, never into a copy that was aligned.
  if (reinterpret_cast<uintptr_t>(message.meta.data()) % sizeof(capnp::word) != 0) {
    return check.Bad("meta", "unaligned", "8-byte aligned, as transports deliver it");
  }
  return ReadFlat<schema::SelectBatch>(
      check.message(), message.meta,
      [&](schema::SelectBatch::Reader root) -> Result<std::vector<InMessage>> {
        const auto selects = root.getSelects();
        KV_RETURN_IF_ERROR(
            check.Between("selects.size", selects.size(), 1, limits::kSelectsPerBatchMax));
        std::vector<InMessage> out;
        out.reserve(selects.size());
        size_t at = 0;
        for (const auto& select : selects) {
          InMessage& part = out.emplace_back();
          part.kind = kSelect;
          part.id = select.getId();
          part.patience = message.patience;
          part.meta = View(select.getMeta());
          const size_t bytes = select.getBodyBytes();
          KV_RETURN_IF_ERROR(check.AtMost("bodyBytes", bytes, message.body.size() - at));
          part.body = message.body.subspan(at, bytes);
          at += bytes;
        }
        KV_RETURN_IF_ERROR(check.BodyBytes(message.body.size(), at));
        return out;
      });
}

}  // namespace icecache::wire
