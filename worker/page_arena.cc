#include "worker/page_arena.h"

#include "common/log.h"
#include "common/status.h"
#include "kernels/gpu/device_frames.h"
#include "kernels/gpu/page_intake.h"

namespace icecache {

std::byte* PageArena::Allocate() {
  if (free_.empty()) {
    std::byte* const chunk = AllocateChunk(kFramesPerChunk * frame_bytes_);
    for (size_t i = kFramesPerChunk; i-- > 0;) free_.push_back(chunk + i * frame_bytes_);
    ++chunk_count_;
  }
  std::byte* const frame = free_.back();
  free_.pop_back();
  return frame;
}

std::byte* PageArena::AllocateChunk(size_t bytes) {
  if (room_) {
    const Result<std::byte*> chunk =
        intake_ != nullptr ? frames_->AllocateOnDevice(bytes) : frames_->AllocateChunk(bytes);
    if (chunk.ok()) return *chunk;
    room_ = false;
    if (intake_ != nullptr) intake_->NoteHostFrames();
    LogWarn("further pages are kept on the host only", {{"reason", chunk.status().ToString()}});
  }
  chunks_.push_back(std::make_unique<std::byte[]>(bytes));
  return chunks_.back().get();
}

bool PageArena::on_device(const std::byte* frame) const {
  return intake_ != nullptr && frames_->OnDevice(frame) != nullptr;
}

uint64_t PageArena::Written(const std::byte* at, size_t bytes) {
  if (frames_ == nullptr || frames_->OnDevice(at) == nullptr) return 0;
  return frames_->MarkDirty(at, bytes);
}

void PageArena::AwaitCopies(uint64_t written) {
  if (frames_ != nullptr) frames_->AwaitCopies(written);
}

}  // namespace icecache
