// Runs kernels on the CPU, as a GPU would and more strictly: the deterministic twin of a device.
//
// Each thread of a block is a fiber that runs until a barrier or a warp operation, so kernels run
// as they are written. Blocks run one after another. What is checked beyond results: a thread that
// is missing at a barrier or a lane at a warp operation, alignment of vector loads, and, by running
// the threads in ascending or descending order and comparing, reads that no barrier orders (a
// racecheck of sorts). Shared memory starts as NaNs; overruns of shared and global memory are
// AddressSanitizer's to find. Tensor-core products are computed from the fragments lane by lane and
// rounded toward zero, as hardware may.
//
// Cost: about 0.3 us per thread and barrier. Any thread; one kernel at a time per thread.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "kernels/gpu/block.h"

namespace icecache::gpu {

enum class ThreadOrder : uint8_t { kAscending, kDescending };

// ThreadSanitizer's fibers cost twenty times as much, and there is but one thread: tests whose work
// is all in kernels skip there.
#if defined(__SANITIZE_THREAD__)
inline constexpr bool kEmulatorIsSlow = true;
#else
inline constexpr bool kEmulatorIsSlow = false;
#endif

class BlockRun;  // one block at work (emulator.cc)

// block.h's view of the emulator, one per fiber.
class EmulatedBlock {
 public:
  EmulatedBlock(BlockRun& run, uint32_t thread) : run_(run), thread_(thread) {}

  uint32_t thread() const { return thread_; }
  uint32_t lane() const { return thread_ % kWarpLanes; }
  uint32_t warp() const { return thread_ / kWarpLanes; }
  uint32_t x() const;
  uint32_t y() const;
  uint32_t grid_x() const;
  template <typename T>
  T* shared(uint32_t byte_offset = 0) const {
    return reinterpret_cast<T*>(SharedBytes() + byte_offset);
  }

  void Sync();
  void SyncWarp() { (void)Exchange({}); }
  template <typename T>
  T ShuffleXor(T x, uint32_t mask) {
    static_assert(sizeof(T) <= sizeof(Slot));
    Slot mine = {};
    std::memcpy(&mine, &x, sizeof(T));
    const Slot* const all = Exchange(mine);
    std::memcpy(&x, &all[lane() ^ mask], sizeof(T));
    return x;
  }
  template <bool kBf16>
  void Mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const Slot* const all = Exchange({{a[0], a[1], a[2], a[3], b[0], b[1]}});
    MmaOfFragments(all, kBf16 ? WidenBF16 : WidenF16, d);
  }

 private:
  struct Slot {  // what one lane shows to the others
    uint32_t w[6];
  };
  friend class BlockRun;
  std::byte* SharedBytes() const;
  // Waits for the warp; then the lanes' slots, valid until this lane's second exchange from now.
  const Slot* Exchange(const Slot& mine);
  void MmaOfFragments(const Slot* lanes, float (*widen)(uint32_t), float (&d)[4]) const;

  BlockRun& run_;
  const uint32_t thread_;
  uint32_t exchanges_ = 0;
};

// Runs `body` once per thread of each block. Ends the process with a message when a rule of
// block.h is broken. REQUIRES: threads is a multiple of 32, at most 1024.
void RunGrid(GridSize grid, uint32_t threads, uint32_t shared_bytes, ThreadOrder order,
             const std::function<void(EmulatedBlock&)>& body);

template <typename Kernel>
void Emulate(GridSize grid, uint32_t shared_bytes, const typename Kernel::Args& args,
             ThreadOrder order) {
  RunGrid(grid, Kernel::kThreads, shared_bytes, order,
          [&args](EmulatedBlock& block) { Kernel::Run(block, args); });
}

}  // namespace icecache::gpu
