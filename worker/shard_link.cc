#include "worker/shard_link.h"

#include <algorithm>

#include "common/log.h"
#include "common/wire/push_codec.h"
#include "common/wire/select_batch_codec.h"
#include "kernels/gpu/page_intake.h"
#include "kernels/gpu/push_buffer.h"

namespace icecache {
namespace {

// How long a lost connection is tried for: then no lease of before can be alive.
constexpr Duration kGiveUpAfter = limits::kLeaseTime;

}  // namespace

uint64_t MessageBytes(const OutMessage& message) {
  uint64_t bytes = message.meta.size();
  for (const auto& part : message.body) bytes += part.size();
  return bytes;
}

ShardLink::ShardLink(Reactor& reactor, Transport& transport, ShardId shard, uint32_t shard_count,
                     std::string address, const ShardLinkOptions& options)
    : reactor_(reactor),
      transport_(transport),
      shard_(shard),
      shard_count_(shard_count),
      address_(std::move(address)),
      options_(options),
      random_(options.jitter_seed != 0 ? options.jitter_seed : std::random_device{}()) {}

ShardLink::~ShardLink() {
  reactor_.Cancel(timer_);
  Close();
}

std::string ShardLink::Name() const {
  return "shard " + std::to_string(shard_.value) + " at " + address_;
}

Status ShardLink::Open() {
  KV_ASSIGN_OR_RETURN(std::unique_ptr<Endpoint> endpoint, transport_.Connect(address_));
  UseEndpoint(std::move(endpoint));
  return OkStatus();
}

void ShardLink::UseEndpoint(std::unique_ptr<Endpoint> endpoint) {
  remote_.reset();
  offered_ = pushing_ = false;
  channel_ = std::make_unique<Channel>(reactor_, std::move(endpoint), options_.channel);
  if (options_.mode == ReplyMode::kRemote) {
    remote_ = std::make_unique<RemoteExtents>(reactor_, *channel_);
  }
  channel_->SetOnClosed([this](const Status& status) { OnLost(status); });
  connected_ = true;
}

void ShardLink::Call(OutMessage message, Duration deadline, Channel::Done done) {
  KV_CHECK(channel_ != nullptr);
  if (extents_ != nullptr) extents_->DropIdle();
  bytes_moved_ += MessageBytes(message);
  channel_->Call(std::move(message), deadline, Counted(std::move(done)));
}

Channel::Done ShardLink::Counted(Channel::Done done) {
  return [this, done = std::move(done)](Result<InMessage> reply) {
    if (reply.ok()) {
      bytes_moved_ += reply->meta.size() + reply->body.size();
      done(std::move(reply));
      return;
    }
    done(reply.status().WithContext("cache server, " + Name()));
  };
}

void ShardLink::CallTogether(std::vector<Channel::Request> selects) {
  KV_CHECK(channel_ != nullptr);
  if (extents_ != nullptr) extents_->DropIdle();
  for (Channel::Request& select : selects) {
    bytes_moved_ += MessageBytes(select.message);
    select.done = Counted(std::move(select.done));
  }
  channel_->CallTogether(std::move(selects), wire::JoinSelects);
}

void ShardLink::SendAttach(const std::vector<std::byte>& ticket, std::function<void(Status)> done) {
  wire::AttachRequest request;
  request.ticket = ticket;
  OutMessage message;
  wire::Encode(request, &message);
  Call(std::move(message), options_.request_deadline,
       [this, ticket, done = std::move(done)](const Result<InMessage>& reply) {
         if (!reply.ok()) return done(reply.status());
         const Result<wire::AttachReply> decoded = wire::DecodeAttachReply(*reply);
         if (!decoded.ok()) return done(decoded.status());
         if (decoded->shard != shard_ || decoded->shard_count != shard_count_) {
           return done(FailedPrecondition(
               "attached to shard " + std::to_string(decoded->shard.value) + " of " +
               std::to_string(decoded->shard_count) + ", expected " + std::to_string(shard_.value) +
               " of " + std::to_string(shard_count_) + "; did the server restart? connect again"));
         }
         if (mode_ == ReplyMode::kAuto) ChooseMode(decoded->extents, ticket);
         if (!options_.device.there) return done(OkStatus());
         ChooseWay(ticket, decoded->pushes, [done] { done(OkStatus()); });
       });
}

void ShardLink::Attach(const wire::Grant& grant, std::function<void(Status)> done) {
  SendAttach(grant.ticket, [this, context = grant.context.id, ticket = grant.ticket,
                            done = std::move(done)](const Status& status) {
    if (status.ok()) {
      std::erase_if(attached_, [&](const Attached& a) { return a.context == context; });
      if (attached_.size() >= limits::kAttachmentsPerConnectionMax) {
        attached_.erase(attached_.begin());  // the shard has long dropped the oldest
      }
      attached_.push_back({context, ticket});
    }
    done(status);
  });
}

void ShardLink::ChooseMode(const std::string& extents, std::span<const std::byte> ticket) {
  const bool asked = options_.mode != ReplyMode::kAuto;
  std::string reason = asked ? "asked for" : "";
  mode_ = options_.mode;
  if (options_.mode == ReplyMode::kAuto || options_.mode == ReplyMode::kMapped) {
    const PageWay way = options_.device.way;
    gpu::PageIntake* const intake =
        way == PageWay::kAuto || way == PageWay::kRegistered ? options_.device.intake : nullptr;
    Result<std::unique_ptr<ExtentMap>> map =
        extents.empty() ? Unavailable("the server lends no memory")
                        : ExtentMap::Open(reactor_.clock(), extents, ticket, intake);
    mode_ = map.ok() ? ReplyMode::kMapped : ReplyMode::kInline;
    if (map.ok()) {
      extents_ = std::move(*map);
      if (!asked) reason = "the server is on this host";
    } else {
      reason = "its memory cannot be mapped here: " + map.status().ToString();
      if (asked) {
        LogWarn("reply mode mapped is not to be had", {{"peer", Name()}, {"reason", reason}});
      }
    }
  }
  LogInfo("reply mode",
          {{"peer", Name()}, {"mode", std::string(ReplyModeName(mode_))}, {"reason", reason}});
}

// The first time; after a connection that was lost, memory is offered again.
void ShardLink::ChooseWay(std::span<const std::byte> ticket, bool pushes,
                          std::function<void()> done) {
  if (way_ == PageWay::kAuto) {
    const gpu::PageIntake* const intake = options_.device.intake;
    PageWayFacts facts;
    facts.landing = intake != nullptr;
    facts.mapped = extents_ != nullptr;
    facts.registers = facts.landing && intake->device().registers &&
                      (extents_ == nullptr || extents_->registration().ok());
    PageWayFacts best = facts;
    best.pushes = pushes && !offered_ && options_.device.push != nullptr && !remote();
    if (ChoosePageWay(options_.device.way, best).way != PageWay::kIpc) {
      DecideWay(facts);
      return done();
    }
    return OfferMemory(ticket, [this, facts, done](const Status& status) {
      PageWayFacts known = facts;
      const std::string reason = "no memory is shared with the server: " + status.ToString();
      known.pushes = pushing_ = status.ok();
      known.no_push = reason;
      DecideWay(known);
      done();
    });
  }
  if (way_ != PageWay::kIpc || offered_ || !pushes) return done();
  OfferMemory(ticket, [this, done](const Status& status) {
    pushing_ = status.ok();
    if (!pushing_) {
      LogWarn("pages are landed from now on", {{"peer", Name()}, {"reason", status.ToString()}});
    }
    done();
  });
}

void ShardLink::OfferMemory(std::span<const std::byte> ticket, std::function<void(Status)> done) {
  Result<std::vector<std::byte>> handle = options_.device.push->Offer();
  if (!handle.ok()) return done(handle.status());
  offered_ = true;
  wire::OfferMemoryRequest request;
  request.ticket.assign(ticket.begin(), ticket.end());
  request.handle = std::move(*handle);
  OutMessage message;
  wire::Encode(request, &message);
  Call(std::move(message), options_.request_deadline,
       [done = std::move(done)](const Result<InMessage>& reply) {
         done(reply.ok() ? wire::DecodeOfferMemoryReply(*reply).status() : reply.status());
       });
}

std::shared_ptr<const gpu::PushRegion> ShardLink::LendRegion(size_t bytes) {
  // A page for which the device has no frame is read on the host, so it has to come there.
  if (!pushing_ || way_ != PageWay::kIpc || options_.device.intake->host_frames()) return nullptr;
  return options_.device.push->Reserve(bytes);
}

void ShardLink::DecideWay(const PageWayFacts& facts) {
  const PageWayChoice choice = ChoosePageWay(options_.device.way, facts);
  way_ = choice.way;
  (choice.denied ? LogWarn : LogInfo)("page way", {{"peer", Name()},
                                                   {"way", std::string(PageWayName(choice.way))},
                                                   {"reason", choice.reason},
                                                   {"transport", transport_.Describe()}});
}

void ShardLink::Resolve(ContextId context, const ModelShape& shape, wire::PagePayload* page) {
  if (extents_ == nullptr) return;
  const auto attached = std::find_if(attached_.begin(), attached_.end(),
                                     [context](const Attached& a) { return a.context == context; });
  if (attached == attached_.end()) return;
  const std::span<const std::byte> frame =
      extents_->Find(page->extent, page->offset, shape.page_bytes(), attached->ticket);
  if (frame.empty()) {
    if (!extents_->status().ok() && mode_ == ReplyMode::kMapped) {
      mode_ = ReplyMode::kInline;  // what is mapped serves the replies that are on their way
      LogWarn("reply mode", {{"peer", Name()},
                             {"mode", "inline"},
                             {"reason", "no more extents: " + extents_->status().ToString()}});
    }
    return;
  }
  PointRowsAtFrame(shape, frame, page);
  // The first lines of keys and values: whoever copies them next does not wait for memory at the
  // start of each page, where no hardware prefetcher is ahead yet.
  for (const std::span<const std::byte> part : {page->k_rows, page->v_rows}) {
    for (size_t line = 0; line < std::min<size_t>(part.size(), 4 * 64); line += 64) {
      __builtin_prefetch(part.data() + line);
    }
  }
  bytes_mapped_ += page->k_rows.size() + page->v_rows.size() + page->positions.size();
}

void ShardLink::FetchRemote(ContextId context, Epoch epoch, const ModelShape& shape,
                            RemoteExtents::Reply reply, std::function<void(Status)> done) {
  const uint64_t before = remote_->bytes_read();
  remote_->Fetch(context, epoch, shape, std::move(reply),
                 [this, before, done = std::move(done)](Status status) {
                   bytes_mapped_ += remote_->bytes_read() - before;
                   if (!status.ok() && status.code() != StatusCode::kUnavailable && remote()) {
                     mode_ = ReplyMode::kInline;
                     LogWarn("reply mode", {{"peer", Name()},
                                            {"mode", "inline"},
                                            {"reason", "remote: " + status.ToString()}});
                   }
                   done(std::move(status));
                 });
}

bool ShardLink::reconnects() const {
  return options_.leases_alive && !attached_.empty() && given_up_.ok();
}

Status ShardLink::Health() const {
  if (!given_up_.ok()) return given_up_.WithContext(Name());
  if (connected_) return OkStatus();
  if (reconnects()) return options_.leases_alive().WithContext(Name());
  return Unavailable(Name() + ": the connection to the cache server is lost; is it still running?");
}

void ShardLink::OnLost(const Status& status) {
  const bool was_ready = ready();
  connected_ = false;
  attaching_ = 0;
  if (!reconnects()) return;
  if (was_ready) {
    lost_since_ = reactor_.clock().Now();
    backoff_ = limits::kReconnectBackoffMin;
    LogWarn("data connection lost; connecting again",
            {{"peer", Name()}, {"reason", status.ToString()}});
  }
  TryLater();
}

void ShardLink::TryLater() {
  if (timer_ != 0) return;
  // From half to one and a half, so that the workers of a server do not come back all at once.
  std::uniform_real_distribution<double> factor(0.5, 1.5);
  const auto delay = std::chrono::duration_cast<Duration>(backoff_ * factor(random_));
  backoff_ = std::min<Duration>(2 * backoff_, limits::kReconnectBackoffMax);
  timer_ = reactor_.After(delay, [this] {
    timer_ = 0;
    Reconnect();
  });
}

void ShardLink::Reconnect() {
  given_up_ = options_.leases_alive();
  if (given_up_.ok() && reactor_.clock().Now() - lost_since_ > kGiveUpAfter) {
    given_up_ = Unavailable("no connection to the cache server could be made while leases live");
  }
  if (!given_up_.ok()) return;
  Result<std::unique_ptr<Endpoint>> endpoint = transport_.Connect(address_);
  if (!endpoint.ok()) return TryLater();
  UseEndpoint(std::move(*endpoint));
  attaching_ = attached_.size();
  const std::vector<Attached> again = attached_;
  for (const Attached& a : again) {
    SendAttach(a.ticket,
               [this, context = a.context](const Status& s) { OnAttachedAgain(context, s); });
  }
}

void ShardLink::OnAttachedAgain(ContextId context, const Status& status) {
  if (attaching_ == 0) return;  // the connection was lost again
  if (status.code() == StatusCode::kUnavailable || status.code() == StatusCode::kCancelled) return;
  if (status.code() == StatusCode::kDeadlineExceeded) {
    channel_->Close();
    connected_ = false;
    attaching_ = 0;
    return TryLater();
  }
  if (!status.ok()) {
    // Its lease has ended meanwhile; requests for it will be told so.
    LogInfo("a context was not attached again",
            {{"context", std::to_string(context.value)}, {"reason", status.ToString()}});
    std::erase_if(attached_, [&](const Attached& a) { return a.context == context; });
  }
  if (--attaching_ > 0) return;
  ++reconnects_done_;
  backoff_ = limits::kReconnectBackoffMin;
  const auto lost = reactor_.clock().Now() - lost_since_;
  LogInfo("data connection is back",
          {{"peer", Name()},
           {"after_ms",
            std::to_string(std::chrono::duration_cast<std::chrono::milliseconds>(lost).count())}});
}

}  // namespace icecache
