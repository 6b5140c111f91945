// Manifests: the records of the cold store. A ContextManifest on disk is the commit of a durable
// context: it is written last, so everything it names is there.
//
// Tenants are written by name, since their numbers follow the token file. Format: blob.h.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "cacheserver/select/selection_policy.h"
#include "common/ids.h"
#include "common/model_shape.h"
#include "common/prefix_key.h"
#include "common/status.h"

namespace icecache {

struct SegmentManifest {
  SegmentId id;
  std::string tenant;  // whose memory it takes
  uint32_t first_position = 0;
  uint32_t tail_first = 0;
  uint32_t end = 0;
};

struct ContextManifest {
  SegmentId named_by;  // names the record, and stands in its key alone
  std::string tenant;
  std::string name;
  ModelShape shape;
  std::string model;
  uint32_t sink_tokens = 0;
  uint32_t window_tokens = 0;
  PolicyKind policy = PolicyKind::kClusterTree;
  uint64_t seed = 1;
  std::vector<SegmentManifest> segments;  // the chain, oldest first
  bool shared = false;                    // from here on: since format 2
  std::vector<PrefixKey> prefix_keys;     // of its tokens, or none
};

std::string EncodeManifest(const ContextManifest& manifest);
// DATA_LOSS or FAILED_PRECONDITION (newer format), naming what is wrong. What it accepts is a chain
// whose segments join and end within the limits.
Result<ContextManifest> DecodeManifest(std::string_view blob);

// The record that lets a start find what no context names.
std::string EncodeSegmentRecord(SegmentId segment);
// DATA_LOSS: not this segment's. FAILED_PRECONDITION: a newer format.
Status CheckSegmentRecord(std::string_view blob, SegmentId segment);

// The record of the last start: ids and epochs below `first_id` were used.
std::string EncodeStartRecord(uint64_t first_id);
Result<uint64_t> DecodeStartRecord(std::string_view blob);

}  // namespace icecache
