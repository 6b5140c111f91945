#include "worker/batch_loop.h"

#include <algorithm>
#include <string>
#include <utility>

#include "common/limits.h"

namespace icecache {

BatchLoop::BatchLoop(Model& model, CacheClient& client, AttentionBackend& backend)
    : model_(model), attention_(model.shape(), client, backend) {}

Status BatchLoop::Join(BatchSequence sequence) {
  if (members_.size() >= limits::kSelectsPerBatchMax) {
    return ResourceExhausted(std::to_string(members_.size()) +
                             " sequences decode together already, the maximum");
  }
  if (sequence.feed.empty()) {
    return InvalidArgument("a sequence of a batch needs a question of at least one token");
  }
  for (const int32_t token : sequence.feed) {
    if (token >= 0 && static_cast<uint32_t>(token) < model_.vocab_size()) continue;
    return InvalidArgument("token " + std::to_string(token) + ", expected 0 to " +
                           std::to_string(model_.vocab_size() - 1));
  }
  KV_RETURN_IF_ERROR(sequence.sampling.Validate());
  Sampler sampler(sequence.sampling);
  members_.push_back({std::move(sequence), std::move(sampler)});
  return OkStatus();
}

bool BatchLoop::Wants(const Member& member) const {
  return !member.over && member.fed >= member.sequence.feed.size() &&
         member.sequence.max_new_tokens > 0;
}

void BatchLoop::Take(Member* member, int32_t token) {
  const BatchSequence& sequence = member->sequence;
  ++stats_.chosen;
  const auto& stop = sequence.stop;
  if (std::find(stop.begin(), stop.end(), token) != stop.end()) {
    member->over = true;
    return;
  }
  ++member->said;
  member->next = token;
  // Nothing needs the last one's logits, so it is not fed.
  member->over = !sequence.on_token(token) || member->said >= sequence.max_new_tokens;
}

// What each member feeds. One whose context is full is over before the others run.
void BatchLoop::ListRows() {
  tokens_.clear();
  rows_.clear();
  for (Member& member : members_) {
    const BatchSequence& s = member.sequence;
    const bool asked = member.fed < s.feed.size();
    const uint64_t position = uint64_t{s.position} + member.fed + member.said - (asked ? 0 : 1);
    if (position >= limits::kContextTokensMax) {
      member.over = true;
      member.status = OutOfRange("the sequence has reached " + std::to_string(position) +
                                 " tokens, the maximum of a context");
      continue;
    }
    tokens_.push_back(
        {asked ? s.feed[member.fed] : member.next, TokenPos(static_cast<uint32_t>(position))});
    rows_.push_back(s.attention);
  }
  EndOver();
}

Status BatchLoop::Step() {
  KV_CHECK(!members_.empty());
  ListRows();
  if (members_.empty()) return OkStatus();
  {
    const AttentionTimer timer(&stats_.total);
    attention_.Begin(rows_);
    Status status = model_.Step(tokens_, attention_);
    choices_.clear();
    for (uint32_t i = 0; i < members_.size(); ++i) {
      Member& member = members_[i];
      if (member.fed < member.sequence.feed.size()) ++member.fed;
      member.status = attention_.statuses()[i];
      member.over = !member.status.ok();
      if (Wants(member)) choices_.push_back({i, member.sampler.Next()});
      const bool through = member.fed >= member.sequence.feed.size();
      if (through && member.sequence.max_new_tokens == 0) member.over = true;
    }
    chosen_.resize(choices_.size());
    if (status.ok() && !choices_.empty()) status = model_.Choose(choices_, chosen_.data());
    if (!status.ok()) {
      EndAll(status);
      return status;
    }
    ++stats_.steps;
    stats_.rows += tokens_.size();
    for (size_t i = 0; i < choices_.size(); ++i) Take(&members_[choices_[i].row], chosen_[i]);
  }
  EndOver();
  return OkStatus();
}

void BatchLoop::EndOver() {
  std::vector<Member> over;
  for (size_t i = 0; i < members_.size();) {
    if (!members_[i].over) {
      ++i;
      continue;
    }
    over.push_back(std::move(members_[i]));
    members_.erase(members_.begin() + static_cast<ptrdiff_t>(i));
  }
  for (const Member& member : over) member.sequence.on_end(member.status);
}

void BatchLoop::EndAll(const Status& status) {
  for (Member& member : members_) {
    member.over = true;
    if (member.status.ok()) member.status = status;
  }
  EndOver();
}

}  // namespace icecache
