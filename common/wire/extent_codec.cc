#include "common/wire/extent_codec.h"

#include "common/limits.h"
#include "common/wire/capnp_message.h"
#include "common/wire/data_codec.h"
#include "common/wire/message_checks.h"
#include "wire/data.capnp.h"

namespace icecache::wire {

void Encode(const ExtentKeysRequest& in, OutMessage* out) {
  capnp::MallocMessageBuilder message;
  auto root = message.initRoot<schema::ExtentKeysRequest>();
  root.setContext(in.context.value);
  root.setEpoch(in.epoch.value);
  auto serials = root.initSerials(static_cast<unsigned>(in.serials.size()));
  for (unsigned i = 0; i < serials.size(); ++i) serials.set(i, in.serials[i]);
  out->kind = kExtentKeys;
  out->meta = FlatBytes(message);
}

void Encode(const ExtentKeysReply& in, OutMessage* out) {
  KV_CHECK(in.serials.size() == in.keys.size());
  capnp::MallocMessageBuilder message;
  auto root = message.initRoot<schema::ExtentKeysReply>();
  const auto count = static_cast<unsigned>(in.serials.size());
  auto serials = root.initSerials(count);
  auto keys = root.initKeys(count);
  for (unsigned i = 0; i < count; ++i) {
    serials.set(i, in.serials[i]);
    const auto* bytes = reinterpret_cast<const kj::byte*>(in.keys[i].data());
    keys.set(i, capnp::Data::Reader(bytes, in.keys[i].size()));
  }
  out->kind = kExtentKeys;
  out->meta = FlatBytes(message);
}

Result<ExtentKeysRequest> DecodeExtentKeysRequest(const InMessage& message) {
  const MessageChecks check("ExtentKeysRequest");
  KV_RETURN_IF_ERROR(check.Kind(message.kind, kExtentKeys));
  KV_RETURN_IF_ERROR(check.BodyBytes(message.body.size(), 0));
  return ReadFlat<schema::ExtentKeysRequest>(
      check.message(), message.meta,
      [&](schema::ExtentKeysRequest::Reader root) -> Result<ExtentKeysRequest> {
        ExtentKeysRequest out;
        out.context = ContextId(root.getContext());
        out.epoch = Epoch(root.getEpoch());
        const auto serials = root.getSerials();
        KV_RETURN_IF_ERROR(
            check.Between("serials.size", serials.size(), 1, limits::kExtentsPerReplyMax));
        for (const uint64_t serial : serials) out.serials.push_back(serial);
        return out;
      });
}

Result<ExtentKeysReply> DecodeExtentKeysReply(const InMessage& message) {
  const MessageChecks check("ExtentKeysReply");
  KV_RETURN_IF_ERROR(check.Kind(message.kind, kExtentKeys));
  KV_RETURN_IF_ERROR(check.BodyBytes(message.body.size(), 0));
  return ReadFlat<schema::ExtentKeysReply>(
      check.message(), message.meta,
      [&](schema::ExtentKeysReply::Reader root) -> Result<ExtentKeysReply> {
        ExtentKeysReply out;
        const auto serials = root.getSerials();
        const auto keys = root.getKeys();
        KV_RETURN_IF_ERROR(
            check.AtMost("serials.size", serials.size(), limits::kExtentsPerReplyMax));
        KV_RETURN_IF_ERROR(check.Between("keys.size", keys.size(), serials.size(), serials.size()));
        for (unsigned i = 0; i < serials.size(); ++i) {
          const capnp::Data::Reader key = keys[i];
          KV_RETURN_IF_ERROR(check.Between("key.size", key.size(), 1, limits::kMemoryKeyBytesMax));
          const auto* bytes = reinterpret_cast<const std::byte*>(key.begin());
          out.serials.push_back(serials[i]);
          out.keys.emplace_back(bytes, bytes + key.size());
        }
        return out;
      });
}

}  // namespace icecache::wire
