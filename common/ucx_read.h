// UcxReads: one-sided reads over one UCX endpoint. Part of the border to UCX; owned by the
// endpoint's UcxConnection, on whose loop everything here happens.
//
// Where the network reads by itself (RDMA; shared memory that UCX allocated) the peer's processor
// has no part in it. Elsewhere UCX sends the peer a message and has its software answer, without
// looking at any key: so a peer that is not to be read and written at will has no RMA in its
// context, and such reads are never answered (docs/adr, "One-sided reads").
#pragma once

#include <ucp/api/ucp.h>

#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "common/transport.h"

namespace icecache {

// What MakeReadable hands out, and Read takes: where the memory lies, and UCX's key for it.
std::vector<std::byte> PackUcxKey(std::span<const std::byte> memory, const void* rkey,
                                  size_t rkey_bytes);

class UcxReads {
 public:
  using Done = std::function<void(Status)>;
  struct Finished {
    Done done;
    Status status;
    std::shared_ptr<const void> pin;
  };

  UcxReads();
  ~UcxReads();  // REQUIRES: DestroyKeys, and nothing in flight or the worker is gone
  UcxReads(const UcxReads&) = delete;
  UcxReads& operator=(const UcxReads&) = delete;

  // Its end comes through TakeFinished, also when it is refused.
  void Start(ucp_ep_h endpoint, std::span<const MemoryRead> reads, std::shared_ptr<const void> pin,
             Done done);
  void Refuse(std::shared_ptr<const void> pin, Done done, Status status);
  // Those in flight end now with `status`; UCX may write to their memory until it lets go.
  void FailAll(const Status& status);

  bool any_in_flight() const { return !in_flight_.empty(); }
  bool any_finished() const { return !finished_.empty(); }
  std::vector<Finished> TakeFinished() { return std::exchange(finished_, {}); }
  void DestroyKeys();  // before the worker goes

 private:
  struct Read;
  static void OnRead(void* request, ucs_status_t status, void* read);
  void Completed(Read* read, ucs_status_t status);
  struct Key {
    uint64_t address = 0;
    uint64_t bytes = 0;
    ucp_rkey_h rkey = nullptr;
  };
  Result<const Key*> Unpack(ucp_ep_h endpoint, std::span<const std::byte> key);

  std::map<Read*, std::unique_ptr<Read>> in_flight_;
  std::vector<Finished> finished_;
  std::map<std::string, Key, std::less<>> keys_;
};

}  // namespace icecache
