#include "cacheserver/shard.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "common/limits.h"
#include "common/log.h"

namespace icecache {
namespace {

// Rows of one slice indexed per turn of the loop: some tens of microseconds, so that a Select that
// arrives meanwhile does not wait for more.
constexpr uint32_t kIndexRowsPerTurn = 4;

std::string TicketKey(std::span<const std::byte> ticket) {
  return {reinterpret_cast<const char*>(ticket.data()), ticket.size()};
}

Status Gone(ContextId context) {
  return NotFound("context " + std::to_string(context.value) +
                  " is not on this shard; it was dropped");
}

std::string SliceText(LayerId layer, KvHeadId head) {
  return "layer " + std::to_string(layer.value) + ", kv head " + std::to_string(head.value);
}

}  // namespace

Shard::Shard(const ShardOptions& options, Reactor& reactor, BuildPool& builds,
             MetricsRegistry& metrics, ColdPool* cold)
    : options_(options),
      reactor_(reactor),
      builds_(builds),
      rows_indexed_(
          metrics.GetCounter("icecache_index_turns_total",
                             "Turns in which a shard moved appended rows into an index.")),
      reclusters_(
          metrics.GetCounter("icecache_reclusters_total", "Background re-clusterings installed.")),
      jobs_failed_(
          metrics.GetCounter("icecache_cluster_jobs_failed_total",
                             "Builds and re-clusterings whose result could not be installed.")),
      build_seconds_(metrics.GetHistogram(
          "icecache_cluster_job_seconds",
          "From the submission of a build or re-clustering to its installation.")),
      work_(reactor),
      pool_(options.memory_bytes),
      tier_(reactor, pool_, cold, metrics),
      merge_(reactor, pool_, tier_, builds, work_, [this] { return !jobs_.empty(); }),
      attention_(MakeCpuAttention()),
      checksum_failures_(
          metrics.GetCounter("icecache_checksum_failures_total",
                             "Pages in memory or on disk that were not what was written.")) {}

Shard::~Shard() {
  // Jobs and contexts hold memory of the pool.
  jobs_.clear();
  forks_.clear();
  contexts_.clear();
}

Status Shard::CreateContext(ContextSpec spec) {
  spec.shard = options_.id;
  spec.shard_count = options_.count;
  KV_ASSIGN_OR_RETURN(std::unique_ptr<Context> context, Context::Create(spec, pool_, *attention_));
  const bool inserted = contexts_.emplace(spec.id, std::move(context)).second;
  KV_CHECK(inserted);
  return OkStatus();
}

Status Shard::RestoreContext(ContextSpec spec, std::span<const SegmentSpec> chain,
                             std::span<const SegmentEnds> ends, const ContextStore::Rows& rows) {
  if (contexts_.contains(spec.id)) return OkStatus();
  spec.shard = options_.id;
  spec.shard_count = options_.count;
  std::vector<std::shared_ptr<const Segment>> segments;
  for (size_t i = 0; i < chain.size(); ++i) {
    std::shared_ptr<const Segment> segment = tier_.Find(chain[i].id);
    if (segment == nullptr) {
      SegmentSpec own = chain[i];
      own.shard = options_.id;
      own.shard_count = options_.count;
      KV_ASSIGN_OR_RETURN(segment, Segment::Restore(pool_, own, ends[i], rows[i]));
      tier_.Add(segment, true);
    }
    segments.push_back(std::move(segment));
  }
  contexts_.emplace(spec.id, Context::Restore(spec, std::move(segments), pool_, *attention_));
  return OkStatus();
}

Result<std::optional<uint32_t>> Shard::CheckSealable(ContextId id) const {
  auto it = contexts_.find(id);
  if (it == contexts_.end()) return Gone(id);
  std::optional<uint32_t> end;
  std::string first_slice;
  Status status;
  it->second->VisitPrivateSlices([&](LayerId layer, KvHeadId head, const HeadSlice& slice) {
    if (!status.ok()) return;
    if (slice.job_running() && !slice.built()) {
      status = FailedPrecondition("seal: " + SliceText(layer, head) +
                                  " is still being built; wait for the answer to Build");
    } else if (end && *end != slice.end()) {
      status =
          FailedPrecondition("seal: " + SliceText(layer, head) + " ends at token " +
                             std::to_string(slice.end()) + " and " + first_slice + " at " +
                             std::to_string(*end) + "; send the missing rows of all layers first");
    } else if (!end) {
      end = slice.end();
      first_slice = SliceText(layer, head);
    }
  });
  if (!status.ok()) return status;
  return end;
}

Result<std::optional<SegmentEnds>> Shard::SealContext(ContextId id, std::optional<uint32_t> end) {
  Context* context = FindContext(id);
  if (context == nullptr) return Gone(id);
  KV_ASSIGN_OR_RETURN(const std::optional<uint32_t> now, CheckSealable(id));
  if (now && now != end) {
    return FailedPrecondition(
        "seal: rows have come while the context was being sealed; seal it "
        "when all requests that append are answered");
  }
  KV_RETURN_IF_ERROR(context->Seal());
  tier_.Add(context->chain().back(), false);
  return context->sealed_ends();
}

void Shard::DropContext(ContextId id) {
  FinishFork(id, Cancelled("the context was dropped while it was being forked"));
  contexts_.erase(id);
  selections_.erase(id);
}

void Shard::AddLease(const Lease& lease) {
  leases_.emplace(lease.epoch, lease);
  tickets_.emplace(TicketKey(lease.ticket), lease.epoch);
}

void Shard::EndLease(Epoch epoch) {
  auto it = leases_.find(epoch);
  if (it == leases_.end()) return;
  tickets_.erase(TicketKey(it->second.ticket));
  leases_.erase(it);
}

Holdings Shard::HoldingsOf(std::span<const ContextId> ids) const {
  Holdings holdings;
  for (ContextId id : ids) {
    auto it = contexts_.find(id);
    if (it == contexts_.end()) continue;
    it->second->VisitSegments([&](const Segment& segment) {
      auto [entry, fresh] = holdings.segments.try_emplace(segment.id());
      if (fresh) entry->second = {segment.kv_bytes(), segment.index_bytes()};
    });
    it->second->VisitPrivateSlices([&](LayerId, KvHeadId, const HeadSlice& slice) {
      uint32_t& end = holdings.ends[id];
      end = std::max(end, slice.end());
    });
  }
  return holdings;
}

ShardStatus Shard::status() {
  ShardStatus status;
  status.id = options_.id;
  status.pool = pool_.usage();
  status.tier = tier_.usage();
  for (TenantId tenant : pool_.tenants()) status.tenants[tenant] = pool_.usage(tenant);
  status.loads = work_.loads();
  status.contexts = contexts_.size();
  status.leases = leases_.size();
  status.jobs = jobs_.size();
  return status;
}

const Lease* Shard::FindTicket(std::span<const std::byte> ticket) const {
  auto it = tickets_.find(TicketKey(ticket));
  return it == tickets_.end() ? nullptr : FindLease(it->second);
}

const Lease* Shard::FindLease(Epoch epoch) const {
  auto it = leases_.find(epoch);
  return it == leases_.end() ? nullptr : &it->second;
}

Context* Shard::FindContext(ContextId id) {
  auto it = contexts_.find(id);
  return it == contexts_.end() ? nullptr : it->second.get();
}

void Shard::Build(ContextId id, LayerId layer, KvHeadId head, uint32_t token_count,
                  std::span<const float> query_energy, std::shared_ptr<const Packing> proposed,
                  BuildDone done, TimePoint give_up) {
  Context* context = FindContext(id);
  if (context == nullptr) return done(Gone(id));
  if (jobs_of_[context->spec().tenant] >= limits::kBuildsQueuedMax) {
    return done(ResourceExhausted("build: " + std::to_string(limits::kBuildsQueuedMax) +
                                  " builds of this tenant wait on this shard, the maximum; "
                                  "retry later"));
  }
  Result<std::unique_ptr<SliceJob>> work =
      context->PrepareBuild(layer, head, token_count, query_energy, proposed);
  if (work.status().code() == StatusCode::kResourceExhausted) {
    const std::vector<float> energy(query_energy.begin(), query_energy.end());
    return WhenRoom(work.status(), give_up, [=, this, done = std::move(done)](const Status& s) {
      if (!s.ok()) return done(s);
      Build(id, layer, head, token_count, energy, proposed, done, give_up);
    });
  }
  if (!work.ok()) return done(work.status());
  if (*work == nullptr) return done(context->PageCount(layer, head));
  Submit(*context, {id, layer, head}, std::move(*work), std::move(done), give_up);
}

// OK: what was refused may be tried again.
void Shard::WhenRoom(const Status& refused, TimePoint give_up, std::function<void(Status)> then) {
  if (reactor_.clock().Now() >= give_up) return then(refused);
  tier_.WaitForRoom(
      [refused, then = std::move(then), alive = std::weak_ptr<int>(alive_)](bool room) {
        if (!alive.expired()) then(room ? OkStatus() : refused);
      });
}

void Shard::Submit(const Context& context, SliceName slice, std::unique_ptr<SliceJob> work,
                   BuildDone done, TimePoint give_up) {
  const uint64_t id = next_job_++;
  const TenantId tenant = context.spec().tenant;
  auto job = std::make_unique<Job>(
      Job{slice, tenant, std::move(work), std::move(done), reactor_.clock().Now(), give_up});
  SliceJob* lent = job->work.get();
  jobs_.emplace(id, std::move(job));
  ++jobs_of_[tenant];
  builds_.Submit(tenant, [this, lent, id, &reactor = reactor_, alive = std::weak_ptr<int>(alive_)] {
    lent->Run();
    reactor.Post([this, id, alive] {
      if (!alive.expired()) Finish(id);
    });
  });
}

// A build whose result finds no room waits for some; a re-clustering is not worth it.
void Shard::Finish(uint64_t id) {
  const Job& job = *jobs_.at(id);
  Context* context = job.done ? FindContext(job.slice.context) : nullptr;
  if (context != nullptr) {
    const TenantWork::Meter meter(work_, job.tenant);
    const Status ready = context->PrepareInstall(job.slice.layer, job.slice.head, *job.work);
    if (ready.code() == StatusCode::kResourceExhausted) {
      return WhenRoom(ready, job.give_up,
                      [this, id](const Status& room) { room.ok() ? Finish(id) : Install(id); });
    }
  }
  Install(id);
}

void Shard::Install(uint64_t id) {
  auto node = jobs_.extract(id);
  KV_CHECK(!node.empty());
  std::unique_ptr<Job> job = std::move(node.mapped());
  --jobs_of_[job->tenant];
  const TenantWork::Meter meter(work_, job->tenant);
  const bool recluster = !job->done;
  if (recluster) --reclusters_running_;
  const SliceName slice = job->slice;
  Context* context = FindContext(slice.context);
  Status status = job->work->status();
  if (context == nullptr) {
    status = Gone(slice.context);
  } else {
    Status installed = context->Install(slice.layer, slice.head, std::move(job->work));
    if (status.ok()) status = installed;
  }
  build_seconds_.ObserveSeconds(
      std::chrono::duration<double>(reactor_.clock().Now() - job->started).count());
  if (!status.ok() && context != nullptr) {
    jobs_failed_.Add();
    LogWarn("clustering failed", {{"context", std::to_string(slice.context.value)},
                                  {"slice", SliceText(slice.layer, slice.head)},
                                  {"kind", recluster ? "recluster" : "build"},
                                  {"status", status.ToString()}});
  }
  if (recluster) {
    if (status.ok()) reclusters_.Add();
    return;
  }
  if (status.ok()) {
    job->done(context->PageCount(slice.layer, slice.head));
  } else {
    job->done(std::move(status));
  }
}

void Shard::IndexLater(ContextId context, LayerId layer, std::span<const KvHeadId> heads) {
  for (KvHeadId head : heads) to_index_.push_back({context, layer, head});
  if (index_posted_ || to_index_.empty()) return;
  index_posted_ = true;
  reactor_.Post([this, alive = std::weak_ptr<int>(alive_)] {
    if (!alive.expired()) IndexSome();
  });
}

void Shard::IndexSome() {
  index_posted_ = false;
  if (to_index_.empty()) return;
  const SliceName slice = to_index_.front();
  to_index_.pop_front();
  Context* context = FindContext(slice.context);
  if (context != nullptr && !context->sealed()) {
    const TenantWork::Meter meter(work_, context->spec().tenant);
    rows_indexed_.Add();
    Result<bool> more = context->IndexPending(slice.layer, slice.head, kIndexRowsPerTurn);
    if (!more.ok()) {
      // The rows stay pending and are still attended to; the next append tries again.
      LogWarn("indexing failed", {{"context", std::to_string(slice.context.value)},
                                  {"slice", SliceText(slice.layer, slice.head)},
                                  {"status", more.status().ToString()}});
    } else if (*more) {
      to_index_.push_back(slice);
    } else {
      MaybeRecluster(*context, slice);
    }
  }
  IndexLater(slice.context, slice.layer, {});
}

void Shard::MaybeRecluster(Context& context, const SliceName& slice) {
  if (reclusters_running_ >= limits::kReclustersInFlightMax ||
      !context.WantsRecluster(slice.layer, slice.head)) {
    return;
  }
  Result<std::unique_ptr<SliceJob>> work = context.PrepareRecluster(slice.layer, slice.head);
  // Without memory for a second index the first one goes on serving; the next append asks again.
  if (!work.ok() || *work == nullptr) return;
  ++reclusters_running_;
  Submit(context, slice, std::move(*work), {}, TimePoint::max());
}

}  // namespace icecache
