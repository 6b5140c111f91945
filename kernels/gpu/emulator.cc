#include "kernels/gpu/emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace icecache::gpu {
namespace {

// swapcontext sets the signal mask: two system calls a switch, half of the time of a kernel.
// Sanitizers follow it, and not jumps between stacks.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kJumps = false;
#else
constexpr bool kJumps = true;
#endif

constexpr size_t kStackBytes = 256 << 10;  // sanitizers' frames are large
constexpr uint32_t kThreadsMax = 1024;

enum class State : uint8_t { kReady, kAtWarp, kAtBlock, kDone };

struct Fiber {
  ucontext_t context;
  jmp_buf at;            // where it waits, with kJumps
  bool started = false;  // before that only its context is there
  State state = State::kReady;
  std::unique_ptr<std::byte[]> stack;
  std::unique_ptr<EmulatedBlock> block;
#if defined(__SANITIZE_THREAD__)
  void* tsan = nullptr;
#endif
};

}  // namespace

class BlockRun {
 public:
  BlockRun(GridSize grid, uint32_t threads, uint32_t shared_bytes, ThreadOrder order,
           const std::function<void(EmulatedBlock&)>& body)
      : grid_(grid),
        order_(order),
        body_(body),
        shared_bytes_(shared_bytes),
        fibers_(threads),
        slots_(2 * size_t{threads}) {
    KV_CHECK(threads % kWarpLanes == 0 && threads > 0 && threads <= kThreadsMax);
    // Not zeroed: untouched stacks take no memory.
    for (Fiber& fiber : fibers_) fiber.stack.reset(new std::byte[kStackBytes]);
  }

  void Run(uint32_t x, uint32_t y) {
    x_ = x;
    y_ = y;
    // A fresh allocation of the very size, so that AddressSanitizer guards its end; all NaN.
    const size_t bytes = (std::max(1u, shared_bytes_) + 15) / 16 * 16;
    shared_.reset(static_cast<std::byte*>(std::aligned_alloc(16, bytes)));
    KV_CHECK(shared_ != nullptr);
    std::memset(shared_.get(), 0xff, shared_bytes_);
    for (uint32_t t = 0; t < fibers_.size(); ++t) Start(t);
    uint32_t done = 0;
    while (done < fibers_.size()) {
      for (uint32_t i = 0; i < fibers_.size(); ++i) {
        const auto t =
            order_ == ThreadOrder::kAscending ? i : static_cast<uint32_t>(fibers_.size()) - 1 - i;
        if (fibers_[t].state == State::kReady) Resume(t);
      }
      done = Release();
    }
  }

  void Wait(uint32_t thread, State state) {
    fibers_[thread].state = state;
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(main_tsan_, 0);
#endif
    if (!kJumps) {
      swapcontext(&fibers_[thread].context, &main_);
    } else if (_setjmp(fibers_[thread].at) == 0) {
      _longjmp(main_at_, 1);
    }
  }

  EmulatedBlock::Slot* slots(uint32_t warp, uint32_t parity) {
    return slots_.data() + parity * fibers_.size() + size_t{warp} * kWarpLanes;
  }
  std::byte* shared() const { return shared_.get(); }
  uint32_t x() const { return x_; }
  uint32_t y() const { return y_; }
  uint32_t grid_x() const { return grid_.x; }

 private:
  static void Main(uint32_t low, uint32_t high) {
    const uint64_t bits = (uint64_t{high} << 32) | low;
    auto* const block = reinterpret_cast<EmulatedBlock*>(bits);
    block->run_.body_(*block);
    block->run_.Wait(block->thread_, State::kDone);
  }

  void Start(uint32_t thread) {
    Fiber& fiber = fibers_[thread];
    fiber.block = std::make_unique<EmulatedBlock>(*this, thread);
    fiber.state = State::kReady;
    fiber.started = false;
    KV_CHECK(getcontext(&fiber.context) == 0);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    const auto bits = reinterpret_cast<uint64_t>(fiber.block.get());
    // makecontext passes ints: a pointer goes as two of them.
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(&BlockRun::Main), 2,
                static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32));
#if defined(__SANITIZE_THREAD__)
    fiber.tsan = __tsan_create_fiber(0);
