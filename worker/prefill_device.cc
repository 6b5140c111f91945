#include "worker/prefill_device.h"

#include <algorithm>

namespace icecache {

using gpu::DeviceMemory;
using gpu::MemoryKind;

DevicePrefill::DevicePrefill(gpu::Device& device, const ModelShape& shape, uint32_t total)
    : device_(device),
      shape_(shape),
      pages_((total + limits::kPageTokens - 1) / limits::kPageTokens) {}

Status DevicePrefill::Reserve(uint32_t tokens) {
  const size_t heads = size_t{tokens} * shape_.query_heads;
  const size_t page_bytes = limits::kPageTokens * shape_.row_bytes();
  const size_t lists = size_t{shape_.kv_heads} * pages_ * sizeof(PageView) +
                       size_t{shape_.kv_heads} * tokens * sizeof(gpu::AttendTask);
  const auto grow = [&](size_t bytes, DeviceMemory* memory) {
    return DeviceMemory::Grow(device_, MemoryKind::kDevice, bytes, memory);
  };
  if (rows_.bytes() == 0) {  // exact: it is the largest, and does not grow
    KV_ASSIGN_OR_RETURN(rows_,
                        DeviceMemory::Allocate(device_, MemoryKind::kDevice,
                                               size_t{shape_.kv_heads} * 2 * pages_ * page_bytes));
  }
  KV_RETURN_IF_ERROR(grow(lists, &lists_));
  KV_RETURN_IF_ERROR(grow(heads * shape_.head_dim * sizeof(float), &q_));
  KV_RETURN_IF_ERROR(grow(heads * (shape_.head_dim + 2) * sizeof(float), &states_));
  return grow(heads * shape_.head_dim * sizeof(float), &result_);
}

void DevicePrefill::QueueRows(uint32_t first, uint32_t tokens, const LayerRows& rows) {
  const size_t bytes = shape_.row_bytes();
  const size_t half = pages_ * limits::kPageTokens * bytes;
  for (uint16_t h = 0; h < shape_.kv_heads; ++h) {
    std::byte* const k = rows_.data(2 * h * half);
    device_.Copy(k + first * bytes, rows.k(KvHeadId(h)).data() + first * bytes, tokens * bytes);
    device_.Copy(k + half + first * bytes, rows.v(KvHeadId(h)).data() + first * bytes,
                 tokens * bytes);
  }
}

// Rows beyond `end` have not come yet: pages end there.
void DevicePrefill::ListPages(uint32_t end) {
  const size_t page_bytes = limits::kPageTokens * shape_.row_bytes();
  views_.clear();
  for (uint32_t h = 0; h < shape_.kv_heads; ++h) {
    const std::byte* const k = rows_.data(2 * h * pages_ * page_bytes);
    for (uint32_t p = 0; p < pages_; ++p) {
      const uint32_t begin = std::min(end, p * limits::kPageTokens);
      views_.push_back({k + p * page_bytes, k + (pages_ + p) * page_bytes,
                        std::min(limits::kPageTokens, end - begin)});
    }
  }
}

// The last tokens first: they see the most keys, and small tiles fill the end evenly.
void DevicePrefill::ListTasks(uint32_t first, uint32_t tokens) {
  const uint32_t group = shape_.group();
  const uint32_t tile = gpu::kTaskRows / group;
  tasks_.clear();
  for (uint32_t index = (tokens + tile - 1) / tile; index-- > 0;) {
    const uint32_t t = index * tile;
    const uint32_t count = std::min(tile, tokens - t);
    const uint32_t seen = (first + t + count + limits::kPageTokens - 1) / limits::kPageTokens;
    for (uint32_t h = 0; h < shape_.kv_heads; ++h) {
      tasks_.push_back({t * shape_.query_heads + h * group, count * group, h * pages_,
                        h * pages_ + seen, first + t + 1});
    }
  }
}

Status DevicePrefill::Attend(uint32_t first, uint32_t tokens, const float* q, const LayerRows& rows,
                             float* out) {
  KV_RETURN_IF_ERROR(Reserve(tokens));
  QueueRows(first, tokens, rows);
  ListPages(first + tokens);
  ListTasks(first, tokens);
  const size_t view_bytes = views_.size() * sizeof(PageView);
  gpu::AttendArgs args;
  args.queries = q_.data<float>();
  args.pages = lists_.data<PageView>();
  args.tasks = lists_.data<gpu::AttendTask>(view_bytes);
  args.states = states_.data<float>();
  args.dtype = shape_.dtype;
  args.task_count = static_cast<uint32_t>(tasks_.size());
  args.heads = tokens * shape_.query_heads;
  args.group = shape_.group();
  args.query_heads = shape_.query_heads;
  args.head_dim = shape_.head_dim;
  const size_t floats = size_t{args.heads} * shape_.head_dim;
  device_.Copy(lists_.data(), views_.data(), view_bytes);
  device_.Copy(lists_.data(view_bytes), tasks_.data(), tasks_.size() * sizeof(gpu::AttendTask));
  device_.Copy(q_.data(), q, floats * sizeof(float));
  device_.Launch(args);
  gpu::MergeArgs finish;
  finish.terms[0] = {args.states, 1};
  finish.term_count = 1;
  finish.heads = args.heads;
  finish.head_dim = shape_.head_dim;
  finish.result = result_.data<float>();
  device_.Launch(finish);
  device_.Copy(out, result_.data(), floats * sizeof(float));
  return device_.Synchronize();
}

}  // namespace icecache
