// Segment: the part of a segment of the chain that one shard owns: a HeadSlice for each (layer, kv
// head) of the shard.
//
// Private to one Context until sealed; then immutable, shared by contexts through shared_ptr<const
// Segment>, and gone with the last of them. Thread: the shard's, for destruction too.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "cacheserver/context/head_slice.h"
#include "common/ids.h"
#include "common/model_shape.h"
#include "common/status.h"

namespace icecache {

struct SegmentSpec {
  SegmentId id;
  uint32_t first_position = 0;
  TenantId tenant;
  ModelShape shape;
  PolicyKind policy = PolicyKind::kClusterTree;
  uint64_t seed = 1;
  ShardId shard;
  uint32_t shard_count = 1;
};

// Where the rows of a sealed segment end; equal over all slices of the segment, on every shard.
struct SegmentEnds {
  uint32_t tail_first = 0;  // a child starts here
  uint32_t end = 0;         // after the last token
  friend bool operator==(const SegmentEnds&, const SegmentEnds&) = default;
};

class Segment {
 public:
  Segment(PagePool& pool, const SegmentSpec& spec);
  // A sealed segment from its stored rows (HeadSlice::SaveRows), by slice of the whole model:
  // rows[layer * kv_heads + head]. Indexes come later, slice by slice. Errors as HeadSlice::Restore,
  // naming the slice.
  static Result<std::shared_ptr<Segment>> Restore(PagePool& pool, const SegmentSpec& spec,
                                                  std::optional<SegmentEnds> ends,
                                                  std::span<const std::string> rows);
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  // nullptr when another shard owns it or the shape has no such slice.
  HeadSlice* slice(LayerId layer, KvHeadId head);
  const HeadSlice* slice(LayerId layer, KvHeadId head) const;

  // Of a sealed segment, for the shard's Tier alone: indexes and pages come and go, content never
  // changes.
  size_t slice_count() const { return slices_.size(); }
  HeadSlice& stored_slice(size_t index) const { return *slices_[index]; }
  HeadSlice& stored_slice(LayerId layer, KvHeadId head) const {
    return *slices_[*IndexOf(layer, head)];
  }
  // Number of a slice in the whole model: layer * kv_heads + head.
  uint32_t flat_index(size_t index) const {
    return static_cast<uint32_t>(index) * spec_.shard_count + spec_.shard.value;
  }
  static SliceOptions OptionsOf(const SegmentSpec& spec, uint32_t flat_index);
  // Puts a slice in place of an empty one, before Seal.
  void Adopt(size_t index, std::unique_ptr<HeadSlice> slice) { slices_[index] = std::move(slice); }

  // Seals every slice. FAILED_PRECONDITION when slices end at different positions (names two of
  // them) or a build runs; then nothing is sealed. May be repeated.
  Status Seal();
  bool sealed() const { return sealed_; }
  // REQUIRES: sealed. nullopt: the shard owns no slice (more shards than slices).
  std::optional<SegmentEnds> ends() const { return ends_; }

  const SegmentSpec& spec() const { return spec_; }
  SegmentId id() const { return spec_.id; }
  using SliceVisitor = std::function<void(LayerId, KvHeadId, const HeadSlice&)>;
  void VisitSlices(const SliceVisitor& visit) const;
  uint64_t kv_bytes() const;
  uint64_t index_bytes() const;
  Status Validate() const;

 private:
  Status CheckSealable() const;
  std::optional<size_t> IndexOf(LayerId layer, KvHeadId head) const;

  const SegmentSpec spec_;
  std::vector<std::unique_ptr<HeadSlice>>
      slices_;  // slice n of the shard is (n * shard_count + shard)
  bool sealed_ = false;
  std::optional<SegmentEnds> ends_;
};

}  // namespace icecache
