#include "worker/remote_extents.h"

#include <algorithm>
#include <utility>

#include "common/limits.h"
#include "common/wire/extent_codec.h"
#include "worker/extent_map.h"

namespace icecache {

struct RemoteExtents::Fetching {
  ModelShape shape;
  Reply reply;
  std::function<void(Status)> done;  // empty: it has ended
  Reactor::TimerId timer = 0;
  std::vector<wire::PagePayload*> pages;  // of the reply
  std::shared_ptr<std::byte[]> frames;    // one for each
};

void RemoteExtents::End(Fetching& fetching, Status status) {
  if (!fetching.done) return;
  reactor_.Cancel(fetching.timer);
  const auto done = std::exchange(fetching.done, {});
  done(std::move(status));
}

void RemoteExtents::Fetch(ContextId context, Epoch epoch, const ModelShape& shape, Reply reply,
                          std::function<void(Status)> done) {
  const auto fetching = std::make_shared<Fetching>();
  fetching->shape = shape;
  fetching->done = std::move(done);
  wire::ExtentKeysRequest request{context, epoch, {}};
  for (wire::HeadSelection& head : reply->heads) {
    for (wire::PagePayload& page : head.pages) {
      if (page.place != wire::PagePlace::kMapped) continue;
      fetching->pages.push_back(&page);
      if (keys_.contains(page.extent) || request.serials.size() == limits::kExtentsPerReplyMax ||
          std::count(request.serials.begin(), request.serials.end(), page.extent) > 0) {
        continue;
      }
      request.serials.push_back(page.extent);
    }
  }
  fetching->reply = std::move(reply);
  const auto guarded = [this, alive = std::weak_ptr<int>(alive_), fetching](auto then) {
    return [=, this](auto&&... result) {
      if (!alive.expired() && fetching->done) then(std::forward<decltype(result)>(result)...);
    };
  };
  fetching->timer = reactor_.After(
      limits::kExtentWaitMax, guarded([this, fetching] {
        End(*fetching, DeadlineExceeded("the network does not read the server's memory by itself"));
      }));
  if (request.serials.empty()) return Read(fetching);
  OutMessage message;
  wire::Encode(request, &message);
  channel_.Call(std::move(message), limits::kExtentWaitMax,
                guarded([this, fetching](const Result<InMessage>& answer) {
                  if (!answer.ok()) return End(*fetching, answer.status());
                  Result<wire::ExtentKeysReply> keys = wire::DecodeExtentKeysReply(*answer);
                  if (!keys.ok()) return End(*fetching, keys.status());
                  if (keys_.size() + keys->keys.size() > limits::kMemoryKeysMax) keys_.clear();
                  for (size_t i = 0; i < keys->keys.size(); ++i) {
                    keys_[keys->serials[i]] = std::move(keys->keys[i]);
                  }
                  Read(fetching);
                }));
}

void RemoteExtents::Read(const std::shared_ptr<Fetching>& fetching) {
  const size_t frame_bytes = fetching->shape.page_bytes();
  std::erase_if(fetching->pages, [this](const wire::PagePayload* page) {
    return !keys_.contains(page->extent);  // the extent is gone
  });
  if (!proven_ && fetching->pages.size() > 1) {
    fetching->pages.erase(fetching->pages.begin() + 1, fetching->pages.end());
  }
  fetching->frames.reset(new std::byte[std::max<size_t>(1, fetching->pages.size() * frame_bytes)]);
  std::vector<MemoryRead> reads;
  for (size_t i = 0; i < fetching->pages.size(); ++i) {
    const wire::PagePayload& page = *fetching->pages[i];
    reads.push_back({keys_.at(page.extent),
                     page.offset,
                     {fetching->frames.get() + i * frame_bytes, frame_bytes}});
  }
  channel_.endpoint().Read(
      reads, fetching->frames, [this, alive = std::weak_ptr<int>(alive_), fetching](Status status) {
        if (alive.expired() || !fetching->done) return;
        if (!status.ok()) return End(*fetching, std::move(status));
        proven_ |= !fetching->pages.empty();
        const size_t bytes = fetching->shape.page_bytes();
        for (size_t i = 0; i < fetching->pages.size(); ++i) {
          PointRowsAtFrame(fetching->shape, {fetching->frames.get() + i * bytes, bytes},
                           fetching->pages[i]);
        }
        bytes_read_ += fetching->pages.size() * bytes;
        End(*fetching, OkStatus());
      });
}

}  // namespace icecache
