#include "cacheserver/context/manifest.h"

#include <cstring>

#include "cacheserver/store/blob.h"
#include "common/limits.h"

namespace icecache {
namespace {

constexpr BlobFormat kContextFormat{0x4e4d4349, 2, "record of a durable context"};  // "ICMN"
constexpr BlobFormat kSegmentFormat{0x47534349, 1, "record of a segment"};          // "ICSG"
constexpr BlobFormat kStartFormat{0x54534349, 1, "record of the last start"};       // "ICST"

void PutShape(BlobWriter& out, const ModelShape& shape) {
  out.Put(shape.layers);
  out.Put(shape.kv_heads);
  out.Put(shape.query_heads);
  out.Put(shape.head_dim);
  out.Put(static_cast<uint8_t>(shape.dtype));
}

ModelShape GetShape(BlobReader& in) {
  ModelShape shape;
  shape.layers = in.Get<uint32_t>();
  shape.kv_heads = in.Get<uint32_t>();
  shape.query_heads = in.Get<uint32_t>();
  shape.head_dim = in.Get<uint32_t>();
  shape.dtype = static_cast<DType>(in.Get<uint8_t>());
  return shape;
}

Status CheckChain(const ContextManifest& manifest) {
  const auto broken = [](const std::string& what) {
    return DataLoss(std::string(kContextFormat.name) + ": " + what);
  };
  if (manifest.segments.empty()) return broken("it has no segment");
  uint32_t first = 0;
  for (const SegmentManifest& s : manifest.segments) {
    if (s.first_position != first || s.tail_first < s.first_position || s.end < s.tail_first ||
        s.end > limits::kContextTokensMax || s.end - s.tail_first > limits::kWindowTokensMax) {
      return broken("segment " + std::to_string(s.id.value) + " does not join its parent");
    }
    first = s.tail_first;
  }
  if (manifest.sink_tokens > limits::kSinkTokensMax ||
      manifest.window_tokens > limits::kWindowTokensMax) {
    return broken("its sinks or window are too large");
  }
  return manifest.shape.Validate().WithContext(kContextFormat.name);
}

}  // namespace

std::string EncodeManifest(const ContextManifest& m) {
  BlobWriter out(kContextFormat);
  out.PutText(m.tenant);
  out.PutText(m.name);
  PutShape(out, m.shape);
  out.PutText(m.model);
  out.Put(m.sink_tokens);
  out.Put(m.window_tokens);
  out.PutText(PolicyKindName(m.policy));
  out.Put(m.seed);
  out.Put<uint64_t>(m.segments.size());
  for (const SegmentManifest& s : m.segments) {
    out.Put(s.id.value);
    out.PutText(s.tenant);
    out.Put(s.first_position);
    out.Put(s.tail_first);
    out.Put(s.end);
  }
  out.Put(static_cast<uint8_t>(m.shared));
  out.PutBytes(std::as_bytes(std::span(m.prefix_keys)));
  return out.Finish();
}

Result<ContextManifest> DecodeManifest(std::string_view blob) {
  BlobReader in(kContextFormat, blob);
  ContextManifest m;
  m.tenant = in.GetText(limits::kTextBytesMax);
  m.name = in.GetText(limits::kContextNameBytesMax);
  m.shape = GetShape(in);
  m.model = in.GetText(limits::kTextBytesMax);
  m.sink_tokens = in.Get<uint32_t>();
  m.window_tokens = in.Get<uint32_t>();
  const std::string policy = in.GetText(limits::kTextBytesMax);
  m.seed = in.Get<uint64_t>();
  const uint64_t segments = in.GetCount(sizeof(uint64_t));
  for (uint64_t i = 0; i < segments && in.status().ok(); ++i) {
    if (i >= limits::kSegmentsPerContextMax) {
      in.Fail("it has more segments than a chain may have");
      break;
    }
    SegmentManifest& s = m.segments.emplace_back();
    s.id = SegmentId(in.Get<uint64_t>());
    s.tenant = in.GetText(limits::kTextBytesMax);
    s.first_position = in.Get<uint32_t>();
    s.tail_first = in.Get<uint32_t>();
    s.end = in.Get<uint32_t>();
  }
  if (in.version() >= 2) {
    m.shared = in.Get<uint8_t>() != 0;
    const std::span<const std::byte> keys = in.GetBytes();
    const uint32_t tokens = m.segments.empty() ? 0 : m.segments.back().end;
    if (!keys.empty() && keys.size() != PrefixKeyCount(tokens) * sizeof(PrefixKey)) {
      in.Fail("its prefix keys are not those of its tokens");
    } else {
      m.prefix_keys.resize(keys.size() / sizeof(PrefixKey));
      if (!keys.empty()) std::memcpy(m.prefix_keys.data(), keys.data(), keys.size());
    }
  }
  KV_RETURN_IF_ERROR(in.Finish());
  const Result<PolicyKind> kind = ParsePolicyKind(policy);
  if (!kind.ok()) return DataLoss(std::string(kContextFormat.name) + ": unknown policy " + policy);
  m.policy = *kind;
  KV_RETURN_IF_ERROR(CheckChain(m));
  return m;
}

std::string EncodeSegmentRecord(SegmentId segment) {
  BlobWriter out(kSegmentFormat);
  out.Put(segment.value);
  return out.Finish();
}

Status CheckSegmentRecord(std::string_view blob, SegmentId segment) {
  BlobReader in(kSegmentFormat, blob);
  const auto id = in.Get<uint64_t>();
  KV_RETURN_IF_ERROR(in.Finish());
  if (id == segment.value) return OkStatus();
  return DataLoss(std::string(kSegmentFormat.name) + ": it is of segment " + std::to_string(id) +
                  ", expected " + std::to_string(segment.value));
}

std::string EncodeStartRecord(uint64_t first_id) {
  BlobWriter out(kStartFormat);
  out.Put(first_id);
  return out.Finish();
}

Result<uint64_t> DecodeStartRecord(std::string_view blob) {
  BlobReader in(kStartFormat, blob);
  const auto first_id = in.Get<uint64_t>();
  KV_RETURN_IF_ERROR(in.Finish());
  return first_id;
}

}  // namespace icecache
