#include "kernels/gpu/device_frames.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace icecache::gpu {

Result<std::byte*> DeviceFrames::AllocateChunk(size_t bytes) {
  Chunk chunk;
  KV_ASSIGN_OR_RETURN(chunk.host, DeviceMemory::Allocate(device_, MemoryKind::kPinned, bytes));
  KV_ASSIGN_OR_RETURN(chunk.twin, DeviceMemory::Allocate(device_, MemoryKind::kDevice, bytes));
  std::byte* const host = chunk.host.data();
  chunks_.emplace(host, std::move(chunk));
  bytes_ += bytes;
  return host;
}

Result<std::span<const std::byte>> DeviceFrames::Share(size_t bytes) {
  KV_CHECK(chunks_.empty() && bytes > 0);
  Chunk chunk;
  KV_ASSIGN_OR_RETURN(chunk.twin, DeviceMemory::Allocate(device_, MemoryKind::kShared, bytes));
  shared_ = {chunk.twin.data(), bytes};
  chunks_.emplace(chunk.twin.data(), std::move(chunk));
  return std::span<const std::byte>(shared_);
}

Result<std::byte*> DeviceFrames::AllocateOnDevice(size_t bytes) {
  if (bytes <= shared_.size()) {
    std::byte* const memory = shared_.data();
    shared_ = shared_.subspan(bytes);
    bytes_ += bytes;
    return memory;
  }
  Chunk chunk;
  KV_ASSIGN_OR_RETURN(chunk.twin, DeviceMemory::Allocate(device_, MemoryKind::kDevice, bytes));
  std::byte* const memory = chunk.twin.data();
  chunks_.emplace(memory, std::move(chunk));
  bytes_ += bytes;
  return memory;
}

const DeviceFrames::Chunk* DeviceFrames::Find(const std::byte* host) const {
  auto it = chunks_.upper_bound(host);
  if (it == chunks_.begin()) return nullptr;
  --it;
  return host < it->first + it->second.twin.bytes() ? &it->second : nullptr;
}

const std::byte* DeviceFrames::OnDevice(const std::byte* host) const {
  const Chunk* const chunk = Find(host);
  if (chunk == nullptr) return nullptr;
  const std::byte* const first = chunk->host.bytes() > 0 ? chunk->host.data() : chunk->twin.data();
  return chunk->twin.data() + (host - first);
}

uint64_t DeviceFrames::MarkDirty(const std::byte* host, size_t bytes) {
  const Chunk* const chunk = Find(host);
  KV_CHECK(chunk != nullptr && host + bytes <= chunk->host.data() + chunk->host.bytes());
  dirty_.push_back(
      {host, chunk->twin.data() + (host - chunk->host.data()), static_cast<uint32_t>(bytes)});
  return next_copies_;
}

void DeviceFrames::AwaitCopies(uint64_t number) {
  if (number < first_queued_ || number >= next_copies_) return;
  if (device_.synchronize_count() > seen_synchronize_) return;
  const Status status = device_.Synchronize();
  if (failed_.ok()) failed_ = status;
}

Status DeviceFrames::QueueCopies(DeviceMemory* list) {
  if (!failed_.ok()) return std::exchange(failed_, OkStatus());
  if (dirty_.empty()) return OkStatus();
  const size_t bytes = dirty_.size() * sizeof(CopySpan);
  KV_RETURN_IF_ERROR(DeviceMemory::Grow(device_, MemoryKind::kPinned, bytes, list));
  std::memcpy(list->data(), dirty_.data(), bytes);
  device_.Launch(CopyArgs{list->data<CopySpan>(), static_cast<uint32_t>(dirty_.size())});
  dirty_.clear();
  if (device_.synchronize_count() > seen_synchronize_) {
    seen_synchronize_ = device_.synchronize_count();
    first_queued_ = next_copies_;
  }
  ++next_copies_;
  return OkStatus();
}

}  // namespace icecache::gpu
