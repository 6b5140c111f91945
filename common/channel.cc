#include "common/channel.h"

#include <algorithm>
#include <deque>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>

#include "common/wire/data_codec.h"

namespace icecache {
namespace {

// A message counts as a sign of life when it has come completely. A large one on a slow link or a
// crowded machine takes its time, so it is announced with what it may take at the slowest rate
// worth waiting for.
constexpr uint64_t kLargeBytes = 256 << 10;
constexpr uint64_t kSlowestBytesPerSecond = 8 << 20;

}  // namespace

struct Channel::Impl : std::enable_shared_from_this<Channel::Impl> {
  Impl(Reactor& r, std::unique_ptr<Endpoint> e, ChannelOptions o)
      : reactor(r), options(o), endpoint(std::move(e)) {}

  struct Call {
    Done done;
    TimePoint deadline;
    Duration allowed;
  };
  // A call that was refused: it fails on a later turn, never from inside Call.
  struct Refused {
    uint64_t id;
    Done done;
    Status status;
  };

  void Start();
  // False: refused, which the call hears of later.
  bool Register(uint64_t id, Duration deadline, Done done);
  uint64_t StartCall(OutMessage request, Duration deadline, Done done);
  void StartCalls(std::vector<Request> requests, const Join& join);
  void Send(OutMessage message);
  void OnMessage(const InMessage& message);
  void OnReply(const InMessage& message);
  void Tick();
  void SendHeartbeat(Duration announce);
  void ArmTimer();
  void ExpireCalls(TimePoint now);
  void EndRefused();
  void FailAll(const Status& status);
  void Lose(Status status);
  void Shut(const Status& status);
  bool EndCall(uint64_t id, Result<InMessage> result);
  TimePoint Now() const { return reactor.clock().Now(); }
  TimePoint SilenceLimit() const {
    return last_heard + std::max(announced, options.heartbeat_interval * options.heartbeat_misses);
  }

  Reactor& reactor;
  const ChannelOptions options;
  const std::unique_ptr<Endpoint> endpoint;

  std::shared_ptr<std::function<void(const InMessage&)>> on_request;
  std::function<void(Status)> on_closed;
  std::unordered_map<uint64_t, Call> calls;
  std::set<std::pair<TimePoint, uint64_t>> deadlines;  // of `calls`, earliest first
  std::deque<Refused> refused;
  uint64_t next_id = 1;
  Reactor::TimerId timer = 0, refused_timer = 0;
  TimePoint timer_at, last_heard, last_sent;
  Duration announced{0};  // silence the peer has asked for, until its next message
  bool closed = false;
  Status lost = Unavailable("the connection is closed");  // what calls are told once it is
};

void Channel::Impl::Start() {
  KV_CHECK(options.heartbeat_interval > Duration(0) && options.heartbeat_misses > 0);
  last_heard = last_sent = Now();
  const std::weak_ptr<Impl> weak = weak_from_this();
  endpoint->SetHandlers(
      [weak](const InMessage& message) {
        if (const auto self = weak.lock()) self->OnMessage(message);
      },
      [weak](Status status) {
        if (const auto self = weak.lock()) self->Lose(std::move(status));
      });
  ArmTimer();
}

// One timer per channel, at the earliest of: a deadline, the next heartbeat due, the peer's
// silence.
void Channel::Impl::ArmTimer() {
  if (closed) return;
  TimePoint at = std::min(last_sent + options.heartbeat_interval, SilenceLimit());
  if (!deadlines.empty()) at = std::min(at, deadlines.begin()->first);
  reactor.Cancel(timer);
  timer_at = at;
  timer = reactor.After(at - Now(), [weak = weak_from_this()] {
    if (const auto self = weak.lock()) self->Tick();
  });
}

void Channel::Impl::Tick() {
  timer = 0;
  const TimePoint now = Now();
  // When this thread itself was away (a long computation, a debugger, SIGSTOP), the peer's
  // heartbeats wait unread: hear them out before judging.
  if (now - timer_at > options.heartbeat_interval) {
    last_heard = std::max(last_heard, now - options.heartbeat_interval);
  }
  ExpireCalls(now);
  if (closed) return;
  if (now >= SilenceLimit()) {
    const auto silent = std::chrono::duration_cast<std::chrono::milliseconds>(now - last_heard);
    Status status = Unavailable("no sign of life from " + endpoint->Describe() + " for " +
                                std::to_string(silent.count()) + " ms");
    endpoint->Close();
    return Lose(std::move(status));
  }
  if (now - last_sent >= options.heartbeat_interval) {
    SendHeartbeat(Duration(0));
  }
  ArmTimer();
}

void Channel::Impl::SendHeartbeat(Duration announce) {
  OutMessage heartbeat;
  heartbeat.kind = kKindHeartbeat;
  heartbeat.flags = kFlagOneWay;
  heartbeat.id = static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::milliseconds>(announce).count());
  Send(std::move(heartbeat));
}

