// ReceiveBuffers: memory for incoming messages, reused. A fresh 1 MiB buffer costs more in page
// faults (256 of them, ~100 us) than the message costs to move, so freed buffers are kept up to a
// maximum.
//
// Sizes are rounded up to powers of two. One thread. Buffers must not outlive the pool.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace icecache {

class ReceiveBuffers {
 public:
  static constexpr size_t kAlignment = 64;

  explicit ReceiveBuffers(size_t kept_bytes_max) : kept_bytes_max_(kept_bytes_max) {}
  ~ReceiveBuffers() {
    for (auto& free_list : free_) {
      for (std::byte* data : free_list) Free(data);
    }
  }
  ReceiveBuffers(const ReceiveBuffers&) = delete;
  ReceiveBuffers& operator=(const ReceiveBuffers&) = delete;

  // Returns itself to the pool. Empty by default.
  class Buffer {
   public:
    Buffer() = default;
    Buffer(ReceiveBuffers* pool, std::byte* data, int size_class)
        : pool_(pool), data_(data), size_class_(size_class) {}
    Buffer(Buffer&& other) noexcept { *this = std::move(other); }
    Buffer& operator=(Buffer&& other) noexcept {
      std::swap(pool_, other.pool_);
      std::swap(data_, other.data_);
      std::swap(size_class_, other.size_class_);
      return *this;
    }
    ~Buffer() {
      if (data_ != nullptr) pool_->GiveBack(data_, size_class_);
    }
    std::byte* data() const { return data_; }

   private:
    ReceiveBuffers* pool_ = nullptr;
    std::byte* data_ = nullptr;
    int size_class_ = 0;
  };

  // At least `bytes` of uninitialised memory, aligned to kAlignment.
  Buffer Take(size_t bytes) {
    const int size_class =
        std::bit_width(bytes <= kSmallest ? kSmallest : std::bit_ceil(bytes)) - 1;
    auto& free_list = free_[static_cast<size_t>(size_class)];
    if (free_list.empty()) {
      auto* data = static_cast<std::byte*>(
          ::operator new (size_t{1} << size_class, std::align_val_t(kAlignment)));
      return Buffer(this, data, size_class);
    }
    std::byte* data = free_list.back();
    free_list.pop_back();
    kept_bytes_ -= size_t{1} << size_class;
    return Buffer(this, data, size_class);
  }

  size_t kept_bytes() const { return kept_bytes_; }

 private:
  static constexpr size_t kSmallest = 512;

  static void Free(std::byte* data) { ::operator delete(data, std::align_val_t(kAlignment)); }
  void GiveBack(std::byte* data, int size_class) {
    const size_t bytes = size_t{1} << size_class;
    if (kept_bytes_ + bytes > kept_bytes_max_) return Free(data);
    kept_bytes_ += bytes;
    free_[static_cast<size_t>(size_class)].push_back(data);
  }

  const size_t kept_bytes_max_;
  size_t kept_bytes_ = 0;
  std::array<std::vector<std::byte*>, 64> free_;  // by size class: log2 of the size
};

}  // namespace icecache
