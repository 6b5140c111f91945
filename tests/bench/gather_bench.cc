// icecache-bench gather: how pages get into a device's frames. Ways:
//
//   landing  contiguous in a pinned buffer, one copy to the device, one scatter into frames
//   gather   from pinned frames at random places, by one kernel over the bus, without a copy
//   device   already on the device (a peer's push over CUDA IPC ends like this): scatter alone
//
// next to the bus's plain copy of as many bytes. Content is compared before anything is timed.
// Latency: one call and one wait; bandwidth: calls queued one after the other.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <nlohmann/json.hpp>
#include <numeric>

#include "tests/bench/command.h"
#include "tests/bench/device_timing.h"
#include "tests/bench/measure.h"
#include "tests/bench/random.h"

namespace icecache {
namespace {

using Json = nlohmann::ordered_json;
using gpu::DeviceMemory;
using gpu::MemoryKind;

constexpr size_t kPageBytes = 8192;  // K and V of 16 tokens, head_dim 128, 16 bits

struct Flags {
  std::string device = "cuda";
  std::vector<std::string> pages = {"16", "128", "1024", "4096"},
                           way = {"landing", "gather", "device"};
  uint32_t rounds = 100;
  uint64_t seed = 1;
  bool json = false;
};

// Pages on their way into frames at random places.
class Move {
 public:
  Move(gpu::Device& device, std::string way, uint32_t pages, uint64_t seed)
      : device_(device), way_(std::move(way)), pages_(pages), random_(seed) {}

  Status Prepare();
  void Queue() {
    if (way_ == "landing") device_.Copy(landing_.data(), source_.data(), bytes());
    device_.Launch(gpu::CopyArgs{spans_.data<gpu::CopySpan>(), pages_});
  }
  void QueuePlainCopy() { device_.Copy(landing_.data(), source_.data(), bytes()); }
  // DATA_LOSS when a frame does not hold its page.
  Status Check();
  size_t bytes() const { return pages_ * kPageBytes; }

 private:
  std::vector<uint32_t> Shuffled() {
    std::vector<uint32_t> order(pages_);
    std::iota(order.begin(), order.end(), 0u);
    for (uint32_t i = 0; i < pages_; ++i) std::swap(order[i], order[i + random_.Below(pages_ - i)]);
    return order;
  }

  gpu::Device& device_;
  const std::string way_;
  const uint32_t pages_;
  TraceRandom random_;
  std::vector<uint32_t> from_, to_;  // places of page i
  DeviceMemory source_;              // pinned
  DeviceMemory landing_, frames_, spans_;
};

Status Move::Prepare() {
  KV_ASSIGN_OR_RETURN(source_, DeviceMemory::Allocate(device_, MemoryKind::kPinned, bytes()));
  KV_ASSIGN_OR_RETURN(landing_, DeviceMemory::Allocate(device_, MemoryKind::kDevice, bytes()));
  KV_ASSIGN_OR_RETURN(frames_, DeviceMemory::Allocate(device_, MemoryKind::kDevice, bytes()));
  KV_ASSIGN_OR_RETURN(
      spans_, DeviceMemory::Allocate(device_, MemoryKind::kDevice, pages_ * sizeof(gpu::CopySpan)));
  for (size_t i = 0; i < bytes() / 8; ++i) source_.data<uint64_t>()[i] = random_.Bits();
  from_ = Shuffled();
  to_ = Shuffled();
  if (way_ == "landing") std::iota(from_.begin(), from_.end(), 0u);
  const std::byte* const base = way_ == "gather" ? source_.data() : landing_.data();
  std::vector<gpu::CopySpan> spans;
  for (uint32_t i = 0; i < pages_; ++i) {
    spans.push_back({base + from_[i] * kPageBytes, frames_.data(to_[i] * kPageBytes), kPageBytes});
  }
  device_.Copy(spans_.data(), spans.data(), spans.size() * sizeof(gpu::CopySpan));
  device_.Copy(landing_.data(), source_.data(), bytes());
  return device_.Synchronize();
}

Status Move::Check() {
  std::vector<std::byte> found(bytes());
  Queue();
  device_.Copy(found.data(), frames_.data(), bytes());
  KV_RETURN_IF_ERROR(device_.Synchronize());
  for (uint32_t i = 0; i < pages_; ++i) {
    if (std::memcmp(found.data() + to_[i] * kPageBytes, source_.data(from_[i] * kPageBytes),
                    kPageBytes) != 0) {
      return DataLoss("page " + std::to_string(i) + " did not arrive by way of " + way_);
    }
  }
  return OkStatus();
}

class GatherCommand final : public BenchCommand {
 public:
  const char* name() const override { return "gather"; }
  const char* description() const override { return "Ways of pages into a GPU's frames"; }
  const char* examples() const override {
    return "icecache-bench gather --device cuda --json\n"
           "icecache-bench gather --pages 128 --way gather";
  }
  void AddFlags(ConfigParser* parser) override {
    parser->Add("device", &flags_.device, "cuda, or emulated (checks; times mean nothing)");
    parser->AddList("pages", &flags_.pages, "Pages of 8 KiB per move");
    parser->AddList("way", &flags_.way, "landing, gather, device");
    parser->Add("rounds", &flags_.rounds, "Timed rounds per point", 1, 100000);
    parser->Add("seed", &flags_.seed, "Seed of contents and places");
    parser->Add("json", &flags_.json, "One JSON object per line instead of a table");
  }
  Status Run() override;

