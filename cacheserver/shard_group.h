// ShardGroup: how the control thread talks to the shards. Work is posted to every shard's reactor;
// the answers come back to the control reactor and are handed over together.
//
// Work posted to one shard runs in the order of posting, so a Create followed by a Drop needs no
// waiting. Thread: control. Outlives nothing: shards and reactors outlive it, and answers that come
// after its end are dropped.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cacheserver/shard.h"
#include "common/reactor.h"

namespace icecache {

class ShardGroup {
 public:
  struct Member {
    Reactor* reactor = nullptr;
    Shard* shard = nullptr;
  };
  ShardGroup(Reactor& control, std::vector<Member> members)
      : control_(control), members_(std::move(members)) {}
  ShardGroup(const ShardGroup&) = delete;
  ShardGroup& operator=(const ShardGroup&) = delete;

  size_t size() const { return members_.size(); }

  // Runs work on every shard, on its thread, without an answer.
  void Tell(std::function<void(Shard&)> work) {
    for (const Member& member : members_) {
      member.reactor->Post([work, shard = member.shard] { work(*shard); });
    }
  }

  // The same with an answer each; done gets them in the order of the shards, on the control thread.
  template <typename T>
  void Gather(std::function<T(Shard&)> work, std::function<void(std::vector<T>)> done) {
    GatherLater<T>(
        [work = std::move(work)](Shard& shard, std::function<void(T)> answer) {
          answer(work(shard));
        },
        std::move(done));
  }

  // The same for work that answers on a later turn of its shard. An answer that is dropped leaves
  // the round open until the group ends.
  template <typename T>
  void GatherLater(std::function<void(Shard&, std::function<void(T)>)> work,
                   std::function<void(std::vector<T>)> done) {
    struct Round {
      std::vector<std::optional<T>> answers;
      size_t missing = 0;
      std::function<void(std::vector<T>)> done;
    };
    // Owned here and named weakly elsewhere: what `done` holds is never destroyed on a shard's
    // thread.
    auto round = std::make_shared<Round>();
    round->answers.resize(members_.size());
    round->missing = members_.size();
    round->done = std::move(done);
    const uint64_t id = next_round_++;
    rounds_.emplace(id, round);
    for (size_t i = 0; i < members_.size(); ++i) {
      members_[i].reactor->Post([this, work, id, i, shard = members_[i].shard, &control = control_,
                                 weak = std::weak_ptr<Round>(round)] {
        work(*shard, [this, id, i, &control, weak](T value) {
          auto answer = std::make_shared<T>(std::move(value));
          control.Post([this, weak, id, i, answer] {
            const std::shared_ptr<Round> here = weak.lock();
            if (here == nullptr) return;  // the group is gone
            here->answers[i].emplace(std::move(*answer));
            if (--here->missing > 0) return;
            rounds_.erase(id);
            std::vector<T> answers;
            for (std::optional<T>& a : here->answers) answers.push_back(*std::move(a));
            here->done(std::move(answers));
          });
        });
      });
    }
  }

  size_t open_rounds() const { return rounds_.size(); }

 private:
  Reactor& control_;
  const std::vector<Member> members_;
  uint64_t next_round_ = 1;
  std::unordered_map<uint64_t, std::shared_ptr<void>> rounds_;
};

}  // namespace icecache
