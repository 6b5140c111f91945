// Plain views of stored K and V. PODs only: they go to CPU and CUDA kernels alike and own nothing.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "common/limits.h"

namespace icecache {

// One page of a slice: K rows [fill, head_dim] and V rows [fill, head_dim], each contiguous.
// k == nullptr: the page is not in memory (cold); only its summaries may be used.
struct PageView {
  const std::byte* k = nullptr;
  const std::byte* v = nullptr;
  uint32_t fill = 0;  // valid rows, 1..kPageTokens
};

// All pages of one slice, indexed by PageId.
struct PagedKv {
  DType dtype = DType::kF16;
  uint32_t head_dim = 0;
  uint32_t page_count = 0;
  const PageView* pages = nullptr;

  size_t row_bytes() const { return size_t{head_dim} * DTypeBytes(dtype); }
};

// K and V rows of consecutive tokens of one slice: k[count, head_dim], v[count, head_dim].
struct TokenRows {
  DType dtype = DType::kF16;
  uint32_t head_dim = 0;
  uint32_t count = 0;
  const std::byte* k = nullptr;
  const std::byte* v = nullptr;

  size_t row_bytes() const { return size_t{head_dim} * DTypeBytes(dtype); }
};

}  // namespace icecache
