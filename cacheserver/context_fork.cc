// The part of ContextService that finds and forks parents: by name, by the tokens of a prompt, at
// their end or at an earlier token.
#include <utility>

#include "cacheserver/context_service.h"
#include "common/log.h"

namespace icecache {

// A context that is not published is its creator's alone, one that is not shared its tenant's; to
// others they are as unknown as if they were not there.
Result<ContextRecord> ContextService::ForkParent(const Caller& caller,
                                                 const wire::Fork& request) const {
  const ContextRecord* parent = nullptr;
  for (const Tenant& tenant : tenants_.all()) {
    if (request.owner.empty() ? tenant.id != caller.tenant : tenant.name != request.owner) continue;
    parent = table_.FindByName(tenant.id, request.parent);
  }
  const bool own = parent != nullptr && parent->tenant == caller.tenant;
  const bool allowed = parent != nullptr && (own ? parent->published || leases_.Find(
                                                       caller.connection, parent->id)
                                                 : parent->published && parent->shared);
  if (!allowed) return NotFound("fork: no published context '" + request.parent + "'");
  if (!request.key) return *parent;
  const uint32_t tokens = request.tokens == 0 ? parent->tokens : request.tokens;
  // The name may have passed to another content since the match.
  if (parent->prefix == nullptr || parent->prefix->At(tokens) != request.key) {
    return FailedPrecondition("fork: context '" + request.parent +
                              "' does not begin with these " + std::to_string(tokens) +
                              " tokens; match again");
  }
  return *parent;
}

void ContextService::Do(const Caller& caller, const wire::Fork& request, Done done) {
  if (Status status = CheckAdmit(caller, true); !status.ok()) return done(status);
  const Result<ContextRecord> parent = ForkParent(caller, request);
  if (!parent.ok()) return done(parent.status());
  WithLoaded(parent->id, [this, caller, id = parent->id, request,
                          done = std::move(done)](const Status& loaded) {
    if (!loaded.ok()) return done(loaded.WithContext("fork"));
    GrantFork(caller, id, request, done);
  });
}

void ContextService::GrantFork(const Caller& caller, ContextId parent_id,
                               const wire::Fork& request, Done done) {
  std::optional<uint32_t> tokens;
  if (request.tokens > 0) tokens = request.tokens;
  const Result<ForkPlan> plan = table_.Fork(parent_id, request.name, caller.tenant, tokens);
  if (!plan.ok()) return done(plan.status());
  ForkSpec fork;
  fork.parent = parent_id;
  fork.child = plan->child.id;
  fork.tenant = caller.tenant;
  fork.segment = plan->child.chain.back();
  fork.keep = plan->keep;
  if (plan->cut) {
    fork.cut = {plan->child.chain[plan->keep], {plan->cut->tail_first, plan->cut->end}};
  }
  if (request.key) {
    prefix_tokens_.Add(plan->child.tokens);
    table_.CountPrefixFork(parent_id, plan->child.tokens);
  }
  Admit(
      caller, plan->child,
      [fork](Shard& shard, std::function<void(Status)> made) {
        shard.ForkContext(fork, std::move(made));
      },
      std::move(done));
}

void ContextService::Do(const Caller& caller, const wire::MatchPrefix& request, const Done& done) {
  if (Status status = CheckAdmit(caller, false); !status.ok()) return done(status);
  wire::Prefixes reply;
  for (const PrefixIndex::Match& match :
       table_.MatchPrefix(caller.tenant, request.shared, request.keys, request.tokens)) {
    const ContextRecord* record = table_.Find(match.context);
    KV_CHECK(record != nullptr && record->published);
    reply.candidates.push_back(
        {tenants_.Get(record->tenant).name, record->name, match.tokens, match.key});
  }
  (reply.candidates.empty() ? prefix_misses_ : prefix_hits_).Add();
  done(std::move(reply));
}

}  // namespace icecache
