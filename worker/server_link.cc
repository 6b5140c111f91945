#include "worker/server_link.h"

#include <thread>

#include "common/limits.h"
#include "common/log.h"
#include "common/ucx_environment.h"
#include "worker/page_sharing.h"

namespace icecache {

Result<std::unique_ptr<ServerLink>> ServerLink::Connect(const ServerLinkOptions& options) {
  if (UsesSharedMemory(options.ucx.transports)) {
    KV_RETURN_IF_ERROR(CheckSharedMemory(kUcxSharedBytesPerWorker));
  }
  std::unique_ptr<ServerLink> link(new ServerLink());
  link->interrupted_ = options.control.interrupted;
  link->clock_ = MakeSteadyClock();
  // On one core a busy wait would only keep the server from answering.
  const bool one_core = std::thread::hardware_concurrency() <= 1;
  link->reactor_ = std::make_unique<Reactor>(
      *link->clock_, one_core ? Duration(0) : Duration(limits::kSpinBeforeArm));
  KV_ASSIGN_OR_RETURN(link->control_, ControlClient::Connect(*link->reactor_, options.control));
  UcxOptions ucx = options.ucx;
  ucx.reads = options.cache.reply_mode == ReplyMode::kRemote;
  KV_ASSIGN_OR_RETURN(link->transport_, MakeUcxTransport(*link->reactor_, ucx));
  CacheClientOptions cache = options.cache;
  cache.leases_alive = [control = link->control_.get()] { return control->Health(); };
  KV_ASSIGN_OR_RETURN(link->cache_, CacheClient::Connect(*link->reactor_, *link->transport_,
                                                         link->control_->hello().shards, cache));
  link->sharing_ = options.sharing;
  if (link->sharing_ != nullptr) {
    link->ShareFrames();
    // So that the first step finds what there is; without an answer it comes later.
    link->reactor_->RunUntil([&] { return link->sharing_known_ || !link->control_->Health().ok(); },
                             link->clock_->Now() + options.control.deadline);
  }
  return link;
}

void ServerLink::ShareFrames() {
  control_->ShareFrames(
      sharing_->offer(), [this](const Result<std::vector<wire::SharedFrames>>& others) {
        const bool lost = !control_->Health().ok();
        if (others.ok()) sharing_->SetOthers(*others);
        if (lost) sharing_->SetOthers({});  // another server names them anew
        if (!sharing_known_) {
          (others.ok() ? LogInfo : LogWarn)(
              "page sharing",
              {{"on", others.ok() ? "yes" : "no"},
               {"others", std::to_string(sharing_->other_count())},
               {"reason", others.ok() ? "asked for (--share-pages)" : others.status().ToString()}});
        }
        sharing_known_ = true;
        if (lost) return;
        sharing_timer_ = reactor_->After(limits::kSharingInterval, [this] { ShareFrames(); });
      });
}

ServerLink::~ServerLink() {
  if (reactor_ != nullptr) reactor_->Cancel(sharing_timer_);
  cache_.reset();
  control_.reset();
  transport_.reset();
  // Handlers of sockets that were just closed run (as aborted) before the loop is gone.
  for (int i = 0; reactor_ && i < 100 && reactor_->Poll(); ++i) {
  }
}

Status ServerLink::Pump() {
  reactor_->Poll();
  if (interrupted_ && interrupted_()) return Cancelled("interrupted");
  KV_RETURN_IF_ERROR(control_->Health());
  return cache_->Health();
}

}  // namespace icecache
