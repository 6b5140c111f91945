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

const DeviceFrames::Chunk* DeviceFrames::Find(const std::byte* host) const {
  auto it = chunks_.upper_bound(host);
  if (it == chunks_.begin()) return nullptr;
  --it;
  return host < it->first + it->second.host.bytes() ? &it->second : nullptr;
}

const std::byte* DeviceFrames::OnDevice(const std::byte* host) const {
  const Chunk* const chunk = Find(host);
  return chunk == nullptr ? nullptr : chunk->twin.data() + (host - chunk->host.data());
}

void DeviceFrames::MarkDirty(const std::byte* host, size_t bytes) {
  const Chunk* const chunk = Find(host);
  KV_CHECK(chunk != nullptr && host + bytes <= chunk->host.data() + chunk->host.bytes());
  dirty_.push_back(
      {host, chunk->twin.data() + (host - chunk->host.data()), static_cast<uint32_t>(bytes)});
}

Status DeviceFrames::QueueCopies() {
  if (dirty_.empty()) return OkStatus();
  const size_t bytes = dirty_.size() * sizeof(CopySpan);
  // The list of the last launch may be read until its Synchronize, which every layer step has had.
  KV_RETURN_IF_ERROR(DeviceMemory::Grow(device_, MemoryKind::kPinned, bytes, &spans_));
  std::memcpy(spans_.data(), dirty_.data(), bytes);
  device_.Launch(CopyArgs{spans_.data<CopySpan>(), static_cast<uint32_t>(dirty_.size())});
  dirty_.clear();
  return OkStatus();
}

}  // namespace icecache::gpu
