#include "common/ucx_read.h"

#include <cstring>
#include <string_view>
#include <utility>

#include "common/limits.h"
#include "common/ucx_connection.h"

namespace icecache {
namespace {

struct KeyHeader {
  uint64_t address;
  uint64_t bytes;
};

}  // namespace

struct UcxReads::Read {
  UcxReads* owner;
  size_t pending;  // parts that UCX has not completed, and one while they are being posted
  Status status;
  std::shared_ptr<const void> pin;
  Done done;  // empty: it has been told
};

std::vector<std::byte> PackUcxKey(std::span<const std::byte> memory, const void* rkey,
                                  size_t rkey_bytes) {
  const KeyHeader header{reinterpret_cast<uint64_t>(memory.data()), memory.size()};
  std::vector<std::byte> key(sizeof header + rkey_bytes);
  std::memcpy(key.data(), &header, sizeof header);
  std::memcpy(key.data() + sizeof header, rkey, rkey_bytes);
  return key;
}

UcxReads::UcxReads() = default;
UcxReads::~UcxReads() { KV_CHECK(keys_.empty()); }

void UcxReads::DestroyKeys() {
  for (const auto& [bytes, key] : keys_) ucp_rkey_destroy(key.rkey);
  keys_.clear();
}

Result<const UcxReads::Key*> UcxReads::Unpack(ucp_ep_h endpoint, std::span<const std::byte> key) {
  const std::string_view bytes(reinterpret_cast<const char*>(key.data()), key.size());
  if (const auto known = keys_.find(bytes); known != keys_.end()) return &known->second;
  KeyHeader header;
  if (key.size() <= sizeof header || key.size() > limits::kMemoryKeyBytesMax) {
    return InvalidArgument("memory key of " + std::to_string(key.size()) + " bytes");
  }
  if (keys_.size() >= limits::kMemoryKeysMax) {
    if (!in_flight_.empty()) return ResourceExhausted("too many memory keys in use");
    DestroyKeys();
  }
  std::memcpy(&header, key.data(), sizeof header);
  Key made{header.address, header.bytes, nullptr};
  const ucs_status_t status = ucp_ep_rkey_unpack(endpoint, key.data() + sizeof header, &made.rkey);
  if (status != UCS_OK) {
    return InvalidArgument(std::string("memory key: ") + ucs_status_string(status));
  }
  return &keys_.emplace(bytes, made).first->second;
}

void UcxReads::Refuse(std::shared_ptr<const void> pin, Done done, Status status) {
  finished_.push_back({std::move(done), std::move(status), std::move(pin)});
}

void UcxReads::Start(ucp_ep_h endpoint, std::span<const MemoryRead> reads,
                     std::shared_ptr<const void> pin, Done done) {
  if (in_flight_.size() >= limits::kMemoryReadsMax) {
    return Refuse(std::move(pin), std::move(done), ResourceExhausted("too many reads in flight"));
  }
  std::vector<const Key*> keys;
  for (const MemoryRead& part : reads) {
    Result<const Key*> key = Unpack(endpoint, part.key);
    if (key.ok() &&
        (part.to.size() > (*key)->bytes || part.offset > (*key)->bytes - part.to.size())) {
      key = OutOfRange("a read of " + std::to_string(part.to.size()) + " bytes at " +
                       std::to_string(part.offset) + " of memory of " +
                       std::to_string((*key)->bytes) + " bytes");
    }
    if (!key.ok()) return Refuse(std::move(pin), std::move(done), key.status());
    keys.push_back(*key);
  }
  auto owned = std::make_unique<Read>(Read{this, 1, {}, std::move(pin), std::move(done)});
  Read* read = owned.get();
  in_flight_.emplace(read, std::move(owned));
  ucp_request_param_t param{};
  param.op_attr_mask =
      UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMORY_TYPE;
  param.memory_type = UCS_MEMORY_TYPE_HOST;
  param.user_data = read;
  param.cb.send = &UcxReads::OnRead;
  for (size_t i = 0; i < reads.size(); ++i) {
    ++read->pending;
    const ucs_status_ptr_t result =
        ucp_get_nbx(endpoint, reads[i].to.data(), reads[i].to.size(),
                    keys[i]->address + reads[i].offset, keys[i]->rkey, &param);
    if (!UCS_PTR_IS_PTR(result)) {
      Completed(read, result == nullptr ? UCS_OK : UCS_PTR_STATUS(result));
    }
  }
  Completed(read, UCS_OK);
}

void UcxReads::OnRead(void* request, ucs_status_t status, void* user) {
  ucp_request_free(request);
  auto* read = static_cast<Read*>(user);
  read->owner->Completed(read, status);
}

void UcxReads::Completed(Read* read, ucs_status_t status) {
  if (status != UCS_OK && read->status.ok()) {
    read->status =
        Unavailable(std::string("reading the peer's memory: ") + ucs_status_string(status));
  }
  if (--read->pending > 0) return;
  const auto node = in_flight_.extract(read);
  if (!read->done) return;
  finished_.push_back({std::move(read->done), std::move(read->status), std::move(read->pin)});
}

void UcxReads::FailAll(const Status& status) {
  for (const auto& [pointer, read] : in_flight_) {
    if (read->done) finished_.push_back({std::exchange(read->done, {}), status, read->pin});
  }
}

void UcxConnection::Read(std::span<const MemoryRead> reads, std::shared_ptr<const void> pin,
                         std::function<void(Status)> done) {
  if (ended_) return;
  if (established_ && failure_.ok()) {
    reads_.Start(endpoint_, reads, std::move(pin), std::move(done));
  } else {
    reads_.Refuse(std::move(pin), std::move(done), Unavailable("not connected to " + peer_));
  }
  core_->reactor.Wake(this);
}

// Of an ended connection nobody is told.
void UcxConnection::FinishReads() {
  for (const UcxReads::Finished& read : reads_.TakeFinished()) {
    if (!ended_) read.done(read.status);
  }
}

}  // namespace icecache
