// AttentionBackend: the seam behind which partial attention is computed, on the CPU or on a GPU.
//
// Every call adds to AttentionStates, so calls over disjoint token sets in any order give the same
// result as one call over their union, up to rounding. Logits beyond a quarter of the largest float
// saturate. All implementations pass tests/conformance/attention_backend_suite.h against the float64
// reference.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "common/ids.h"
#include "common/status.h"
#include "kernels/attention_state.h"
#include "kernels/paged_kv.h"

namespace icecache {

class AttentionBackend {
 public:
  virtual ~AttentionBackend() = default;
  virtual const char* name() const = 0;  // "cpu" | "reference" | "cuda"

  // states[group] += attention of queries[group, head_dim] (scaled) over rows.
  // REQUIRES: states.head_dim == rows.head_dim, states.heads == group.
  virtual void AttendRows(const float* queries, const TokenRows& rows,
                          const AttentionStateRef& states) = 0;

  // states[group] += attention over the pages named. Pages with k == nullptr are a programmer's
  // error.
  virtual void AttendPages(const float* queries, const PagedKv& kv, std::span<const PageId> pages,
                           const AttentionStateRef& states) = 0;
};

// SIMD on the calling thread; no allocation after the first call at a size. Not thread-safe:
// one backend per thread. Cost: one read of the rows.
std::unique_ptr<AttentionBackend> MakeCpuAttention();

// float64 arithmetic, one scalar loop: the truth that others are checked against.
std::unique_ptr<AttentionBackend> MakeReferenceAttention();

}  // namespace icecache
