// RemoteExtents: reads pages out of the extents of this worker's tenant in one shard's memory over
// the network, by itself (reply mode "remote"): keys of extents are asked for when a page first
// names them, the pages of a reply then come in one go.
//
// A frame may be reused by the server at any time: what has come is verified before it is attended
// to, as every page is. Where the network cannot read by itself nothing comes; that is noticed
// after kExtentWaitMax. Lives as long as one connection. Owner's thread: the reactor's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <unordered_map>
#include <vector>

#include "common/channel.h"
#include "common/model_shape.h"
#include "common/wire/data_codec.h"

namespace icecache {

class RemoteExtents {
 public:
  RemoteExtents(Reactor& reactor, Channel& channel) : reactor_(reactor), channel_(channel) {}
  RemoteExtents(const RemoteExtents&) = delete;
  RemoteExtents& operator=(const RemoteExtents&) = delete;

  // Fetches the pages of `reply` that are named by extent; their rows are valid during `done`. They
  // are empty for pages of extents that are gone, for all but one the first time, and when the
  // status is not OK. `done` once, on a later turn, or never when this object is gone before.
  using Reply = std::shared_ptr<wire::SelectReply>;
  void Fetch(ContextId context, Epoch epoch, const ModelShape& shape, Reply reply,
             std::function<void(Status)> done);

  uint64_t bytes_read() const { return bytes_read_; }

 private:
  struct Fetching;
  void Read(const std::shared_ptr<Fetching>& fetching);
  void End(Fetching& fetching, Status status);

  Reactor& reactor_;
  Channel& channel_;
  std::unordered_map<uint64_t, std::vector<std::byte>> keys_;  // by serial
  uint64_t bytes_read_ = 0;
  // Something has come. Before that one page is tried, and the others stay empty: a peer whose
  // software is asked for them complains about each.
  bool proven_ = false;
  std::shared_ptr<int> alive_ = std::make_shared<int>(0);
};

}  // namespace icecache
