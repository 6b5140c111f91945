// AttentionBackend: the seam behind which partial attention is computed, on the CPU or on a GPU.
//
// Every call adds to AttentionStates, so calls over disjoint token sets in any order give the same
// result as one call over their union, up to rounding. Logits beyond a quarter of the largest float
// saturate. All implementations pass tests/conformance/attention_backend_suite.h against the
// float64 reference.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "common/ids.h"
#include "common/status.h"
#include "kernels/attention_state.h"
#include "kernels/paged_kv.h"

namespace icecache {

// One query group and a set of tokens: rows, pages, or both. states += attention over them.
struct AttentionItem {
  const float* queries = nullptr;  // [states.heads, states.head_dim], scaled
  AttentionStateRef states;
  TokenRows rows;                 // count 0: none
  PagedKv kv;                     // what `pages` are pages of
  std::span<const PageId> pages;  // each must be in memory (k != nullptr)
};

// States, and where out / denom of them goes.
struct AttentionResult {
  AttentionStateRef states;
  float* out = nullptr;  // [states.heads, states.head_dim]
};

class AttentionBackend {
 public:
  virtual ~AttentionBackend() = default;
  virtual const char* name() const = 0;  // "cpu" | "reference" | "cuda" | "emulated"
  // Where FinishTo writes: memory of a device (or pinned), by queued work; else the host's.
  virtual bool on_device() const = 0;

  // Adds the items to what is computed; a GPU works on while the caller does something else. States
  // live until Finish or FinishTo; everything else is read by the end of the call, except pages in
  // frames of the device (DeviceFrames): whoever overwrites one asks those. All items at once: on a
  // GPU they are one launch, so a layer's heads belong into one call. Items may share states.
  // REQUIRES: one head_dim and dtype over all items. An error adds nothing.
  virtual Status Start(std::span<const AttentionItem> items) = 0;
  // States of everything started hold its attention, too. An error (of a GPU) leaves them as they
  // were. Nothing is started afterwards.
  virtual Status Finish() = 0;
  // Instead of Finish, of attention whose result alone is wanted: out of each result is what its
  // states hold, together with everything started for any part of them, as out / denom, zeros
  // without tokens. What was started for other states is dropped. On a device this is queued and
  // not waited for, its errors come out of the next Synchronize, and what the states hold
  // afterwards is undefined. Nothing is started afterwards, also after an error. REQUIRES: one
  // head_dim over all results and what was started.
  virtual Status FinishTo(std::span<const AttentionResult> results) = 0;

  Status Attend(std::span<const AttentionItem> items) {
    const Status started = Start(items);
    const Status finished = Finish();
    return started.ok() ? finished : started;
  }

  // The brief form for one group where the backend cannot fail, which is to say: on the CPU.
  void AttendRows(const float* queries, const TokenRows& rows, const AttentionStateRef& states) {
    const AttentionItem item{queries, states, rows, {}, {}};
    KV_CHECK(Attend({&item, 1}).ok());
  }
  void AttendPages(const float* queries, const PagedKv& kv, std::span<const PageId> pages,
                   const AttentionStateRef& states) {
    const AttentionItem item{queries, states, {}, kv, pages};
    KV_CHECK(Attend({&item, 1}).ok());
  }
};

// SIMD on the calling thread; no allocation after the first call at a size. Not thread-safe:
// one backend per thread. Cost: one read of the rows.
std::unique_ptr<AttentionBackend> MakeCpuAttention();

// float64 arithmetic, one scalar loop: the truth that others are checked against.
std::unique_ptr<AttentionBackend> MakeReferenceAttention();

}  // namespace icecache