void Channel::Impl::ExpireCalls(TimePoint now) {
  while (!closed && !deadlines.empty() && deadlines.begin()->first <= now) {
    const uint64_t id = deadlines.begin()->second;
    const auto allowed =
        std::chrono::duration_cast<std::chrono::milliseconds>(calls.at(id).allowed);
    EndCall(id, DeadlineExceeded("no reply from " + endpoint->Describe() + " within " +
                                 std::to_string(allowed.count()) + " ms"));
  }
}

bool Channel::Impl::EndCall(uint64_t id, Result<InMessage> result) {
  const auto it = calls.find(id);
  if (it == calls.end()) return false;
  const Done done = std::move(it->second.done);
  deadlines.erase({it->second.deadline, id});
  calls.erase(it);
  done(std::move(result));
  return true;
}

void Channel::Impl::Send(OutMessage message) {
  uint64_t bytes = message.meta.size();
  for (const auto& part : message.body) bytes += part.size();
  if (bytes >= kLargeBytes) {
    SendHeartbeat(options.heartbeat_interval * options.heartbeat_misses +
                  std::chrono::milliseconds(bytes * 1000 / kSlowestBytesPerSecond));
  }
  last_sent = Now();
  endpoint->Send(std::move(message));
}

bool Channel::Impl::Register(uint64_t id, Duration deadline, Done done) {
  if (closed || calls.size() >= options.in_flight_max) {
    Status status = closed ? lost
                           : ResourceExhausted(std::to_string(calls.size()) +
                                               " calls are in flight on this connection, the "
                                               "maximum: wait for replies");
    refused.push_back({id, std::move(done), std::move(status)});
    if (refused_timer == 0) {
      refused_timer = reactor.After(Duration(0), [weak = weak_from_this()] {
        if (const auto self = weak.lock()) self->EndRefused();
      });
    }
    return false;
  }
  const TimePoint at = Now() + deadline;
  calls.emplace(id, Call{std::move(done), at, deadline});
  deadlines.emplace(at, id);
  if (at < timer_at) ArmTimer();
  return true;
}

uint64_t Channel::Impl::StartCall(OutMessage request, Duration deadline, Done done) {
  const uint64_t id = next_id++;
  if (!Register(id, deadline, std::move(done))) return id;
  request.id = id;
  request.flags = 0;
  request.patience = deadline;
  Send(std::move(request));
  return id;
}

void Channel::Impl::StartCalls(std::vector<Request> requests, const Join& join) {
  std::vector<OutMessage> messages;
  Duration patience{0};  // while anybody waits
  for (Request& request : requests) {
    const uint64_t id = next_id++;
    if (!Register(id, request.deadline, std::move(request.done))) continue;
    request.message.id = id;
    patience = std::max(patience, request.deadline);
    messages.push_back(std::move(request.message));
  }
  if (messages.empty()) return;
  OutMessage joined = join(messages);
  joined.flags = 0;
  joined.patience = patience;
  Send(std::move(joined));
}

void Channel::Impl::EndRefused() {
  // Those that are refused while these end wait for the next turn.
  for (size_t n = refused.size(); n > 0 && !refused.empty(); --n) {
    const Refused call = std::move(refused.front());
    refused.pop_front();
    call.done(call.status);
  }
  refused_timer = 0;
  if (refused.empty()) return;
  refused_timer = reactor.After(Duration(0), [weak = weak_from_this()] {
    if (const auto self = weak.lock()) self->EndRefused();
  });
}

