// Control-plane frames, requests and replies: what decodes must encode and decode to the same
// again.
#include "common/wire/control_codec.h"

#include <set>
#include <utility>
#include <variant>

#include "tests/fuzz/fuzz_target.h"

namespace icecache::fuzz {
namespace {

std::string Frame(const std::vector<std::byte>& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

template <typename Message, typename Decode>
void Check(const Message& message, Decode decode) {
  const std::vector<std::byte> once = wire::EncodeFrame(message);
  const auto again = decode(once);
  if (!again.ok()) Broken("an accepted frame re-encodes to an accepted frame");
  if (wire::EncodeFrame(again.value()) != once) Broken("encoding is a function of the message");
}

void CheckFrame(const std::string& input) {
  const auto bytes = std::as_bytes(std::span(input));
  if (bytes.size() >= wire::kFrameHeaderBytes)
    (void)wire::FrameBytes(bytes.first<wire::kFrameHeaderBytes>());
  if (const auto request = wire::DecodeRequest(bytes); request.ok())
    Check(request.value(), wire::DecodeRequest);
  if (const auto reply = wire::DecodeReply(bytes); reply.ok())
    Check(reply.value(), wire::DecodeReply);
}

// Kinds of messages that have a target.
template <typename Message>
std::set<size_t>& Kinds() {
  static std::set<size_t> kinds;
  return kinds;
}

template <typename Message>
void CheckAllKinds() {
  if (Kinds<Message>().size() != std::variant_size_v<decltype(Message::body)>)
    Broken("every kind of message has a target");
}

template <typename Message>
Target Of(const char* name, const std::vector<Message>& messages) {
  Target target{name, {}, CheckFrame};
  for (const Message& message : messages) {
    Kinds<Message>().insert(message.body.index());
    target.seeds.push_back(Frame(wire::EncodeFrame(message)));
  }
  return target;
}

Target Request(const char* name, wire::ControlRequest request) {
  return Of<wire::ControlRequest>(name, {std::move(request)});
}
// fuller: the same with what is optional.
Target Request(const char* name, wire::ControlRequest request, wire::ControlRequest fuller) {
  return Of<wire::ControlRequest>(name, {std::move(request), std::move(fuller)});
}
Target Reply(const char* name, wire::ControlReply reply) {
  return Of<wire::ControlReply>(name, {std::move(reply)});
}

}  // namespace

std::vector<Target> Targets() {
  const ModelShape shape{.layers = 4, .kv_heads = 2, .query_heads = 8, .head_dim = 64};
  wire::ContextInfo info{.id = ContextId(3),
                         .name = "doc",
                         .shape = shape,
                         .model = "recall",
                         .tokens = 16384,
                         .sink_tokens = 16,
                         .window_tokens = 16,
                         .policy = "cluster_tree",
                         .tenant = "alice"};
  info.segments.push_back(
      {.id = SegmentId(9), .tokens = 16384, .sealed = true, .references = 2, .bytes = 1 << 20});
  const wire::Grant grant{
      .context = info, .epoch = Epoch(5), .ticket = std::vector<std::byte>(32), .lease_ms = 10000};
  const wire::HelloReply hello{
      .version = "0.1.0", .shards = {"127.0.0.1:1", "127.0.0.1:2"}, .heartbeat_ms = 200};
  const wire::Create create{.name = "doc",
                            .shape = shape,
                            .model = "recall",
                            .sink_tokens = 16,
                            .window_tokens = 16,
                            .policy = "cluster_tree"};
  PrefixKey key{};
  key[0] = std::byte{5};
  std::vector<Target> targets = {
      Request("hello", {7, wire::Hello{.tenant = "alice", .secret = "s", .client = "worker 1"}}),
      Request("create", {7, create}),
      Request("open", {7, wire::Open{"doc"}}),
      Request("fork", {7, wire::Fork{"doc", "doc-2"}},
              {7, wire::Fork{"doc", "doc-2", 512, "alice", key}}),
      Request("seal", {7, wire::Seal{ContextId(3)}}, {7, wire::Seal{ContextId(3), {key, key}}}),
      Request("publish", {7, wire::Publish{ContextId(3), true}}),
      Request("release", {7, wire::Release{ContextId(3)}}),
      Request("drop", {7, wire::Drop{"doc"}}),
      Request("list", {7, wire::List{}}),
      Request("describe", {7, wire::Describe{"doc"}}),
      Request("renew", {7, wire::Renew{}}),
      Request("inspect", {7, wire::Inspect{wire::InspectTopic::kExplain, "doc"}}),
      Request("drain", {7, wire::Drain{}}),
      Request("share_frames", {7, wire::ShareFrames{"host", std::vector(200, std::byte{1}),
                                                    std::vector(40, std::byte{2})}}),
      Request("match_prefix", {7, wire::MatchPrefix{{key, key}, 1000, true}}),
      Reply("status_reply", {7, NotFound("no context 'doc'")}),
      Reply("hello_reply", {7, hello}),
      Reply("grant_reply", {7, grant}),
      Reply("done_reply", {7, wire::Done{}}),
      Reply("list_reply", {7, wire::ContextList{{info, info}}}),
      Reply("frames_reply", {7, wire::SharedFramesList{{{3, std::vector(200, std::byte{1}),
                                                         std::vector(40, std::byte{2})}}}}),
      Reply("report_reply", {7, wire::Report{"{\"contexts\": []}"}}),
      Reply("prefixes_reply", {7, wire::Prefixes{{{"alice", "doc", 512, key}}}}),
  };
  CheckAllKinds<wire::ControlRequest>();
  CheckAllKinds<wire::ControlReply>();
  return targets;
}

}  // namespace icecache::fuzz
