// The part of ContextService that has to do with the cold store: durable publication, and contexts
// of an earlier run.
#include <algorithm>
#include <utility>

#include "cacheserver/context_service.h"
#include "common/log.h"

namespace icecache {

ContextSpec ContextService::SpecOf(const ContextRecord& record) const {
  ContextSpec spec;
  spec.id = record.id;
  spec.segment = record.chain.back();
  spec.tenant = record.tenant;
  spec.shape = record.traits.shape;
  spec.sink_tokens = record.traits.sink_tokens;
  spec.window_tokens = record.traits.window_tokens;
  spec.policy = record.traits.policy;
  spec.seed = record.traits.seed;
  return spec;
}

ContextManifest ContextService::ManifestOf(const ContextRecord& record) const {
  ContextManifest manifest;
  manifest.named_by = record.named_by;
  manifest.tenant = tenants_.Get(record.tenant).name;
  manifest.name = record.name;
  manifest.shape = record.traits.shape;
  manifest.model = record.traits.model;
  manifest.sink_tokens = record.traits.sink_tokens;
  manifest.window_tokens = record.traits.window_tokens;
  manifest.policy = record.traits.policy;
  manifest.seed = record.traits.seed;
  for (const SegmentId id : record.chain) {
    const SegmentRecord segment = *table_.FindSegment(id);
    manifest.segments.push_back(
        {id, tenants_.Get(segment.tenant).name, segment.first, segment.tail_first, segment.end});
  }
  manifest.shared = record.shared;
  if (record.prefix) manifest.prefix_keys = record.prefix->keys;
  return manifest;
}

void ContextService::PublishDurable(const ContextRecord& record, bool shared, Done done) {
  if (store_ == nullptr) {
    return done(FailedPrecondition(
        "publish: the server keeps nothing on disk; start it with --data-dir, or "
        "publish without durable"));
  }
  if (!record.sealed) {
    return done(FailedPrecondition("context '" + record.name +
                                   "' is not sealed; seal it before it is published"));
  }
  // All parts of all segments; those that are stored already answer at once.
  shards_.GatherLater<Status>(
      [chain = record.chain](Shard& shard, std::function<void(Status)> answer) {
        struct Parts {
          size_t missing;
          Status status;
        };
        auto parts = std::make_shared<Parts>(Parts{chain.size(), OkStatus()});
        for (const SegmentId segment : chain) {
          shard.tier().Store(segment, [parts, answer](const Status& status) {
            if (parts->status.ok()) parts->status = status;
            if (--parts->missing == 0) answer(parts->status);
          });
        }
      },
      [this, id = record.id, chain = record.chain, shared,
       done = std::move(done)](const std::vector<Status>& stored) {
        const ContextRecord* now = table_.Find(id);
        if (now != nullptr && now->chain != chain)
          return PublishDurable(*now, shared, done);  // merged
        if (Status status = FirstError(stored); !status.ok())
          return done(status.WithContext("publish"));
        Commit(id, shared, done);
      });
}

void ContextService::Commit(ContextId id, bool shared, const Done& done) {
  const ContextRecord* record = table_.Find(id);
  if (record == nullptr) return done(Cancelled("publish: the context was dropped"));
  // One at a time: a failure takes its record back, which must not be one that came between.
  if (const auto it = committing_.find(id); it != committing_.end()) {
    it->second.push_back([this, id, shared, done] { Commit(id, shared, done); });
    return;
  }
  committing_[id];
  const bool was_durable = record->durable;
  // From here on a drop deletes the record, also one that is still on its way to the disk.
  table_.SetDurable(id, true);
  ContextManifest manifest = ManifestOf(*record);
  manifest.shared |= shared;
  merger_.Recommitted(id);
  store_->Commit(manifest, [this, id, shared, was_durable, done](const Status& status) {
    const auto waiting = std::move(committing_.extract(id).mapped());
    FinishCommit(id, shared, was_durable, status, done);
    for (const auto& next : waiting) next();
  });
}

void ContextService::FinishCommit(ContextId id, bool shared, bool was_durable, const Status& status,
                                  const Done& done) {
  const ContextRecord* committed = table_.Find(id);
  if (committed == nullptr) return done(Cancelled("publish: the context was dropped"));
  if (!status.ok()) {
    // An earlier publication was acknowledged: its record stays.
    if (was_durable) return done(status.WithContext("publish"));
    table_.SetDurable(id, false);
    // It may have reached the disk all the same.
    store_->Forget(ManifestOf(*committed), {}, {});
    return done(status.WithContext("publish"));
  }
  (void)table_.Publish(id, shared);
  LogInfo("context published", {{"tenant", tenants_.Get(committed->tenant).name},
                                {"context", committed->name},
                                {"tokens", std::to_string(committed->tokens)},
                                {"durable", "yes"},
                                {"shared", committed->shared ? "yes" : "no"}});
  done(wire::Done{});
}

void ContextService::CommitMerged(ContextId id, const MergedRun& merge,
                                  std::function<void(Status)> done) {
  ContextManifest manifest = ManifestOf(*table_.Find(id));
  const auto is = [](SegmentId wanted) {
    return [wanted](const SegmentManifest& segment) { return segment.id == wanted; };
  };
  std::vector<SegmentManifest>& chain = manifest.segments;
  const auto first = std::find_if(chain.begin(), chain.end(), is(merge.run.front()));
  const auto last = std::find_if(first, chain.end(), is(merge.run.back()));
  KV_CHECK(last != chain.end());
  *first = {merge.merged, first->tenant, first->first_position, last->tail_first, last->end};
  chain.erase(first + 1, last + 1);
  committing_[id];
  store_->Commit(manifest, [this, id, done = std::move(done)](const Status& status) {
    const auto waiting = std::move(committing_.extract(id).mapped());
    done(status);
    for (const auto& next : waiting) next();
  });
}

Status ContextService::Recover(const ContextManifest& manifest) {
  const auto tenant_of = [this](const std::string& name) -> Result<TenantId> {
    for (const Tenant& tenant : tenants_.all()) {
      if (tenant.name == name) return tenant.id;
    }
    return NotFound("tenant '" + name + "' is not in the token file");
  };
  ContextRecord record;
  KV_ASSIGN_OR_RETURN(record.tenant, tenant_of(manifest.tenant));
  record.name = manifest.name;
  record.named_by = manifest.named_by;
  record.traits = {.shape = manifest.shape,
                   .model = manifest.model,
                   .sink_tokens = manifest.sink_tokens,
                   .window_tokens = manifest.window_tokens,
                   .policy = manifest.policy,
                   .seed = manifest.seed};
  record.shared = manifest.shared;
  if (!manifest.prefix_keys.empty()) {
    record.prefix = std::make_shared<const PrefixKeyList>(
        PrefixKeyList{manifest.prefix_keys, manifest.segments.back().end});
  }
  std::vector<SegmentRecord> segments;
  for (const SegmentManifest& s : manifest.segments) {
    SegmentRecord& segment = segments.emplace_back();
    KV_ASSIGN_OR_RETURN(segment.tenant, tenant_of(s.tenant));
    segment.first = s.first_position;
    segment.tail_first = s.tail_first;
    segment.end = s.end;
    record.chain.push_back(s.id);
  }
  const Status status = table_.Recover(std::move(record), segments).status();
  CountGauges();
  return status;
}

void ContextService::WithLoaded(ContextId id, std::function<void(Status)> then) {
  const ContextRecord* record = table_.Find(id);
  if (record == nullptr) return then(Cancelled("the context was dropped"));
  if (record->loaded) return then(OkStatus());
  std::vector<std::function<void(Status)>>& waiting = loading_[id];
  waiting.push_back(std::move(then));
  if (waiting.size() > 1) return;
  const ModelShape& shape = record->traits.shape;
  store_->ReadRows(record->chain, shape.layers * shape.kv_heads,
                   [this, id](Result<std::shared_ptr<const ContextStore::Rows>> rows) {
                     if (!rows.ok()) return FinishLoading(id, rows.status());
                     RestoreOnShards(id, *rows);
                   });
}

void ContextService::RestoreOnShards(ContextId id,
                                     const std::shared_ptr<const ContextStore::Rows>& rows) {
  const ContextRecord* record = table_.Find(id);
  if (record == nullptr) return FinishLoading(id, Cancelled("the context was dropped"));
  std::vector<SegmentSpec> chain;
  std::vector<SegmentEnds> ends;
  for (const SegmentId segment_id : record->chain) {
    const SegmentRecord segment = *table_.FindSegment(segment_id);
    SegmentSpec& spec = chain.emplace_back();
    spec.id = segment_id;
    spec.first_position = segment.first;
    spec.tenant = segment.tenant;
    spec.shape = record->traits.shape;
    spec.policy = record->traits.policy;
    spec.seed = record->traits.seed;
    ends.push_back({segment.tail_first, segment.end});
  }
  shards_.Gather<Status>(
      [spec = SpecOf(*record), chain, ends, rows](Shard& shard) {
        return shard.RestoreContext(spec, chain, ends, *rows);
      },
      [this, id](const std::vector<Status>& restored) { FinishLoading(id, FirstError(restored)); });
}

void ContextService::FinishLoading(ContextId id, const Status& status) {
  auto node = loading_.extract(id);
  KV_CHECK(!node.empty());
  const ContextRecord* record = table_.Find(id);
  const bool here = status.ok() && record != nullptr;
  if (here) {
    table_.SetLoaded(id);
  } else {
    // What some shards have of it goes; the next open tries again.
    shards_.Tell([id](Shard& shard) { shard.DropContext(id); });
  }
  if (!status.ok()) {
    LogError("durable context not loaded",
             {{"context", std::to_string(id.value)}, {"status", status.ToString()}});
  }
  const Status answer =
      here || !status.ok() ? status : Cancelled("the context was dropped while it was read");
  for (const auto& then : node.mapped()) then(answer);
}

}  // namespace icecache
