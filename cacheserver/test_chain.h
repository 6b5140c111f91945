// For tests: published contexts that are chains of segments, each a fork of the one before.
#pragma once

#include <string>
#include <vector>

#include "cacheserver/test_worker.h"

namespace icecache {

// NAME.0, NAME.1, ... of 1, 2, ... segments more than what `from` forks (none: a context of its
// own, of `had` = 0 tokens), each of `each` tokens more, all published.
inline void MakeChain(Worker& worker, const std::string& name, uint32_t segments, uint32_t each,
                      bool shared = false, wire::Fork from = {}, uint32_t had = 0,
                      bool durable = false) {
  for (uint32_t i = 0; i < segments; ++i) {
    const std::string link = name + "." + std::to_string(i);
    if (i == 0 && from.parent.empty()) {
      ASSERT_TRUE(worker.Create(link, "cluster_tree").ok());
      ASSERT_TRUE(worker.Prefill(each).ok());
    } else {
      if (i > 0) from = {.parent = name + "." + std::to_string(i - 1)};
      from.name = link;
      const Status forked = worker.Fork(from);
      ASSERT_TRUE(forked.ok()) << forked.ToString();
      const uint32_t first = had + i * each - kWindow;
      ForEachSlice([&](uint16_t layer, uint16_t head) {
        ASSERT_TRUE(worker.PutRows(layer, head, first, kWindow + each).ok());
        ASSERT_TRUE(worker.Build(layer, head, kWindow + each).ok());
      });
    }
    const ContextId id = worker.grant().context.id;
    const Status sealed = worker.control().Do(wire::Seal{id});
    ASSERT_TRUE(sealed.ok()) << sealed.ToString();
    const Status published = worker.control().Do(wire::Publish{id, durable, shared});
    ASSERT_TRUE(published.ok()) << published.ToString();
  }
}

// Empty: there is no such context of this tenant.
inline std::vector<wire::SegmentInfo> SegmentsOf(Worker& worker, const std::string& name) {
  const auto found = worker.control().Call<wire::ContextList>(wire::Describe{name});
  return found.ok() && !found->contexts.empty() ? found->contexts[0].segments
                                                : std::vector<wire::SegmentInfo>{};
}

}  // namespace icecache
