#include "kernels/gpu/memory_handle.h"

#include <cstring>
#include <fstream>
#include <string>

#include "common/limits.h"

namespace icecache::gpu {
namespace {

constexpr size_t kBootBytes = 36;  // of a UUID in text

// As it travels. Both sides are of one machine, so the order of bytes is.
struct Wire {
  char magic[8] = {'i', 'c', 'e', 'm', 'e', 'm', '0', '1'};
  char boot[kBootBytes] = {};
  uint32_t kind = 0;
  uint64_t bytes = 0;
  DeviceId device{};
  std::array<std::byte, 64> name{};
};
static_assert(sizeof(Wire) <= limits::kMemoryHandleBytesMax);

void ReadBoot(char (&boot)[kBootBytes]) {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  file.read(boot, kBootBytes);
}

}  // namespace

std::vector<std::byte> EncodeMemoryHandle(const MemoryHandle& handle) {
  Wire wire;
  ReadBoot(wire.boot);
  wire.kind = static_cast<uint32_t>(handle.kind);
  wire.bytes = handle.bytes;
  wire.device = handle.device;
  wire.name = handle.name;
  std::vector<std::byte> bytes(sizeof(wire));
  std::memcpy(bytes.data(), &wire, sizeof(wire));
  return bytes;
}

Result<MemoryHandle> DecodeMemoryHandle(std::span<const std::byte> bytes) {
  Wire wire, mine;
  ReadBoot(mine.boot);
  if (bytes.size() != sizeof(wire)) {
    return InvalidArgument("a memory handle of " + std::to_string(bytes.size()) +
                           " bytes, expected " + std::to_string(sizeof(wire)));
  }
  std::memcpy(&wire, bytes.data(), sizeof(wire));
  MemoryHandle handle;
  handle.kind = static_cast<MemoryHandle::Kind>(wire.kind);
  const bool known = wire.kind == static_cast<uint32_t>(MemoryHandle::Kind::kCuda) ||
                     wire.kind == static_cast<uint32_t>(MemoryHandle::Kind::kEmulated);
  if (std::memcmp(wire.magic, mine.magic, sizeof(mine.magic)) != 0 || !known) {
    return InvalidArgument("not a memory handle of this release; use worker and server of one");
  }
  if (std::memcmp(wire.boot, mine.boot, kBootBytes) != 0) {
    return Unavailable("a memory handle of another machine, or of before this one was started");
  }
  handle.bytes = wire.bytes;
  handle.device = wire.device;
  handle.name = wire.name;
  return handle;
}

std::string HostIdentity() {
  char boot[kBootBytes] = {};
  ReadBoot(boot);
  return {boot, kBootBytes};
}

}  // namespace icecache::gpu
