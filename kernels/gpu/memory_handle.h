// MemoryHandle: names memory of a device for other processes on this host (Device::Export, Open).
// What a handle says is a stranger's word until the device that opens it has found it so.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "common/status.h"

namespace icecache::gpu {

using DeviceId = std::array<std::byte, 16>;  // a GPU's UUID; zeros: the emulator

struct MemoryHandle {
  enum class Kind : uint8_t { kCuda = 1, kEmulated = 2 };

  Kind kind = Kind::kCuda;
  DeviceId device{};
  uint64_t bytes = 0;
  std::array<std::byte, 64> name{};  // the runtime's own handle, or a SharedMemoryName
};

// At most limits::kMemoryHandleBytesMax; says which boot of which machine it was made on.
std::vector<std::byte> EncodeMemoryHandle(const MemoryHandle& handle);
// INVALID_ARGUMENT: not a handle. UNAVAILABLE: of another machine, or of before its last boot.
Result<MemoryHandle> DecodeMemoryHandle(std::span<const std::byte> bytes);
// This machine since its last boot: what two processes have in common that can share memory.
std::string HostIdentity();

}  // namespace icecache::gpu
