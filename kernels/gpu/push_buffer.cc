#include "kernels/gpu/push_buffer.h"

#include <algorithm>
#include <iterator>

#include "kernels/gpu/aligned.h"

namespace icecache::gpu {

Result<std::vector<std::byte>> PushBuffer::Offer() {
  if (handle_.empty()) {
    KV_ASSIGN_OR_RETURN(memory_, DeviceMemory::Allocate(device_, MemoryKind::kShared, bytes_));
    KV_ASSIGN_OR_RETURN(handle_, device_.Export(memory_.data()));
    free_->emplace(0, static_cast<uint32_t>(bytes_));
  }
  return handle_;
}

std::shared_ptr<const PushRegion> PushBuffer::Reserve(size_t bytes) {
  const auto wanted =
      static_cast<uint32_t>(Aligned(std::min<size_t>(bytes, limits::kPushRegionBytesMax)));
  auto found = std::find_if(free_->begin(), free_->end(),
                            [wanted](const auto& piece) { return piece.second >= wanted; });
  if (found == free_->end()) {
    found = std::max_element(free_->begin(), free_->end(),
                             [](const auto& a, const auto& b) { return a.second < b.second; });
  }
  if (found == free_->end() || wanted == 0) return nullptr;
  const auto [offset, room] = *found;
  const uint32_t given = std::min(wanted, room);
  free_->erase(found);
  if (given < room) free_->emplace(offset + given, room - given);
  auto* const region = new PushRegion{offset, given, memory_.data()};
  return {region, [free = std::weak_ptr<Free>(free_)](const PushRegion* gone) {
            if (const auto pieces = free.lock()) GiveBack(*gone, pieces.get());
            delete gone;
          }};
}

void PushBuffer::GiveBack(const PushRegion& region, Free* free) {
  auto piece = free->emplace(region.offset, region.bytes).first;
  const auto next = std::next(piece);
  if (next != free->end() && piece->first + piece->second == next->first) {
    piece->second += next->second;
    free->erase(next);
  }
  if (piece == free->begin()) return;
  const auto before = std::prev(piece);
  if (before->first + before->second != piece->first) return;
  before->second += piece->second;
  free->erase(piece);
}

uint64_t PushBuffer::free_bytes() const {
  uint64_t bytes = 0;
  for (const auto& [offset, room] : *free_) bytes += room;
  return bytes;
}

}  // namespace icecache::gpu
