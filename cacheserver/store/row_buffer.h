// RowBuffer: K and V rows of consecutive tokens outside the index (sinks, tail, pending), charged
// to the tenant's ledger by capacity. Grows in place where the allocator can (realloc moves large
// blocks by remapping). Thread: the pool's owner for everything that changes it; others may read
// rows that nobody replaces.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "cacheserver/store/page_pool.h"
#include "kernels/paged_kv.h"

namespace icecache {

class RowBuffer {
 public:
  RowBuffer(PagePool& pool, TenantId tenant, DType dtype, uint32_t head_dim);
  ~RowBuffer();  // gives the charge back
  RowBuffer(const RowBuffer&) = delete;
  RowBuffer& operator=(const RowBuffer&) = delete;

  uint32_t count() const { return count_; }
  uint64_t charged_bytes() const { return uint64_t{capacity_} * 2 * row_bytes_; }
  // Rows [first, first + count) as a view; valid until the next change.
  TokenRows rows(uint32_t first, uint32_t count) const;
  TokenRows rows() const { return rows(0, count_); }
  std::span<const std::byte> k_bytes() const { return {k_.get(), size_t{count_} * row_bytes_}; }
  std::span<const std::byte> v_bytes() const { return {v_.get(), size_t{count_} * row_bytes_}; }

  // Room for `count` rows in all; grows by half at least unless exact. RESOURCE_EXHAUSTED:
  // unchanged.
  Status Reserve(uint32_t count, bool exact = false);
  // Replaces everything from row `first` on. REQUIRES: first <= count(). RESOURCE_EXHAUSTED:
  // unchanged.
  Status Write(uint32_t first, const TokenRows& rows);
  // Sets the count without writing; the new rows are filled through mutable_k and mutable_v, on any
  // thread. REQUIRES: count() <= count <= what was reserved.
  void Extend(uint32_t count);
  std::byte* mutable_k(uint32_t row) { return k_.get() + row * row_bytes_; }
  std::byte* mutable_v(uint32_t row) { return v_.get() + row * row_bytes_; }
  void DropFront(uint32_t count);
  void Clear();  // drops rows and memory

 private:
  struct Free {
    void operator()(std::byte* p) const;
  };
  using Block = std::unique_ptr<std::byte, Free>;

  PagePool& pool_;
  const TenantId tenant_;
  const DType dtype_;
  const uint32_t head_dim_;
  const size_t row_bytes_;
  uint32_t count_ = 0;
  uint32_t capacity_ = 0;
  Block k_, v_;
};

}  // namespace icecache
