#include "cacheserver/store/row_buffer.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>

#include "common/size.h"

namespace icecache {

void RowBuffer::Free::operator()(std::byte* p) const { std::free(p); }

RowBuffer::RowBuffer(PagePool& pool, TenantId tenant, DType dtype, uint32_t head_dim)
    : pool_(pool),
      tenant_(tenant),
      dtype_(dtype),
      head_dim_(head_dim),
      row_bytes_(size_t{head_dim} * DTypeBytes(dtype)) {}

RowBuffer::~RowBuffer() { Clear(); }

TokenRows RowBuffer::rows(uint32_t first, uint32_t count) const {
  KV_CHECK(first <= count_ && count <= count_ - first);
  TokenRows rows;
  rows.dtype = dtype_;
  rows.head_dim = head_dim_;
  rows.count = count;
  rows.k = k_.get() + first * row_bytes_;
  rows.v = v_.get() + first * row_bytes_;
  return rows;
}

Status RowBuffer::Reserve(uint32_t count, bool exact) {
  if (count <= capacity_) return OkStatus();
  uint32_t wanted = exact ? count : std::max({count, capacity_ + capacity_ / 2, 4u});
  Status charge = pool_.ReserveBytes(tenant_, uint64_t{wanted - capacity_} * 2 * row_bytes_);
  if (!charge.ok() && wanted > count) {
    wanted = count;
    charge = pool_.ReserveBytes(tenant_, uint64_t{wanted - capacity_} * 2 * row_bytes_);
  }
  KV_RETURN_IF_ERROR(charge);
  // realloc, not a new block and a copy: glibc grows large blocks by remapping them.
  for (Block* block : {&k_, &v_}) {
    auto* grown = static_cast<std::byte*>(std::realloc(block->get(), wanted * row_bytes_));
    if (grown == nullptr) {
      pool_.ReleaseBytes(tenant_, uint64_t{wanted - capacity_} * 2 * row_bytes_);
      return ResourceExhausted("no memory for " + std::to_string(wanted) + " rows of " +
                               FormatSize(row_bytes_) +
                               "; lower --memory-size to what this host has");
    }
    (void)block->release();
    block->reset(grown);
  }
  capacity_ = wanted;
  return OkStatus();
}

Status RowBuffer::Write(uint32_t first, const TokenRows& rows) {
  KV_CHECK(first <= count_ && rows.dtype == dtype_ && rows.head_dim == head_dim_);
  KV_RETURN_IF_ERROR(Reserve(first + rows.count));
  if (rows.count > 0) {
    std::memcpy(k_.get() + first * row_bytes_, rows.k, rows.count * row_bytes_);
    std::memcpy(v_.get() + first * row_bytes_, rows.v, rows.count * row_bytes_);
  }
  count_ = first + rows.count;
  return OkStatus();
}

void RowBuffer::Extend(uint32_t count) {
  KV_CHECK(count >= count_ && count <= capacity_);
  count_ = count;
}

void RowBuffer::DropFront(uint32_t count) {
  KV_CHECK(count <= count_);
  count_ -= count;
  if (count == 0 || count_ == 0) return;
  std::memmove(k_.get(), k_.get() + count * row_bytes_, count_ * row_bytes_);
  std::memmove(v_.get(), v_.get() + count * row_bytes_, count_ * row_bytes_);
}

void RowBuffer::Clear() {
  pool_.ReleaseBytes(tenant_, charged_bytes());
  k_.reset();
  v_.reset();
  count_ = 0;
  capacity_ = 0;
}

}  // namespace icecache
