// icecache-bench gather: how pages get into a device's frames. Ways, as --page-way of the worker:
//
//   frames      from pinned frames at random places, by one kernel over the bus (the host verifies)
//   landing     contiguous in a pinned buffer, one copy to the device, one scatter into frames
//   ipc         as registered, by the server into one piece of the worker's device, scattered there
//   registered  as frames, from memory that is mapped and registered for reading only
//   device      already on the device (a push over CUDA IPC ends like this): scatter alone
//
// next to the bus's plain copy of as many bytes. With int8 pages come coded and are decoded on the
// way. All ways but the first end with the device's own check of the pages. Content is compared
// before anything is timed. Latency: one call and one wait; bandwidth: calls queued one after the
// other. What the host does before (receiving, copying into the buffer) is not in it.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <nlohmann/json.hpp>
#include <numeric>

#include "common/checksum.h"
#include "kernels/distance.h"
#include "kernels/gpu/page_checksum.h"
#include "kernels/int8_rows.h"
#include "kernels/memory.h"
#include "tests/bench/command.h"
#include "tests/bench/device_timing.h"
#include "tests/bench/measure.h"
#include "tests/bench/random.h"

namespace icecache {
namespace {

using Json = nlohmann::ordered_json;
using gpu::DeviceMemory;
using gpu::MemoryKind;

constexpr uint32_t kDim = 128;
constexpr size_t kRowsBytes = limits::kPageTokens * kDim * 2;  // of K, and of V
constexpr size_t kPageBytes = 2 * kRowsBytes;

struct Flags {
  std::string device = "cuda";
  std::vector<std::string> pages = {"16", "128", "1024", "4096"},
                           way = {"frames", "landing", "ipc", "registered", "device"},
                           transfer = {"native", "int8"};
  uint32_t rounds = 100;
  uint64_t seed = 1;
  bool json = false;
};

// Pages on their way into frames at random places.
class Move {
 public:
  Move(gpu::Device& device, std::string way, bool int8, uint32_t pages, uint64_t seed)
      : device_(device), way_(std::move(way)), int8_(int8), pages_(pages), random_(seed) {}
  ~Move() {
    if (registered_.bytes() > 0) device_.Unregister(registered_.data());
  }
  Move(const Move&) = delete;
  Move& operator=(const Move&) = delete;

  Status Prepare();
  void Queue() {
    if (way_ == "landing") QueuePlainCopy();
    if (way_ == "ipc") device_.Launch(gpu::CopyArgs{pushes_.data<gpu::CopySpan>(), pages_});
    device_.Launch(gpu::CopyArgs{spans_.data<gpu::CopySpan>(), pages_});
    if (way_ == "frames") return;
    device_.Launch(gpu::VerifyArgs{verify_.data<gpu::PageToVerify>(), pages_});
  }
  void QueuePlainCopy() { device_.Copy(landing_.data(), source_.data(), bytes()); }
  // DATA_LOSS when a frame does not hold its page, or its check says so.
  Status Check();
  size_t bytes() const { return pages_ * stride_; }

 private:
  std::vector<uint32_t> Shuffled() {
    std::vector<uint32_t> order(pages_);
    std::iota(order.begin(), order.end(), 0u);
    for (uint32_t i = 0; i < pages_; ++i) std::swap(order[i], order[i + random_.Below(pages_ - i)]);
    return order;
  }
  void MakePages();
  Status AllocateAll();
  // Where the device finds what is at the start of the source.
  Result<const std::byte*> Base();
  Status PreparePushes(const std::byte** base);

