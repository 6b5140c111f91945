#include "common/wire/control_codec.h"

#include <bit>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/limits.h"
#include "common/wire/capnp_context.h"
#include "common/wire/capnp_message.h"
#include "common/wire/message_checks.h"
#include "wire/control.capnp.h"

namespace icecache::wire {
namespace {

static_assert(std::endian::native == std::endian::little, "the frame header is read with memcpy");

// ---- encode ----

std::vector<std::byte> Framed(capnp::MessageBuilder& message) {
  std::vector<std::byte> frame = FlatBytes(message, kFrameHeaderBytes);
  const auto words =
      static_cast<uint32_t>((frame.size() - kFrameHeaderBytes) / sizeof(capnp::word));
  std::memcpy(frame.data(), &words, sizeof words);
  return frame;
}

void Write(const Hello& in, schema::Request::Builder root) {
  auto out = root.initHello();
  out.setProtocolVersion(in.protocol_version);
  out.setTenant(Chars(in.tenant));
  out.setSecret(Chars(in.secret));
  out.setClient(Chars(in.client));
}
void Write(const Create& in, schema::Request::Builder root) {
  auto out = root.initCreate();
  out.setName(Chars(in.name));
  WriteShape(in.shape, out.initShape());
  out.setModel(Chars(in.model));
  out.setSinkTokens(in.sink_tokens);
  out.setWindowTokens(in.window_tokens);
  out.setPolicy(Chars(in.policy));
  out.setSeed(in.seed);
}
void Write(const Fork& in, schema::Request::Builder root) {
  auto out = root.initFork();
  out.setParent(Chars(in.parent));
  out.setName(Chars(in.name));
  out.setTokens(in.tokens);
  out.setOwner(Chars(in.owner));
  if (in.key) out.setKey(Bytes(*in.key));
}
void Write(const MatchPrefix& in, schema::Request::Builder root) {
  auto out = root.initMatchPrefix();
  out.setKeys(Bytes(std::as_bytes(std::span(in.keys))));
  out.setTokens(in.tokens);
  out.setShared(in.shared);
}
void Write(const ShareFrames& in, schema::Request::Builder root) {
  auto out = root.initShareFrames();
  out.setHost(Chars(in.host));
  out.setMemory(Bytes(in.memory));
  out.setDirectory(Bytes(in.directory));
}
void Write(const Open& in, schema::Request::Builder root) { root.setOpen(Chars(in.name)); }
void Write(const Drop& in, schema::Request::Builder root) { root.setDrop(Chars(in.name)); }
void Write(const Describe& in, schema::Request::Builder root) { root.setDescribe(Chars(in.name)); }
void Write(const Seal& in, schema::Request::Builder root) {
  root.setSeal(in.context.value);
  root.setSealKeys(Bytes(std::as_bytes(std::span(in.keys))));
}
void Write(const Publish& in, schema::Request::Builder root) {
  root.setPublish(in.context.value);
  root.setPublishDurable(in.durable);
  root.setPublishShared(in.shared);
}
void Write(const Release& in, schema::Request::Builder root) { root.setRelease(in.context.value); }
void Write(const List&, schema::Request::Builder root) { root.setList(); }
void Write(const Inspect& in, schema::Request::Builder root) {
  auto out = root.initInspect();
  out.setTopic(static_cast<uint8_t>(in.topic));
  out.setName(Chars(in.name));
}
void Write(const Drain&, schema::Request::Builder root) { root.setDrain(); }
void Write(const Renew&, schema::Request::Builder root) { root.setRenew(); }

void Write(const Status& in, schema::Reply::Builder root) {
  KV_CHECK(!in.ok());
  auto out = root.initError();
  out.setCode(static_cast<uint8_t>(in.code()));
  out.setMessage(Chars(in.message().substr(0, limits::kStatusTextBytesMax)));
}
void Write(const HelloReply& in, schema::Reply::Builder root) {
  auto out = root.initHello();
  out.setProtocolVersion(in.protocol_version);
  out.setVersion(Chars(in.version));
  auto shards = out.initShards(static_cast<unsigned>(in.shards.size()));
  for (unsigned i = 0; i < shards.size(); ++i) shards[i].setAddress(Chars(in.shards[i]));
  out.setHeartbeatMillis(in.heartbeat_ms);
}
void Write(const Grant& in, schema::Reply::Builder root) {
  auto out = root.initGrant();
  WriteContext(in.context, out.initContext());
  out.setEpoch(in.epoch.value);
  out.setTicket(Bytes(in.ticket));
  out.setLeaseMillis(in.lease_ms);
}
void Write(const Done&, schema::Reply::Builder root) { root.setDone(); }
void Write(const ContextList& in, schema::Reply::Builder root) {
  auto out = root.initContexts(static_cast<unsigned>(in.contexts.size()));
  for (unsigned i = 0; i < out.size(); ++i) WriteContext(in.contexts[i], out[i]);
}

void Write(const Prefixes& in, schema::Reply::Builder root) {
  auto out = root.initPrefixes(static_cast<unsigned>(in.candidates.size()));
  for (unsigned i = 0; i < out.size(); ++i) {
    const PrefixCandidate& from = in.candidates[i];
    out[i].setOwner(Chars(from.owner));
    out[i].setName(Chars(from.name));
    out[i].setTokens(from.tokens);
    out[i].setKey(Bytes(from.key));
  }
}

void Write(const SharedFramesList& in, schema::Reply::Builder root) {
  auto out = root.initFrames(static_cast<unsigned>(in.others.size()));
  for (unsigned i = 0; i < out.size(); ++i) {
    out[i].setId(in.others[i].id);
    out[i].setMemory(Bytes(in.others[i].memory));
    out[i].setDirectory(Bytes(in.others[i].directory));
  }
}

void Write(const Report& in, schema::Reply::Builder root) { root.setReport(Chars(in.json)); }

// ---- decode ----

Status ReadHello(const MessageChecks& check, schema::Request::Hello::Reader in, Hello* out) {
  out->protocol_version = in.getProtocolVersion();
  KV_RETURN_IF_ERROR(ReadLabel(check, "hello.tenant", View(in.getTenant()), &out->tenant));
  KV_RETURN_IF_ERROR(
      ReadText(check, "hello.secret", View(in.getSecret()), limits::kSecretBytesMax, &out->secret));
  return ReadLabel(check, "hello.client", View(in.getClient()), &out->client);
}

Status ReadCreate(const MessageChecks& check, schema::Request::Create::Reader in, Create* out) {
  KV_RETURN_IF_ERROR(ReadName(check, "create.name", View(in.getName()), &out->name));
  KV_RETURN_IF_ERROR(ReadShape(check, in.getShape(), &out->shape));
  KV_RETURN_IF_ERROR(ReadLabel(check, "create.model", View(in.getModel()), &out->model));
  KV_RETURN_IF_ERROR(ReadLabel(check, "create.policy", View(in.getPolicy()), &out->policy));
  out->sink_tokens = in.getSinkTokens();
  out->window_tokens = in.getWindowTokens();
  out->seed = in.getSeed();
  KV_RETURN_IF_ERROR(check.AtMost("create.sinkTokens", out->sink_tokens, limits::kSinkTokensMax));
  return check.AtMost("create.windowTokens", out->window_tokens, limits::kWindowTokensMax);
}

// Keys, one behind the other; at most those of the longest context.
Status ReadKeys(const MessageChecks& check, std::string_view field,
                std::span<const std::byte> bytes, std::vector<PrefixKey>* out) {
  constexpr size_t kMax = limits::kContextTokensMax / limits::kPrefixBlockTokens + 1;
  if (bytes.size() % sizeof(PrefixKey) != 0) {
    return InvalidArgument(std::string(check.message()) + ": " + std::string(field) + " has " +
                           std::to_string(bytes.size()) + " bytes, expected a multiple of " +
                           std::to_string(sizeof(PrefixKey)));
  }
  KV_RETURN_IF_ERROR(check.AtMost(field, bytes.size() / sizeof(PrefixKey), kMax));
  out->resize(bytes.size() / sizeof(PrefixKey));
  if (!bytes.empty()) std::memcpy(out->data(), bytes.data(), bytes.size());
  return OkStatus();
}

Status ReadKey(const MessageChecks& check, std::string_view field, std::span<const std::byte> bytes,
               PrefixKey* out) {
  KV_RETURN_IF_ERROR(check.Between(field, bytes.size(), out->size(), out->size()));
  std::copy(bytes.begin(), bytes.end(), out->begin());
  return OkStatus();
}

Status ReadFork(const MessageChecks& check, schema::Request::Fork::Reader in, Fork* out) {
  KV_RETURN_IF_ERROR(ReadName(check, "fork.parent", View(in.getParent()), &out->parent));
  KV_RETURN_IF_ERROR(ReadName(check, "fork.name", View(in.getName()), &out->name));
  KV_RETURN_IF_ERROR(ReadLabel(check, "fork.owner", View(in.getOwner()), &out->owner));
  out->tokens = in.getTokens();
  KV_RETURN_IF_ERROR(check.AtMost("fork.tokens", out->tokens, limits::kContextTokensMax));
  const std::span<const std::byte> key = View(in.getKey());
  return key.empty() ? OkStatus() : ReadKey(check, "fork.key", key, &out->key.emplace());
}

Status ReadMatch(const MessageChecks& check, schema::Request::MatchPrefix::Reader in,
                 MatchPrefix* out) {
  KV_RETURN_IF_ERROR(ReadKeys(check, "matchPrefix.keys", View(in.getKeys()), &out->keys));
  out->tokens = in.getTokens();
  out->shared = in.getShared();
  return check.AtMost("matchPrefix.tokens", out->tokens, limits::kContextTokensMax);
}

Status ReadPrefix(const MessageChecks& check, schema::PrefixCandidate::Reader in,
                  PrefixCandidate* out) {
  KV_RETURN_IF_ERROR(ReadLabel(check, "prefix.owner", View(in.getOwner()), &out->owner));
  KV_RETURN_IF_ERROR(ReadName(check, "prefix.name", View(in.getName()), &out->name));
  out->tokens = in.getTokens();
  KV_RETURN_IF_ERROR(check.Between("prefix.tokens", out->tokens, 1, limits::kContextTokensMax));
  return ReadKey(check, "prefix.key", View(in.getKey()), &out->key);
}

// What names frames; both or neither.
Status ReadFrames(const MessageChecks& check, std::span<const std::byte> memory,
                  std::span<const std::byte> directory, std::vector<std::byte>* memory_out,
                  std::vector<std::byte>* directory_out) {
  KV_RETURN_IF_ERROR(
      check.AtMost("frames.memory.size", memory.size(), limits::kMemoryHandleBytesMax));
  const size_t least = memory.empty() ? 0 : 1;
  const size_t most = memory.empty() ? 0 : limits::kDirectoryNameBytesMax;
  KV_RETURN_IF_ERROR(check.Between("frames.directory.size", directory.size(), least, most));
  memory_out->assign(memory.begin(), memory.end());
  directory_out->assign(directory.begin(), directory.end());
  return OkStatus();
}

Status ReadShareFrames(const MessageChecks& check, schema::Request::ShareFrames::Reader in,
                       ShareFrames* out) {
  KV_RETURN_IF_ERROR(ReadLabel(check, "shareFrames.host", View(in.getHost()), &out->host));
  return ReadFrames(check, View(in.getMemory()), View(in.getDirectory()), &out->memory,
                    &out->directory);
}

Status ReadSharedFrames(const MessageChecks& check, schema::SharedFrames::Reader in,
                        SharedFrames* out) {
  out->id = in.getId();
  const auto memory = View(in.getMemory());
  KV_RETURN_IF_ERROR(
      check.Between("frames.memory.size", memory.size(), 1, limits::kMemoryHandleBytesMax));
  return ReadFrames(check, memory, View(in.getDirectory()), &out->memory, &out->directory);
}

Status ReadInspect(const MessageChecks& check, schema::Request::Inspect::Reader in, Inspect* out) {
  KV_RETURN_IF_ERROR(check.AtMost("inspect.topic", in.getTopic(), kInspectTopics - 1));
  out->topic = static_cast<InspectTopic>(in.getTopic());
  return ReadName(check, "inspect.name", View(in.getName()), &out->name);
}

// The member of the variant is made first and then filled, so that every case is one line.
Status ReadRequest(const MessageChecks& check, schema::Request::Reader root, ControlRequest* out) {
  out->id = root.getId();
  auto& body = out->body;
  switch (root.which()) {
    case schema::Request::HELLO:
      return ReadHello(check, root.getHello(), &body.emplace<Hello>());
    case schema::Request::CREATE:
      return ReadCreate(check, root.getCreate(), &body.emplace<Create>());
    case schema::Request::OPEN:
      return ReadName(check, "open", View(root.getOpen()), &body.emplace<Open>().name);
    case schema::Request::FORK:
      return ReadFork(check, root.getFork(), &body.emplace<Fork>());
    case schema::Request::SEAL:
      body.emplace<Seal>().context = ContextId(root.getSeal());
      return ReadKeys(check, "sealKeys", View(root.getSealKeys()), &std::get<Seal>(body).keys);
    case schema::Request::PUBLISH:
      body =
          Publish{ContextId(root.getPublish()), root.getPublishDurable(), root.getPublishShared()};
      return OkStatus();
    case schema::Request::RELEASE:
      body = Release{ContextId(root.getRelease())};
      return OkStatus();
    case schema::Request::DROP:
      return ReadName(check, "drop", View(root.getDrop()), &body.emplace<Drop>().name);
    case schema::Request::LIST:
      body = List{};
      return OkStatus();
    case schema::Request::DESCRIBE:
      return ReadName(check, "describe", View(root.getDescribe()), &body.emplace<Describe>().name);
    case schema::Request::RENEW:
      body = Renew{};
      return OkStatus();
    case schema::Request::INSPECT:
      return ReadInspect(check, root.getInspect(), &body.emplace<Inspect>());
    case schema::Request::DRAIN:
      body = Drain{};
      return OkStatus();
    case schema::Request::MATCH_PREFIX:
      return ReadMatch(check, root.getMatchPrefix(), &body.emplace<MatchPrefix>());
    case schema::Request::SHARE_FRAMES:
      return ReadShareFrames(check, root.getShareFrames(), &body.emplace<ShareFrames>());
  }
  return Unimplemented("request " + std::to_string(static_cast<int>(root.which())) +
                       " is unknown here: the peer speaks a newer protocol");
}

Status ReadError(const MessageChecks& check, schema::Reply::Error::Reader in, Status* out) {
  const uint8_t code = in.getCode();
  const std::string_view text = View(in.getMessage());
  KV_RETURN_IF_ERROR(
      check.Between("error.code", code, 1, static_cast<uint8_t>(StatusCode::kInternal)));
  KV_RETURN_IF_ERROR(check.AtMost("error.message.size", text.size(), limits::kStatusTextBytesMax));
  *out = Status(static_cast<StatusCode>(code), std::string(text));
  return OkStatus();
}

Status ReadHelloReply(const MessageChecks& check, schema::Reply::Hello::Reader in,
                      HelloReply* out) {
  out->protocol_version = in.getProtocolVersion();
  out->heartbeat_ms = in.getHeartbeatMillis();
  KV_RETURN_IF_ERROR(ReadLabel(check, "hello.version", View(in.getVersion()), &out->version));
  const auto shards = in.getShards();
  KV_RETURN_IF_ERROR(check.Between("hello.shards.size", shards.size(), 1, limits::kShardsMax));
  for (const auto& shard : shards) {
    KV_RETURN_IF_ERROR(ReadLabel(check, "hello.shards.address", View(shard.getAddress()),
                                 &out->shards.emplace_back()));
  }
  return OkStatus();
}

Status ReadGrant(const MessageChecks& check, schema::Grant::Reader in, Grant* out) {
  KV_RETURN_IF_ERROR(ReadContext(check, in.getContext(), &out->context));
  out->epoch = Epoch(in.getEpoch());
  out->lease_ms = in.getLeaseMillis();
  const auto ticket = View(in.getTicket());
  KV_RETURN_IF_ERROR(check.Between("ticket.size", ticket.size(), 1, limits::kTicketBytesMax));
  out->ticket.assign(ticket.begin(), ticket.end());
  return OkStatus();
}

Status ReadReply(const MessageChecks& check, schema::Reply::Reader root, ControlReply* out) {
  out->id = root.getId();
  auto& body = out->body;
  switch (root.which()) {
    case schema::Reply::ERROR:
      return ReadError(check, root.getError(), &body.emplace<Status>());
    case schema::Reply::HELLO:
      return ReadHelloReply(check, root.getHello(), &body.emplace<HelloReply>());
    case schema::Reply::GRANT:
      return ReadGrant(check, root.getGrant(), &body.emplace<Grant>());
    case schema::Reply::DONE:
      body = Done{};
      return OkStatus();
    case schema::Reply::CONTEXTS: {
      auto& list = body.emplace<ContextList>().contexts;
      const auto contexts = root.getContexts();
      KV_RETURN_IF_ERROR(check.AtMost("contexts.size", contexts.size(), limits::kContextsMax));
      for (const auto& context : contexts) {
        KV_RETURN_IF_ERROR(ReadContext(check, context, &list.emplace_back()));
      }
      return OkStatus();
    }
    case schema::Reply::PREFIXES: {
      auto& list = body.emplace<Prefixes>().candidates;
      const auto prefixes = root.getPrefixes();
      KV_RETURN_IF_ERROR(
          check.AtMost("prefixes.size", prefixes.size(), limits::kPrefixCandidatesMax));
      for (const auto& prefix : prefixes) {
        KV_RETURN_IF_ERROR(ReadPrefix(check, prefix, &list.emplace_back()));
      }
      return OkStatus();
    }
    case schema::Reply::FRAMES: {
      auto& list = body.emplace<SharedFramesList>().others;
      const auto frames = root.getFrames();
      KV_RETURN_IF_ERROR(check.AtMost("frames.size", frames.size(), limits::kSharingWorkersMax));
      for (const auto& one : frames) {
        KV_RETURN_IF_ERROR(ReadSharedFrames(check, one, &list.emplace_back()));
      }
      return OkStatus();
    }
    case schema::Reply::REPORT:
      return ReadText(check, "report", View(root.getReport()), limits::kControlMessageBytesMax,
                      &body.emplace<Report>().json);
  }
  return Unimplemented("reply " + std::to_string(static_cast<int>(root.which())) +
                       " is unknown here: the peer speaks a newer protocol");
}

Status CheckFrame(std::span<const std::byte> frame) {
  if (frame.size() < kFrameHeaderBytes) {
    return InvalidArgument("control frame: " + std::to_string(frame.size()) +
                           " bytes, expected at least " + std::to_string(kFrameHeaderBytes));
  }
  KV_ASSIGN_OR_RETURN(const size_t bytes, FrameBytes(frame.first<kFrameHeaderBytes>()));
  if (bytes == frame.size()) return OkStatus();
  return InvalidArgument("control frame: " + std::to_string(frame.size()) + " bytes, expected " +
                         std::to_string(bytes) + " by its header");
}

}  // namespace

std::vector<std::byte> EncodeFrame(const ControlRequest& request) {
  capnp::MallocMessageBuilder message;
  auto root = message.initRoot<schema::Request>();
  root.setId(request.id);
  std::visit([&](const auto& body) { Write(body, root); }, request.body);
  return Framed(message);
}

std::vector<std::byte> EncodeFrame(const ControlReply& reply) {
  capnp::MallocMessageBuilder message;
  auto root = message.initRoot<schema::Reply>();
  root.setId(reply.id);
  std::visit([&](const auto& body) { Write(body, root); }, reply.body);
  const size_t bytes = capnp::computeSerializedSizeInWords(message) * sizeof(capnp::word);
  if (kFrameHeaderBytes + bytes <= limits::kControlMessageBytesMax) return Framed(message);
  return EncodeFrame(ControlReply{
      reply.id, ResourceExhausted("the reply has " + std::to_string(bytes) +
                                  " bytes, more than a control message may have (" +
                                  std::to_string(limits::kControlMessageBytesMax) +
                                  "): describe contexts by name instead of listing them")});
}

Result<size_t> FrameBytes(std::span<const std::byte, kFrameHeaderBytes> header) {
  uint32_t words = 0;
  std::memcpy(&words, header.data(), sizeof words);
  const size_t bytes = kFrameHeaderBytes + size_t{words} * sizeof(capnp::word);
  if (words > 0 && bytes <= limits::kControlMessageBytesMax) return bytes;
  return InvalidArgument("control frame of " + std::to_string(words) +
                         " words, expected 1 word and up to " +
                         std::to_string(limits::kControlMessageBytesMax) +
                         " bytes; is the peer an icecache program on its control port?");
}

Result<ControlRequest> DecodeRequest(std::span<const std::byte> frame) {
  KV_RETURN_IF_ERROR(CheckFrame(frame));
  const MessageChecks check("control request");
  return ReadFlat<schema::Request>(check.message(), frame.subspan(kFrameHeaderBytes),
                                   [&](schema::Request::Reader root) -> Result<ControlRequest> {
                                     ControlRequest out;
                                     KV_RETURN_IF_ERROR(ReadRequest(check, root, &out));
                                     return out;
                                   });
}

Result<ControlReply> DecodeReply(std::span<const std::byte> frame) {
  KV_RETURN_IF_ERROR(CheckFrame(frame));
  const MessageChecks check("control reply");
  return ReadFlat<schema::Reply>(check.message(), frame.subspan(kFrameHeaderBytes),
                                 [&](schema::Reply::Reader root) -> Result<ControlReply> {
                                   ControlReply out;
                                   KV_RETURN_IF_ERROR(ReadReply(check, root, &out));
                                   return out;
                                 });
}

}  // namespace icecache::wire