void Channel::Impl::OnMessage(const InMessage& message) {
  last_heard = Now();
  announced = Duration(0);
  if ((message.flags & kFlagReply) != 0) return OnReply(message);
  if (message.kind == kKindHeartbeat) {
    // The id of a heartbeat is the silence announced, in milliseconds; usually none.
    const uint64_t ms_max = limits::kSilenceAnnouncedMax.count();
    announced = std::chrono::milliseconds(std::min(message.id, ms_max));
    return;
  }
  if (on_request != nullptr) {
    const auto handler = on_request;  // it may be replaced, or the channel destroyed, inside
    return (*handler)(message);
  }
  if ((message.flags & kFlagOneWay) != 0) return;
  OutMessage reply;
  wire::EncodeStatus(Unimplemented("nobody answers requests on this side"), &reply);
  reply.kind = message.kind;
  reply.id = message.id;
  reply.flags = kFlagReply | kFlagError;
  Send(std::move(reply));
}

void Channel::Impl::OnReply(const InMessage& message) {
  if ((message.flags & kFlagError) != 0) {
    EndCall(message.id, wire::DecodeStatus(message));
  } else {
    EndCall(message.id, message);  // unknown: the call has ended by its deadline or was cancelled
  }
}

// Each callback may make calls (refused now) or destroy the channel (which empties the tables).
void Channel::Impl::FailAll(const Status& status) {
  while (!calls.empty()) EndCall(calls.begin()->first, status);
  while (!refused.empty()) {
    const Refused call = std::move(refused.front());
    refused.pop_front();
    call.done(call.status);
  }
}

void Channel::Impl::Lose(Status status) {
  if (closed) return;
  const auto self = shared_from_this();
  closed = true;
  if (status.code() == StatusCode::kUnavailable) lost = status;
  reactor.Cancel(timer);
  timer = 0;
  while (!calls.empty()) EndCall(calls.begin()->first, status);
  const auto handler = std::move(on_closed);
  on_closed = nullptr;
  if (handler) handler(std::move(status));
}

void Channel::Impl::Shut(const Status& status) {
  closed = true;
  on_closed = nullptr;
  on_request = nullptr;
  reactor.Cancel(timer);
  reactor.Cancel(refused_timer);
  timer = refused_timer = 0;
  endpoint->Close();
  FailAll(status);
}

Channel::Channel(Reactor& reactor, std::unique_ptr<Endpoint> endpoint, ChannelOptions options)
    : impl_(std::make_shared<Impl>(reactor, std::move(endpoint), options)) {
  impl_->Start();
}

Channel::~Channel() { impl_->Shut(Cancelled("the channel was destroyed")); }

uint64_t Channel::Call(OutMessage request, Duration deadline, Done done) {
  return impl_->StartCall(std::move(request), deadline, std::move(done));
}

void Channel::CallTogether(std::vector<Request> requests, const Join& join) {
  impl_->StartCalls(std::move(requests), join);
}

void Channel::CancelCall(uint64_t id) {
  const auto self = impl_;
  if (self->EndCall(id, Cancelled("cancelled by the caller"))) return;
  for (auto it = self->refused.begin(); it != self->refused.end(); ++it) {
    if (it->id != id) continue;
    const Done done = std::move(it->done);
    self->refused.erase(it);
    return done(Cancelled("cancelled by the caller"));
  }
}

void Channel::SendOneWay(OutMessage message) {
  if (impl_->closed) return;
  message.flags = kFlagOneWay;
  impl_->Send(std::move(message));
}

void Channel::SetHandler(std::function<void(const InMessage&)> on_request) {
  impl_->on_request =
      std::make_shared<std::function<void(const InMessage&)>>(std::move(on_request));
}

void Channel::Reply(uint64_t id, OutMessage reply) {
  if (impl_->closed) return;
  reply.id = id;
  reply.flags = kFlagReply;
  impl_->Send(std::move(reply));
}

void Channel::ReplyError(uint64_t id, const Status& status) {
  if (impl_->closed) return;
  OutMessage reply;
  wire::EncodeStatus(status, &reply);
  reply.id = id;
  reply.flags = kFlagReply | kFlagError;
  impl_->Send(std::move(reply));
}

void Channel::AnnounceSilence(Duration at_most) {
  if (!impl_->closed) impl_->SendHeartbeat(at_most);
}

void Channel::SetOnClosed(std::function<void(Status)> on_closed) {
  impl_->on_closed = std::move(on_closed);
}

bool Channel::closed() const { return impl_->closed; }

void Channel::Close() {
  const auto self = impl_;
  if (!self->closed) self->Shut(Cancelled("the channel was closed"));
}

Endpoint& Channel::endpoint() { return *impl_->endpoint; }

uint32_t Channel::calls_in_flight() const { return static_cast<uint32_t>(impl_->calls.size()); }

}  // namespace icecache
