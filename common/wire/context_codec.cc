#include <string>

#include "common/limits.h"
#include "common/wire/capnp_context.h"
#include "common/wire/capnp_message.h"

namespace icecache::wire {

void WriteShape(const ModelShape& in, schema::Shape::Builder out) {
  out.setLayers(in.layers);
  out.setKvHeads(in.kv_heads);
  out.setQueryHeads(in.query_heads);
  out.setHeadDim(in.head_dim);
  out.setDtype(static_cast<uint8_t>(in.dtype));
}

void WriteContext(const ContextInfo& in, schema::ContextInfo::Builder out) {
  out.setId(in.id.value);
  out.setName(Chars(in.name));
  WriteShape(in.shape, out.initShape());
  out.setModel(Chars(in.model));
  out.setTokens(in.tokens);
  out.setSinkTokens(in.sink_tokens);
  out.setWindowTokens(in.window_tokens);
  out.setTailTokens(in.tail_tokens);
  out.setPolicy(Chars(in.policy));
  out.setSeed(in.seed);
  out.setSealed(in.sealed);
  out.setPublished(in.published);
  out.setDurable(in.durable);
  out.setShared(in.shared);
  out.setPrefixKeys(in.prefix_keys);
  out.setPrefixForks(in.prefix_forks);
  out.setPrefixTokens(in.prefix_tokens);
  out.setTenant(Chars(in.tenant));
  auto segments = out.initSegments(static_cast<unsigned>(in.segments.size()));
  for (unsigned i = 0; i < segments.size(); ++i) {
    const SegmentInfo& from = in.segments[i];
    auto segment = segments[i];
    segment.setId(from.id.value);
    segment.setTokens(from.tokens);
    segment.setSealed(from.sealed);
    segment.setReferences(from.references);
    segment.setBytes(from.bytes);
    segment.setIndexBytes(from.index_bytes);
    segment.setMerged(from.merged);
  }
}

Status ReadText(const MessageChecks& check, std::string_view field, std::string_view text,
                size_t bytes_max, std::string* out) {
  KV_RETURN_IF_ERROR(check.Text(field, text, bytes_max));
  out->assign(text);
  return OkStatus();
}
Status ReadName(const MessageChecks& check, std::string_view field, std::string_view text,
                std::string* out) {
  return ReadText(check, field, text, limits::kContextNameBytesMax, out);
}
Status ReadLabel(const MessageChecks& check, std::string_view field, std::string_view text,
                 std::string* out) {
  return ReadText(check, field, text, limits::kTextBytesMax, out);
}

Status ReadShape(const MessageChecks& check, schema::Shape::Reader in, ModelShape* out) {
  out->layers = in.getLayers();
  out->kv_heads = in.getKvHeads();
  out->query_heads = in.getQueryHeads();
  out->head_dim = in.getHeadDim();
  out->dtype = static_cast<DType>(in.getDtype());
  return out->Validate().WithContext(check.message());
}

Status ReadContext(const MessageChecks& check, schema::ContextInfo::Reader in, ContextInfo* out) {
  out->id = ContextId(in.getId());
  KV_RETURN_IF_ERROR(ReadName(check, "name", View(in.getName()), &out->name));
  KV_RETURN_IF_ERROR(ReadShape(check, in.getShape(), &out->shape));
  KV_RETURN_IF_ERROR(ReadLabel(check, "model", View(in.getModel()), &out->model));
  KV_RETURN_IF_ERROR(ReadLabel(check, "policy", View(in.getPolicy()), &out->policy));
  KV_RETURN_IF_ERROR(ReadLabel(check, "tenant", View(in.getTenant()), &out->tenant));
  out->tokens = in.getTokens();
  out->sink_tokens = in.getSinkTokens();
  out->window_tokens = in.getWindowTokens();
  out->tail_tokens = in.getTailTokens();
  out->seed = in.getSeed();
  out->sealed = in.getSealed();
  out->published = in.getPublished();
  out->durable = in.getDurable();
  out->shared = in.getShared();
  out->prefix_keys = in.getPrefixKeys();
  out->prefix_forks = in.getPrefixForks();
  out->prefix_tokens = in.getPrefixTokens();
  KV_RETURN_IF_ERROR(check.AtMost("tokens", out->tokens, limits::kContextTokensMax));
  KV_RETURN_IF_ERROR(check.AtMost("sinkTokens", out->sink_tokens, limits::kSinkTokensMax));
  KV_RETURN_IF_ERROR(check.AtMost("windowTokens", out->window_tokens, limits::kWindowTokensMax));
  KV_RETURN_IF_ERROR(check.AtMost("tailTokens", out->tail_tokens, limits::kWindowTokensMax));
  const auto segments = in.getSegments();
  KV_RETURN_IF_ERROR(
      check.AtMost("segments.size", segments.size(), limits::kSegmentsPerContextMax));
  out->segments.reserve(segments.size());
  for (const auto& segment : segments) {
    KV_RETURN_IF_ERROR(
        check.AtMost("segment.tokens", segment.getTokens(), limits::kContextTokensMax));
    out->segments.push_back({SegmentId(segment.getId()), segment.getTokens(), segment.getSealed(),
                             segment.getReferences(), segment.getBytes(), segment.getIndexBytes(),
                             segment.getMerged()});
  }
  return OkStatus();
}

}  // namespace icecache::wire