#endif
  }

  void Resume(uint32_t thread) {
#if defined(__SANITIZE_THREAD__)
    main_tsan_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(fibers_[thread].tsan, 0);
#endif
    Fiber& fiber = fibers_[thread];
    if (!kJumps) {
      KV_CHECK(swapcontext(&main_, &fiber.context) == 0);
    } else if (_setjmp(main_at_) == 0) {
      if (fiber.started) _longjmp(fiber.at, 1);
      fiber.started = true;
      KV_CHECK(setcontext(&fiber.context) == 0);
    }
#if defined(__SANITIZE_THREAD__)
    if (fibers_[thread].state == State::kDone) __tsan_destroy_fiber(fibers_[thread].tsan);
#endif
  }

  // Lets those go who wait for nobody else; the number that have ended.
  uint32_t Release() {
    uint32_t done = 0;
    bool moved = false;
    for (size_t first = 0; first < fibers_.size(); first += kWarpLanes) {
      uint32_t at_warp = 0;
      for (size_t t = first; t < first + kWarpLanes; ++t) {
        at_warp += fibers_[t].state == State::kAtWarp ? 1 : 0;
        done += fibers_[t].state == State::kDone ? 1 : 0;
      }
      if (at_warp == 0) continue;
      KV_CHECK(at_warp == kWarpLanes && "a lane is missing at a warp operation");
      for (size_t t = first; t < first + kWarpLanes; ++t) fibers_[t].state = State::kReady;
      moved = true;
    }
    if (moved || done == fibers_.size()) return done;
    KV_CHECK(done == 0 && "a thread has ended while others wait at a barrier");
    for (Fiber& fiber : fibers_) fiber.state = State::kReady;  // all are at the block's barrier
    return done;
  }

  const GridSize grid_;
  const ThreadOrder order_;
  const std::function<void(EmulatedBlock&)>& body_;
  const uint32_t shared_bytes_;
  uint32_t x_ = 0, y_ = 0;
  std::vector<Fiber> fibers_;
  std::vector<EmulatedBlock::Slot> slots_;  // [2, threads]
  std::unique_ptr<std::byte[], decltype(&std::free)> shared_{nullptr, &std::free};
  ucontext_t main_;
  jmp_buf main_at_;
#if defined(__SANITIZE_THREAD__)
  void* main_tsan_ = nullptr;
#endif
};

uint32_t EmulatedBlock::x() const { return run_.x(); }
uint32_t EmulatedBlock::y() const { return run_.y(); }
uint32_t EmulatedBlock::grid_x() const { return run_.grid_x(); }
std::byte* EmulatedBlock::SharedBytes() const { return run_.shared(); }
void EmulatedBlock::Sync() { run_.Wait(thread_, State::kAtBlock); }

// Two sets of slots in turn: a lane can be at most one exchange ahead of the slowest.
const EmulatedBlock::Slot* EmulatedBlock::Exchange(const Slot& mine) {
  Slot* const all = run_.slots(warp(), exchanges_++ % 2);
  all[lane()] = mine;
  run_.Wait(thread_, State::kAtWarp);
  return all;
}

namespace {

// The double closest to zero of the floats that enclose x.
float TowardZero(double x) {
  auto y = static_cast<float>(x);
  if (std::fabs(static_cast<double>(y)) > std::fabs(x)) y = std::nextafterf(y, 0.0f);
  return y;
}

}  // namespace

// Which element is whose: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
void EmulatedBlock::MmaOfFragments(const Slot* lanes, float (*widen)(uint32_t),
                                   float (&d)[4]) const {
  const auto half = [&](uint32_t word, uint32_t k) {
    return static_cast<double>(widen((word >> (k % 2 * 16)) & 0xffff));
  };
  const uint32_t row = lane() / 4;
  const uint32_t col = lane() % 4 * 2;
  for (uint32_t i = 0; i < 4; ++i) {
    const uint32_t m = row + (i < 2 ? 0 : 8);
    const uint32_t n = col + i % 2;
    double sum = d[i];
    for (uint32_t k = 0; k < 16; ++k) {
      // a: rows in lanes / 4, columns in pairs; registers 0, 1 hold k < 8, odd ones rows >= 8.
      const Slot& a = lanes[m % 8 * 4 + k % 8 / 2];
      const Slot& b = lanes[n * 4 + k % 8 / 2];
      sum += half(a.w[(m < 8 ? 0 : 1) + (k < 8 ? 0 : 2)], k) * half(b.w[4 + (k < 8 ? 0 : 1)], k);
    }
    d[i] = TowardZero(sum);
  }
}

void RunGrid(GridSize grid, uint32_t threads, uint32_t shared_bytes, ThreadOrder order,
             const std::function<void(EmulatedBlock&)>& body) {
  BlockRun run(grid, threads, shared_bytes, order, body);
  for (uint32_t y = 0; y < grid.y; ++y) {
    for (uint32_t x = 0; x < grid.x; ++x) run.Run(x, y);
  }
}

}  // namespace icecache::gpu
