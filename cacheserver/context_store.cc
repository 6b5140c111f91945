#include "cacheserver/context_store.h"

#include <algorithm>
#include <unordered_set>
#include <utility>

#include "cacheserver/store/cold_keys.h"
#include "common/limits.h"
#include "common/log.h"

namespace icecache {
namespace {

// More ids than one run can use.
constexpr uint64_t kIdsPerStart = uint64_t{1} << 32;

std::string KeyOf(const ContextManifest& manifest) {
  return cold_keys::ContextRecord(manifest.named_by, manifest.tenant, manifest.name);
}

SegmentId SegmentOfKey(std::string_view key, std::string_view prefix) {
  uint64_t value = 0;
  for (const char c : key.substr(prefix.size(), sizeof value))
    value = value << 8 | static_cast<uint8_t>(c);
  return SegmentId(value);
}

Result<uint64_t> NextFirstId(ColdStore& store, uint64_t now_us) {
  KV_ASSIGN_OR_RETURN(const std::optional<std::string> last,
                      store.Get(ColdColumn::kRecords, cold_keys::kStart));
  uint64_t first_id = now_us;
  if (last) {
    KV_ASSIGN_OR_RETURN(const uint64_t used, DecodeStartRecord(*last));
    // The clock may have been set back.
    first_id = std::max(now_us, used + kIdsPerStart);
  }
  const ColdWrite write{ColdColumn::kRecords, cold_keys::kStart, EncodeStartRecord(first_id)};
  KV_RETURN_IF_ERROR(store.Put({&write, 1}, true));
  return first_id;
}

}  // namespace

Result<ContextStore::Recovered> ContextStore::Recover(uint64_t now_us) {
  ColdStore& store = pool_.store();
  Recovered found;
  KV_ASSIGN_OR_RETURN(found.first_id, NextFirstId(store, now_us));
  std::unordered_set<SegmentId> named;
  Status newer;
  KV_RETURN_IF_ERROR(store.Scan(ColdColumn::kRecords, cold_keys::kContexts,
                                [&](std::string_view key, std::string_view value) {
                                  Result<ContextManifest> manifest = DecodeManifest(value);
                                  if (manifest.status().code() == StatusCode::kFailedPrecondition)
                                    newer = manifest.status();
                                  if (!manifest.ok()) {
                                    // Kept for whoever repairs it.
                                    const SegmentId last = SegmentOfKey(key, cold_keys::kContexts);
                                    LogError("durable context not recovered",
                                             {{"segment", std::to_string(last.value)},
                                              {"status", manifest.status().ToString()}});
                                    ++found.unreadable;
                                    return newer.ok();
                                  }
                                  manifest->named_by = SegmentOfKey(key, cold_keys::kContexts);
                                  for (const SegmentManifest& s : manifest->segments)
                                    named.insert(s.id);
                                  found.contexts.push_back(std::move(manifest).value());
                                  return true;
                                }));
  KV_RETURN_IF_ERROR(newer);
  std::vector<SegmentId> orphans;
  KV_RETURN_IF_ERROR(store.Scan(ColdColumn::kRecords, cold_keys::kSegments,
                                [&](std::string_view key, std::string_view value) {
                                  const SegmentId id = SegmentOfKey(key, cold_keys::kSegments);
                                  const Status record = CheckSegmentRecord(value, id);
                                  if (record.code() == StatusCode::kFailedPrecondition)
                                    newer = record;
                                  if (!named.contains(id)) orphans.push_back(id);
                                  return newer.ok();
                                }));
  KV_RETURN_IF_ERROR(newer);
  // What an unreadable record names is not known: nothing is deleted then.
  if (found.unreadable > 0) return found;
  found.orphans = orphans.size();
  for (const SegmentId id : orphans) pool_.DeleteSegment(id);
  // A server that writes nothing more would leave them to the next one.
  if (!orphans.empty()) {
    pool_.SubmitRecord([this] { (void)pool_.NoteWrite(pool_.store().Sync()); });
  }
  return found;
}

template <typename T>
void ContextStore::Answer(std::function<void(T)> done, T value) {
  // `done` dies on the control thread, answered or not.
  struct Call {
    std::function<void(T)> done;
    T value;
  };
  auto call = std::make_shared<Call>(Call{std::move(done), std::move(value)});
  control_.Post([call, alive = std::weak_ptr<int>(alive_)] {
    if (!alive.expired()) call->done(std::move(call->value));
  });
}

void ContextStore::Commit(const ContextManifest& manifest, std::function<void(Status)> done) {
  // One that is on its way runs before this, in the pool's order of records, and is not repeated.
  for (const auto& record : forgetting_) record->again |= record->key == KeyOf(manifest);
  pool_.SubmitRecord([this, record = EncodeManifest(manifest), key = KeyOf(manifest),
                      done = std::move(done)]() mutable {
    const ColdWrite write{ColdColumn::kRecords, std::move(key), std::move(record)};
    Status status = pool_.store().Put({&write, 1}, true);
    Answer<Status>(std::move(done), pool_.NoteWrite(std::move(status)));
  });
}

void ContextStore::Forget(const ContextManifest& manifest, std::vector<SegmentId> segments,
                          std::function<void(Status)> done) {
  forgetting_.push_back(
      std::make_shared<Forgetting>(Forgetting{KeyOf(manifest), std::move(segments)}));
  ForgetOnce(forgetting_.back(), std::move(done));
}

void ContextStore::ForgetOnce(const std::shared_ptr<Forgetting>& record,
                              std::function<void(Status)> done) {
  auto finish = [this, record, done = std::move(done)](const Status& status) {
    if (done) done(status);
    if (status.ok() || record->again) return EndForgetting(record);
    control_.After(limits::kStoreRetryTime, [this, record, alive = std::weak_ptr<int>(alive_)] {
      if (alive.expired()) return;
      if (record->again) return EndForgetting(record);
      ForgetOnce(record, {});
    });
  };
  pool_.SubmitRecord([this, key = record->key, finish = std::move(finish)]() mutable {
    ColdStore& store = pool_.store();
    const uint64_t losses = store.losses();
    Status status = store.DeletePrefix(ColdColumn::kRecords, key);
    if (status.ok()) status = store.Sync();
    if (status.ok() && store.losses() != losses)
      status = Unavailable("cold store: it was opened again meanwhile");
    Answer<Status>(std::move(finish), pool_.NoteWrite(std::move(status)));
  });
}

void ContextStore::EndForgetting(const std::shared_ptr<Forgetting>& record) {
  std::erase(forgetting_, record);
  DeleteSegments(record->segments);
}

void ContextStore::DeleteSegments(const std::vector<SegmentId>& segments) {
  unnamed_.insert(unnamed_.end(), segments.begin(), segments.end());
  if (!forgetting_.empty()) return;
  for (const SegmentId segment : std::exchange(unnamed_, {})) pool_.DeleteSegment(segment);
}

void ContextStore::ReadRows(std::vector<SegmentId> segments, uint32_t slices,
                            std::function<void(Result<std::shared_ptr<const Rows>>)> done) {
  pool_.Submit([this, segments = std::move(segments), slices, done = std::move(done)]() mutable {
    const auto read = [&]() -> Result<std::shared_ptr<const Rows>> {
      auto rows = std::make_shared<Rows>();
      for (const SegmentId segment : segments) {
        std::vector<std::string>& of_segment = rows->emplace_back();
        for (uint32_t flat = 0; flat < slices; ++flat) {
          KV_ASSIGN_OR_RETURN(
              std::optional<std::string> blob,
              pool_.store().Get(ColdColumn::kIndex, cold_keys::Rows(segment, flat)));
          if (!blob) {
            return DataLoss("segment " + std::to_string(segment.value) +
                            ": the stored rows of slice " + std::to_string(flat) +
                            " are missing; drop the context");
          }
          of_segment.push_back(*std::move(blob));
        }
      }
      return std::shared_ptr<const Rows>(std::move(rows));
    };
    Answer<Result<std::shared_ptr<const Rows>>>(std::move(done), read());
  });
}

}  // namespace icecache
