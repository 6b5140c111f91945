// Control-plane frames, requests and replies: what decodes must encode and decode to the same
// again.
#include "common/wire/control_codec.h"
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

}  // namespace

std::vector<std::string> Seeds() {
  const ModelShape shape{.layers = 4, .kv_heads = 2, .query_heads = 8, .head_dim = 64};
  std::vector<std::string> seeds;
  const auto request = [&](auto body) {
    seeds.push_back(Frame(wire::EncodeFrame(wire::ControlRequest{7, body})));
  };
  const auto reply = [&](auto body) {
    seeds.push_back(Frame(wire::EncodeFrame(wire::ControlReply{7, body})));
  };
  request(wire::Hello{.tenant = "alice", .secret = "s3cret", .client = "worker 1"});
  request(wire::Create{.name = "doc",
                       .shape = shape,
                       .model = "recall",
                       .sink_tokens = 16,
                       .window_tokens = 16,
                       .policy = "cluster_tree"});
  request(wire::Open{"doc"});
  request(wire::Fork{"doc", "doc-2"});
  request(wire::Seal{ContextId(3)});
  request(wire::Publish{ContextId(3)});
  request(wire::Release{ContextId(3)});
  request(wire::Drop{"doc"});
  request(wire::List{});
  request(wire::Describe{"doc"});
  request(wire::Renew{});
  request(wire::Inspect{wire::InspectTopic::kExplain, "doc"});
  request(wire::Drain{});
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
  reply(NotFound("no context 'doc'"));
  reply(wire::HelloReply{
      .version = "0.1.0", .shards = {"127.0.0.1:1", "127.0.0.1:2"}, .heartbeat_ms = 200});
  reply(wire::Grant{
      .context = info, .epoch = Epoch(5), .ticket = std::vector<std::byte>(32), .lease_ms = 10000});
  reply(wire::Done{});
  reply(wire::ContextList{{info, info}});
  reply(wire::Report{"{\"contexts\": []}"});
  return seeds;
}

}  // namespace icecache::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace icecache;
  const auto bytes = std::as_bytes(std::span(data, size));
  if (size >= wire::kFrameHeaderBytes)
    (void)wire::FrameBytes(bytes.first<wire::kFrameHeaderBytes>());
  if (const auto request = wire::DecodeRequest(bytes); request.ok())
    fuzz::Check(request.value(), wire::DecodeRequest);
  if (const auto reply = wire::DecodeReply(bytes); reply.ok())
    fuzz::Check(reply.value(), wire::DecodeReply);
  return 0;
}