  gpu::Device& device_;
  const std::string way_;
  const bool int8_;
  const uint32_t pages_;
  TraceRandom random_;
  std::vector<uint32_t> from_, to_;  // places of page i
  std::vector<std::byte> travels_;   // pages as they travel, one every stride_ bytes
  std::vector<size_t> travel_bytes_;
  std::vector<std::byte> rows_;  // and as they end
  size_t stride_ = kPageBytes;
  DeviceMemory source_;    // pinned
  HostBuffer registered_;  // or this
  DeviceMemory landing_, frames_, spans_, verify_;
  DeviceMemory pushes_;    // pinned: spans of the server's launch
  DeviceMemory verdicts_;  // pinned
};

// Normal rows: random bits are no numbers that a code is of.
void Move::MakePages() {
  if (int8_) stride_ = (Int8RowsBytesMax(DType::kF16, limits::kPageTokens, kDim) + 15) / 16 * 16;
  travels_.resize(pages_ * stride_);
  rows_.resize(pages_ * kPageBytes);
  std::vector<float> x(2 * limits::kPageTokens * kDim);
  for (uint32_t i = 0; i < pages_; ++i) {
    for (float& e : x) e = static_cast<float>(random_.Normal());
    std::byte* const rows = rows_.data() + i * kPageBytes;
    std::byte* const travels = travels_.data() + i * stride_;
    FromF32(x.data(), x.size(), DType::kF16, rows);
    if (!int8_) {
      std::memcpy(travels, rows, kPageBytes);
      travel_bytes_.push_back(kPageBytes);
      continue;
    }
    travel_bytes_.push_back(
        EncodeInt8Rows({DType::kF16, kDim, limits::kPageTokens, rows, rows + kRowsBytes}, travels));
    KV_CHECK(DecodeInt8Rows({travels, travel_bytes_.back()}, DType::kF16, limits::kPageTokens, kDim,
                            rows, rows + kRowsBytes));
  }
}

Status Move::AllocateAll() {
  const auto allocate = [&](MemoryKind kind, size_t bytes) {
    return DeviceMemory::Allocate(device_, kind, bytes);
  };
  KV_ASSIGN_OR_RETURN(source_, allocate(MemoryKind::kPinned, bytes()));
  KV_ASSIGN_OR_RETURN(landing_, allocate(MemoryKind::kDevice, bytes()));
  KV_ASSIGN_OR_RETURN(frames_, allocate(MemoryKind::kDevice, pages_ * kPageBytes));
  KV_ASSIGN_OR_RETURN(spans_, allocate(MemoryKind::kDevice, pages_ * sizeof(gpu::CopySpan)));
  KV_ASSIGN_OR_RETURN(verify_, allocate(MemoryKind::kDevice, pages_ * sizeof(gpu::PageToVerify)));
  KV_ASSIGN_OR_RETURN(verdicts_, allocate(MemoryKind::kPinned, pages_ * sizeof(uint32_t)));
  std::memcpy(source_.data(), travels_.data(), bytes());
  return OkStatus();
}

Result<const std::byte*> Move::Base() {
  if (way_ == "frames") return source_.data();
  if (way_ != "registered" && way_ != "ipc") return landing_.data();
  KV_ASSIGN_OR_RETURN(HostBuffer mapped, HostBuffer::Allocate(bytes()));
  std::memcpy(mapped.data(), travels_.data(), bytes());
  KV_ASSIGN_OR_RETURN(const std::byte* const base,
                      device_.Register(mapped.span(), way_ == "ipc" ? gpu::Mapping::kWritable
                                                                    : gpu::Mapping::kReadOnly));
  registered_ = std::move(mapped);
  return base;
}

// What the server's launch moves. From then on pages are where it has put them.
Status Move::PreparePushes(const std::byte** base) {
  if (way_ != "ipc") return OkStatus();
  KV_ASSIGN_OR_RETURN(pushes_, DeviceMemory::Allocate(device_, MemoryKind::kPinned,
                                                      pages_ * sizeof(gpu::CopySpan)));
  auto* span = pushes_.data<gpu::CopySpan>();
  for (const uint32_t at : from_) {
    *span++ = {*base + at * stride_, landing_.data(at * stride_),
               static_cast<uint32_t>(travel_bytes_[at])};
  }
  *base = landing_.data();
  return OkStatus();
}

Status Move::Prepare() {
  MakePages();
  KV_RETURN_IF_ERROR(AllocateAll());
  KV_ASSIGN_OR_RETURN(const std::byte* base, Base());
  from_ = Shuffled();
  to_ = Shuffled();
  KV_RETURN_IF_ERROR(PreparePushes(&base));
  if (way_ == "landing") std::iota(from_.begin(), from_.end(), 0u);
  std::vector<gpu::CopySpan> spans;
  std::vector<gpu::PageToVerify> verify;
  for (uint32_t i = 0; i < pages_; ++i) {
    const size_t travelled = travel_bytes_[from_[i]];
    std::byte* const frame = frames_.data(to_[i] * kPageBytes);
    spans.push_back({base + from_[i] * stride_, frame, static_cast<uint32_t>(travelled)});
    gpu::PageToVerify page;
    page.k = frame;
    page.v = frame + kRowsBytes;
    page.k_bytes = page.v_bytes = kRowsBytes;
    page.verdict = verdicts_.data<uint32_t>() + i;
    if (int8_) {
      spans.back().rows = limits::kPageTokens;
      spans.back().dim = kDim;
      page.k = spans.back().from;
      page.k_bytes = static_cast<uint32_t>(travelled);
      page.v_bytes = 0;
    }
    const std::span<const std::byte> all(travels_.data() + from_[i] * stride_, travelled);
    page.seed = PageNameSeed({1, i, 1});
    page.expected = PageChecksum({1, i, 1}, all.first(page.k_bytes), all.last(page.v_bytes), {});
    verify.push_back(page);
  }
  device_.Copy(spans_.data(), spans.data(), spans.size() * sizeof(gpu::CopySpan));
  device_.Copy(verify_.data(), verify.data(), verify.size() * sizeof(gpu::PageToVerify));
  QueuePlainCopy();
  return device_.Synchronize();
}

Status Move::Check() {
  std::vector<std::byte> found(pages_ * kPageBytes);
  std::fill_n(verdicts_.data<uint32_t>(), pages_, 0u);
  Queue();
  device_.Copy(found.data(), frames_.data(), found.size());
  KV_RETURN_IF_ERROR(device_.Synchronize());
  for (uint32_t i = 0; i < pages_; ++i) {
    if (std::memcmp(found.data() + to_[i] * kPageBytes, rows_.data() + from_[i] * kPageBytes,
                    kPageBytes) != 0) {
      return DataLoss("page " + std::to_string(i) + " did not arrive by way of " + way_);
    }
    if (way_ != "frames" && verdicts_.data<uint32_t>()[i] != gpu::kPageIntact) {
      return DataLoss("page " + std::to_string(i) + " came by way of " + way_ +
                      " and the device calls it damaged");
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
           "icecache-bench gather --pages 128 --way registered --transfer int8";
  }
  void AddFlags(ConfigParser* parser) override {
    parser->Add("device", &flags_.device, "cuda, or emulated (checks; times mean nothing)");
    parser->AddList("pages", &flags_.pages, "Pages of 16 tokens and 8 KiB per move");
    parser->AddList("way", &flags_.way, "frames, landing, ipc, registered, device");
    parser->AddList("transfer", &flags_.transfer, "native, int8 (0.57 of the bytes)");
    parser->Add("rounds", &flags_.rounds, "Timed rounds per point", 1, 100000);
    parser->Add("seed", &flags_.seed, "Seed of contents and places");
    parser->Add("json", &flags_.json, "One JSON object per line instead of a table");
  }
  Status Run() override;

 private:
  Status RunPoint(gpu::Device& device, const std::string& way, const std::string& transfer,
                  uint32_t pages);
  Flags flags_;
};

Status GatherCommand::RunPoint(gpu::Device& device, const std::string& way,
                               const std::string& transfer, uint32_t pages) {
  Move move(device, way, transfer == "int8", pages, flags_.seed);
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
    std::printf("%-10s %-8s %6u %10.1f %10.1f %9.2f %9.2f %7.2f\n", way.c_str(), transfer.c_str(),
                pages, waited.p50_us, waited.p99_us, gbs(queued.p50_us), gbs(copy.p50_us),
                copy.p50_us / queued.p50_us);
    return OkStatus();
  }
  const Json point = {{"bench", "gather"},
                      {"device", device.info().name},
                      {"way", way},
                      {"transfer", transfer},
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
    const char* const known[] = {"frames", "landing", "ipc", "registered", "device"};
    if (std::find(std::begin(known), std::end(known), way) == std::end(known)) {
      return InvalidArgument("way '" + way +
                             "', expected frames, landing, ipc, registered or device");
    }
  }
  for (const std::string& transfer : flags_.transfer) {
    if (transfer != "native" && transfer != "int8") {
      return InvalidArgument("transfer '" + transfer + "', expected native or int8");
    }
  }
  KV_ASSIGN_OR_RETURN(const auto device, BenchDevice(flags_.device));
  if (!flags_.json) {
    std::printf("%s\nway        transfer  pages     p50 us     p99 us      GB/s copy GB/s  ratio\n",
                device->info().name.c_str());
  }
  for (const std::string& text : flags_.pages) {
    const auto pages = static_cast<uint32_t>(std::strtoul(text.c_str(), nullptr, 10));
    if (pages == 0 || pages > (1u << 20)) {
      return InvalidArgument("pages '" + text + "', expected 1 to 1048576");
    }
    for (const std::string& way : flags_.way) {
      for (const std::string& transfer : flags_.transfer) {
        if (way == "ipc" && transfer == "int8") continue;  // a server pushes no codes
        KV_RETURN_IF_ERROR(RunPoint(*device, way, transfer, pages));
      }
    }
  }
  return OkStatus();
}

}  // namespace

std::unique_ptr<BenchCommand> MakeGatherCommand() { return std::make_unique<GatherCommand>(); }

}  // namespace icecache
