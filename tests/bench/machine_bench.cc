// icecache-bench machine: what the machine takes for the least things that everything else here is
// made of. Read other figures by these. A few seconds.
#include <algorithm>
#include <cstdio>
#include <iterator>
#include <nlohmann/json.hpp>

#include "cacheserver/server_config.h"
#include "tests/bench/command.h"
#include "tests/bench/machine_floors.h"
#include "tests/bench/measure.h"

namespace icecache {
namespace {

constexpr uint64_t kSmallBytes = uint64_t{256} << 20;
constexpr uint32_t kPages = 4096, kRounds = 200;

struct Flags {
  uint64_t memory = uint64_t{2} << 30;
  uint64_t seed = 1;
  bool json = false;
};

class MachineCommand final : public BenchCommand {
 public:
  const char* name() const override { return "machine"; }
  const char* description() const override {
    return "This machine's floors: memory, first touches, waking a thread";
  }
  const char* examples() const override {
    return "icecache-bench machine\nicecache-bench machine --memory 8GiB --json";
  }
  void AddFlags(ConfigParser* parser) override {
    parser->AddSize("memory", &flags_.memory,
                    "The larger buffer; at most half of what is available, down to a power of two");
    parser->Add("seed", &flags_.seed, "Seed of random places");
    parser->Add("json", &flags_.json, "One JSON object per line instead of a table");
  }
  Status Run() override;

 private:
  void Print(const Floor& floor) const;
  void PrintAll(const std::vector<Floor>& floors) const {
    for (const Floor& floor : floors) Print(floor);
  }
  Flags flags_;
  const std::string commit_ = CommitName(), machine_ = MachineName();
};

void MachineCommand::Print(const Floor& floor) const {
  if (flags_.json) {
    nlohmann::ordered_json line = {
        {"bench", "machine"},       {"what", floor.what},       {"bytes", floor.bytes},
        {"threads", floor.threads}, {"unit", floor.unit},       {"p50", floor.p50},
        {"p99", floor.p99},         {"samples", floor.samples}, {"seed", flags_.seed},
        {"commit", commit_},        {"machine", machine_}};
    if (floor.page_faults >= 0) line["page_faults"] = floor.page_faults;
    std::printf("%s\n", line.dump().c_str());
  } else {
    std::printf("%-22s %8.0f %7u %9.2f %9.2f %-5s", floor.what.c_str(),
                static_cast<double>(floor.bytes) / (1 << 20), floor.threads, floor.p50, floor.p99,
                floor.unit);
    if (floor.page_faults >= 0) std::printf(" %lld page faults", (long long)floor.page_faults);
    std::printf("\n");
  }
  std::fflush(stdout);
}

Status MachineCommand::Run() {
  const Machine limits = ReadMachine();
  const uint64_t half = std::min(limits.memory_available, limits.cgroup_available) / 2;
  const uint64_t large = std::min(flags_.memory, half);
  if (!flags_.json) {
    std::printf("%s\n%-22s %8s %7s %9s %9s\n", machine_.c_str(), "", "MiB", "threads", "p50",
                "p99");
  }
  PrintAll(SmallCalls());
  KV_ASSIGN_OR_RETURN(const auto wake_ups, WakeUps(kRounds));
  PrintAll(wake_ups);
  KV_ASSIGN_OR_RETURN(const auto touches, PageTouches(kPages));
  PrintAll(touches);
  Print(MemoryRead(1));
  Print(MemoryRead(2));
  for (const uint64_t bytes : {std::min(kSmallBytes, large), large}) {
    KV_ASSIGN_OR_RETURN(const auto reads, RandomReads(bytes, flags_.seed));
    PrintAll(reads);
  }
  return OkStatus();
}

}  // namespace

std::unique_ptr<BenchCommand> MakeMachineCommand() { return std::make_unique<MachineCommand>(); }

}  // namespace icecache