 private:
  Status RunPoint(gpu::Device& device, const std::string& way, uint32_t pages);
  Flags flags_;
};

Status GatherCommand::RunPoint(gpu::Device& device, const std::string& way, uint32_t pages) {
  Move move(device, way, pages, flags_.seed);
  KV_RETURN_IF_ERROR(move.Prepare());
  KV_RETURN_IF_ERROR(move.Check());
  KV_ASSIGN_OR_RETURN(const DeviceTimes waited,
                      TimeWaited(device, flags_.rounds, [&] { move.Queue(); }));
  KV_ASSIGN_OR_RETURN(const DeviceTimes queued,
                      TimeQueued(device, flags_.rounds, [&] { move.Queue(); }));
  KV_ASSIGN_OR_RETURN(const DeviceTimes copy,
                      TimeQueued(device, flags_.rounds, [&] { move.QueuePlainCopy(); }));
  const auto gbs = [&](double micros) { return static_cast<double>(move.bytes()) / micros / 1e3; };
  if (!flags_.json) {
    std::printf("%-8s %6u %10.1f %10.1f %9.2f %9.2f %7.2f\n", way.c_str(), pages, waited.p50_us,
                waited.p99_us, gbs(queued.p50_us), gbs(copy.p50_us), copy.p50_us / queued.p50_us);
    return OkStatus();
  }
  const Json point = {{"bench", "gather"},
                      {"device", device.info().name},
                      {"way", way},
                      {"pages", pages},
                      {"bytes", move.bytes()},
                      {"latency_p50_us", waited.p50_us},
                      {"latency_p99_us", waited.p99_us},
                      {"gb_s", gbs(queued.p50_us)},
                      {"plain_copy_gb_s", gbs(copy.p50_us)},
                      {"of_plain_copy", copy.p50_us / queued.p50_us},
                      {"seed", flags_.seed},
                      {"commit", CommitName()},
                      {"machine", MachineName()}};
  std::printf("%s\n", point.dump().c_str());
  std::fflush(stdout);
  return OkStatus();
}

Status GatherCommand::Run() {
  for (const std::string& way : flags_.way) {
    if (way != "landing" && way != "gather" && way != "device") {
      return InvalidArgument("way '" + way + "', expected landing, gather or device");
    }
  }
  KV_ASSIGN_OR_RETURN(const auto device, BenchDevice(flags_.device));
  if (!flags_.json) {
    std::printf("%s\nway       pages     p50 us     p99 us      GB/s copy GB/s  ratio\n",
                device->info().name.c_str());
  }
  for (const std::string& text : flags_.pages) {
    const auto pages = static_cast<uint32_t>(std::strtoul(text.c_str(), nullptr, 10));
    if (pages == 0 || pages > (1u << 20)) {
      return InvalidArgument("pages '" + text + "', expected 1 to 1048576");
    }
    for (const std::string& way : flags_.way) KV_RETURN_IF_ERROR(RunPoint(*device, way, pages));
  }
  return OkStatus();
}

}  // namespace

std::unique_ptr<BenchCommand> MakeGatherCommand() { return std::make_unique<GatherCommand>(); }

}  // namespace icecache
