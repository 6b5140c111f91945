#include "tests/bench/machine_floors.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <span>
#include <thread>
#include <utility>

#include "common/extent_socket.h"
#include "kernels/memory.h"
#include "tests/bench/measure.h"
#include "tests/bench/random.h"

namespace icecache {
namespace {

constexpr size_t kLineBytes = 64, kBlockBytes = 512, kLinesPerBlock = kBlockBytes / kLineBytes;
constexpr uint32_t kBlocksAhead = 16;               // as kernels/sketch.cc
constexpr uint64_t kLinesRead = uint64_t{1} << 21;  // at most, of one buffer
constexpr uint64_t kLinesPerSample = 1024;          // a reading of the thread's clock is dear
constexpr size_t kPageBytes = 4096;

double WallMicros() {
  return std::chrono::duration<double, std::micro>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

Floor Of(std::string what, uint64_t bytes, const char* unit, const std::vector<double>& sample) {
  Floor floor{.what = std::move(what), .bytes = bytes, .unit = unit};
  floor.samples = sample.size();
  floor.p50 = Quantile(sample, .5);
  floor.p99 = Quantile(sample, std::string_view(unit) == "GB/s" ? .01 : .99);
  return floor;
}

// All numbers below a power of two in an order without pattern, as a function of the number before:
// a multiplier of 4n + 1 and an odd increment visit each once (Hull and Dobell). Low bits alone
// repeat soon, so they are stirred with high ones on the way out, which keeps it one-to-one.
class Tour {
 public:
  Tour(uint64_t count, uint64_t seed)
      : mask_(count - 1), shift_(static_cast<uint32_t>(std::countr_zero(count) + 1) / 2) {
    TraceRandom random(seed);
    multiplier_ = (random.Bits() & ~uint64_t{7}) | 5;
    increment_ = random.Bits() | 1;
  }
  uint64_t After(uint64_t state) const { return (state * multiplier_ + increment_) & mask_; }
  uint64_t Place(uint64_t state) const { return state ^ (state >> shift_); }

 private:
  uint64_t mask_;
  uint32_t shift_;
  uint64_t multiplier_, increment_;
};

struct alignas(kLineBytes) Line {
  uint64_t next;   // place of the line after this one
  uint64_t place;  // its own
  uint64_t rest[6];
};
static_assert(sizeof(Line) == kLineBytes);

Result<Floor> Chase(std::span<Line> lines, uint64_t seed) {
  const Tour tour(lines.size(), seed);
  // In the order of states neighbours are near: in the order of the tour it would take minutes.
  for (uint64_t state = 0; state < lines.size(); ++state) {
    const uint64_t place = tour.Place(state);
    lines[place].next = tour.Place(tour.After(state));
    lines[place].place = place;
  }
  std::vector<double> sample;
  const uint64_t steps = std::min<uint64_t>(lines.size(), kLinesRead);
  uint64_t at = tour.Place(0);
  for (uint64_t done = 0; done < steps; done += kLinesPerSample) {
    const double begin = ThreadCpuMicros();
    for (uint64_t i = 0; i < kLinesPerSample; ++i) at = lines[at].next;
    asm volatile("" : : "r"(at) : "memory");
    sample.push_back((ThreadCpuMicros() - begin) * 1e3 / kLinesPerSample);
  }
  std::vector<bool> visited(lines.size());
  uint64_t state = 0;
  for (uint64_t i = 0; i < steps; ++i, state = tour.After(state)) {
    if (visited[tour.Place(state)]) return DataLoss("a line was to be read twice");
    visited[tour.Place(state)] = true;
  }
  if (at != tour.Place(state)) return DataLoss("a chain of loads ended at another line");
  return Of("random_line", lines.size_bytes(), "ns", sample);
}

// After Chase, which has written the lines.
Result<Floor> BlocksAhead(std::span<const Line> lines, uint64_t seed) {
  const uint64_t blocks = lines.size() / kLinesPerBlock;
  const Tour tour(blocks, seed);
  std::vector<uint64_t> order(std::min(blocks, kLinesRead / kLinesPerBlock));
  uint64_t state = 0, expected = 0;
  for (uint64_t& first : order) {
    first = tour.Place(state) * kLinesPerBlock;
    for (uint64_t line = 0; line < kLinesPerBlock; ++line) expected += first + line;
    state = tour.After(state);
  }
  const auto fetch = [&](uint64_t i) {
    if (i >= order.size()) return;
    // g++ drops calls of a function that does nothing but fetch ahead, unless it has an effect.
    asm volatile("");
    for (uint64_t line = 0; line < kLinesPerBlock; ++line)
      __builtin_prefetch(&lines[order[i] + line]);
  };
  std::vector<double> sample;
  uint64_t places = 0, all = 0;
  for (uint64_t done = 0; done < order.size(); done += kLinesPerSample) {
    const uint64_t end = std::min<uint64_t>(order.size(), done + kLinesPerSample);
    const double begin = ThreadCpuMicros();
    for (uint64_t i = done; i < std::min<uint64_t>(end, done + kBlocksAhead); ++i) fetch(i);
    for (uint64_t i = done; i < end; ++i) {
      if (i + kBlocksAhead < end) fetch(i + kBlocksAhead);
      for (const Line& line : lines.subspan(order[i], kLinesPerBlock)) {
        places += line.place;
        for (const uint64_t word : line.rest) all += word;
      }
    }
    asm volatile("" : : "r"(all) : "memory");
    const double micros = ThreadCpuMicros() - begin;
    sample.push_back(static_cast<double>((end - done) * kBlockBytes) / micros / 1e3);
  }
  if (places != expected || all != 0) return DataLoss("blocks read ahead are not what was written");
  return Of("random_blocks", lines.size_bytes(), "GB/s", sample);
}

// Unmaps.
class Mapping {
 public:
  Mapping(size_t bytes, int flags, int fd)
      : data_(::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, fd, 0)), bytes_(bytes) {
    // A huge page would be touched once for all of its small ones.
    if (valid()) ::madvise(data_, bytes_, MADV_NOHUGEPAGE);
  }
  ~Mapping() {
    if (valid()) ::munmap(data_, bytes_);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  bool valid() const { return data_ != MAP_FAILED; }
  volatile uint64_t& word(uint64_t page) const {
    return static_cast<volatile uint64_t*>(data_)[page * (kPageBytes / sizeof(uint64_t))];
  }

 private:
  void* data_;
  size_t bytes_;
};

int64_t PageFaults() {
  rusage used{};
  ::getrusage(RUSAGE_THREAD, &used);
  return used.ru_minflt;
}

// One touch of each page, in no order, each by itself.
template <typename Touch>
Floor TouchAll(std::string what, uint64_t pages, const Touch& touch) {
  const Tour tour(pages, 1);
  std::vector<double> sample(pages);
  const int64_t faults = PageFaults();
  uint64_t state = 0;
  for (double& micros : sample) {
    const uint64_t page = tour.Place(state);
    const double begin = WallMicros();
    touch(page);
    micros = WallMicros() - begin;
    state = tour.After(state);
  }
  Floor floor = Of(std::move(what), pages * kPageBytes, "us", sample);
  floor.page_faults = PageFaults() - faults;
  return floor;
}

// Two descriptors over which two threads wake each other.
class Bell {
 public:
  Bell() : event_(::eventfd(0, EFD_CLOEXEC)), epoll_(::epoll_create1(EPOLL_CLOEXEC)) {
    epoll_event interest{.events = EPOLLIN, .data = {}};
    valid_ = event_.valid() && epoll_.valid() &&
             ::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, event_.get(), &interest) == 0;
  }
  bool valid() const { return valid_; }
  bool Ring() const {
    const uint64_t one = 1;
    return ::write(event_.get(), &one, sizeof(one)) == sizeof(one);
  }
  // Rung once since the last wait; false after ten seconds.
  bool Wait() const {
    epoll_event event;
    uint64_t rings = 0;
    return ::epoll_wait(epoll_.get(), &event, 1, 10'000) == 1 &&
           ::read(event_.get(), &rings, sizeof(rings)) == sizeof(rings) && rings == 1;
  }

 private:
  OwnedFd event_, epoll_;
  bool valid_ = false;
};

Result<Floor> WakeUp(std::string what, uint32_t rounds, std::chrono::milliseconds pause) {
  Bell there, back;
  if (!there.valid() || !back.valid()) return ResourceExhausted("no descriptors left to wait on");
  std::jthread other([&] {
    for (uint32_t i = 0; i < rounds && there.Wait(); ++i) {
      if (!back.Ring()) return;
    }
  });
  std::vector<double> sample;
  for (uint32_t i = 0; i < rounds; ++i) {
    if (pause.count() > 0) std::this_thread::sleep_for(pause);
    const double begin = WallMicros();
    if (!there.Ring() || !back.Wait()) {
      return DeadlineExceeded("a thread was woken and did not answer, or twice, in round " +
                              std::to_string(i));
    }
    sample.push_back((WallMicros() - begin) / 2);
  }
  Floor floor = Of(std::move(what), 0, "us", sample);
  floor.threads = 2;
  return floor;
}

template <typename Call>
Floor Calls(std::string what, const Call& call) {
  constexpr int kSamples = 200, kCalls = 1000;
  std::vector<double> sample;
  for (int i = 0; i < kSamples; ++i) {
    const double begin = ThreadCpuMicros();
    for (int k = 0; k < kCalls; ++k) call();
    sample.push_back((ThreadCpuMicros() - begin) * 1e3 / kCalls);
  }
  return Of(std::move(what), 0, "ns", sample);
}

}  // namespace

Floor MemoryRead(uint32_t threads) {
  Floor floor{.what = "memory_read", .bytes = kReadBandwidthBytes, .threads = threads};
  floor.unit = "GB/s";
  floor.p50 = floor.p99 = ReadBandwidthGBs(threads);
  floor.samples = 1;
  return floor;
}

Result<std::vector<Floor>> RandomReads(uint64_t bytes, uint64_t seed) {
  KV_ASSIGN_OR_RETURN(const HostBuffer buffer,
                      HostBuffer::Allocate(std::bit_floor(std::max<uint64_t>(bytes, 1u << 20))));
  const std::span<Line> lines(reinterpret_cast<Line*>(buffer.data()), buffer.bytes() / kLineBytes);
  KV_ASSIGN_OR_RETURN(Floor chase, Chase(lines, seed));
  KV_ASSIGN_OR_RETURN(Floor blocks, BlocksAhead(lines, seed));
  return std::vector<Floor>{std::move(chase), std::move(blocks)};
}

Result<std::vector<Floor>> PageTouches(uint32_t pages) {
  const uint64_t count = std::bit_floor(std::max(pages, 64u)), bytes = count * kPageBytes;
  const OwnedFd file(::memfd_create("icecache-bench", MFD_CLOEXEC));
  if (!file.valid() || ::ftruncate(file.get(), static_cast<off_t>(bytes)) != 0)
    return ResourceExhausted("no memfd of " + std::to_string(bytes) + " bytes");
  const Mapping fresh(bytes, MAP_PRIVATE | MAP_ANONYMOUS, -1), first(bytes, MAP_SHARED, file.get());
  if (!fresh.valid() || !first.valid()) return ResourceExhausted("no mapping");
  std::vector<Floor> floors;
  floors.push_back(
      TouchAll("anonymous_page", count, [&](uint64_t page) { fresh.word(page) = page; }));
  if (floors.back().page_faults < static_cast<int64_t>(count))
    return DataLoss("fresh pages were there before they were touched");
  for (uint64_t page = 0; page < count; ++page) first.word(page) = page;
  const Mapping second(bytes, MAP_SHARED | MAP_POPULATE, file.get());
  if (!second.valid()) return ResourceExhausted("no second mapping");
  for (const char* what : {"populated_page", "populated_page_again"}) {
    uint64_t sum = 0;
    floors.push_back(TouchAll(what, count, [&](uint64_t page) { sum += second.word(page); }));
    if (sum != count * (count - 1) / 2) return DataLoss("the second mapping shows other pages");
  }
  return floors;
}

Result<std::vector<Floor>> WakeUps(uint32_t rounds) {
  std::vector<Floor> floors(2);
  KV_ASSIGN_OR_RETURN(floors[0], WakeUp("wake_at_once", rounds * 10, std::chrono::milliseconds(0)));
  KV_ASSIGN_OR_RETURN(floors[1], WakeUp("wake_after_pause", rounds, std::chrono::milliseconds(2)));
  return floors;
}

std::vector<Floor> SmallCalls() {
  double last = 0;
  const pid_t parent = ::getppid();
  std::vector<Floor> floors;
  floors.push_back(Calls("clock", [&] {
    const double now = WallMicros();
    KV_CHECK(now >= last);
    last = now;
  }));
  // glibc answers getpid() from its own memory in some versions; this is a call for certain.
  floors.push_back(Calls("system_call", [&] { KV_CHECK(::syscall(SYS_getppid) == parent); }));
  return floors;
}

}  // namespace icecache
