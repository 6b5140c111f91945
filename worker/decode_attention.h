// DecodeAttention: a LayerAttention that keeps books, so that methods can be compared: full KV,
// exact top-k, sinks + window, icecache. All of them round K and V to the shape's dtype before
// anything is computed with them.
#pragma once

#include <cstdint>

#include "common/clock.h"
#include "worker/model/model.h"

namespace icecache {

// Sums over all tokens since the last ResetStats.
struct AttentionStats {
  uint64_t heads = 0;             // (token, layer, query head) triples
  uint64_t attended_tokens = 0;   // tokens attended to exactly, summed over those triples
  uint64_t bytes_moved = 0;       // requests and replies of the data plane
  uint64_t page_hits = 0;         // selected pages that were resident
  uint64_t page_misses = 0;       // selected pages that travelled, whole or their new rows
  uint64_t coded_pages = 0;       // of the misses, those that came in int8
  uint64_t grown_pages = 0;       // of the misses, those of which only new rows came
  uint64_t asked_ahead = 0;       // heads whose answer was asked for a step before
  uint64_t asked_again = 0;       // of those, heads whose queries moved, so that they were asked again
  uint64_t mapped_pages = 0;      // of the misses, those read in the server's memory
  uint64_t pushed_pages = 0;      // of the misses, those that the server wrote into the device
  uint64_t worker_pages = 0;      // of the misses, those copied from another worker's frames
  uint64_t worker_missed = 0;     // others' pages that were there no more, or replaced, when it came
                                  // to copying them; fetched from the server
  uint64_t worker_replaced = 0;   // likewise, while they were copied
  uint64_t worker_damaged = 0;    // likewise, since the copy failed verification
  uint64_t mapped_gone = 0;       // reused by the server before they were read; fetched again
  uint64_t remote_pages = 0;      // selected pages that the server attended to instead of sending
  uint64_t bad_pages = 0;         // failed verification and were fetched again or dropped
  uint64_t grown_steps = 0;       // layer steps in which a head needed more than its budget for --min-mass
  uint64_t degraded_steps = 0;    // layer steps that went on without the answer of a shard
  uint64_t server_select_ns = 0;  // as the shards report, summed
  uint64_t slowest_select_ns = 0;  // of a layer step the slowest shard's, summed over layer steps
  Duration select_wait{0};        // waiting for replies beyond the work done meanwhile
  Duration transfer{0};           // encoding, decoding, verifying, placing pages
  Duration attention{0};          // computing attention

  double tokens_per_head() const {
    return heads == 0 ? 0 : static_cast<double>(attended_tokens) / static_cast<double>(heads);
  }
  double hit_rate() const {
    const uint64_t pages = page_hits + page_misses;
    return pages == 0 ? 0 : static_cast<double>(page_hits) / static_cast<double>(pages);
  }
  AttentionStats& operator+=(const AttentionStats& o) {
    for (const auto sum : {&AttentionStats::heads, &AttentionStats::attended_tokens,
                           &AttentionStats::bytes_moved, &AttentionStats::page_hits,
                           &AttentionStats::page_misses, &AttentionStats::coded_pages, &AttentionStats::grown_pages,
                           &AttentionStats::asked_ahead, &AttentionStats::asked_again,
                           &AttentionStats::mapped_pages, &AttentionStats::pushed_pages,
                           &AttentionStats::worker_pages, &AttentionStats::worker_missed,
                           &AttentionStats::worker_replaced, &AttentionStats::worker_damaged,
                           &AttentionStats::mapped_gone, &AttentionStats::remote_pages,
                           &AttentionStats::bad_pages, &AttentionStats::degraded_steps,
                           &AttentionStats::grown_steps,
                           &AttentionStats::server_select_ns, &AttentionStats::slowest_select_ns}) {
      this->*sum += o.*sum;
    }
    for (const auto sum : {&AttentionStats::select_wait, &AttentionStats::transfer,
                           &AttentionStats::attention}) {
      this->*sum += o.*sum;
    }
    return *this;
  }
};

class DecodeAttention : public LayerAttention {
 public:
  virtual bool on_device() const = 0;  // as StepAttention's
  virtual const AttentionStats& stats() const = 0;
  virtual void ResetStats() = 0;
  // Bytes of K and V that this method keeps in the worker now.
  virtual uint64_t kv_bytes() const = 0;
};

}  // namespace icecache
