#include "tests/bench/measure.h"

#include <time.h>

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <numeric>
#include <span>
#include <thread>

#include "common/checksum.h"
#include "kernels/distance.h"
#include "kernels/memory.h"

namespace icecache {
namespace {

double Micros(clockid_t clock) {
  timespec t;
  clock_gettime(clock, &t);
  return static_cast<double>(t.tv_sec) * 1e6 + static_cast<double>(t.tv_nsec) * 1e-3;
}

}  // namespace

double ProcessCpuMicros() { return Micros(CLOCK_PROCESS_CPUTIME_ID); }
double ThreadCpuMicros() { return Micros(CLOCK_THREAD_CPUTIME_ID); }

double ThreadClockCostMicros() {
  double least = 1e30;
  for (int i = 0; i < 200; ++i) {
    const double begin = ThreadCpuMicros();
    least = std::min(least, ThreadCpuMicros() - begin);
  }
  return least;
}

double Quantile(std::vector<double> sample, double q) {
  if (sample.empty()) return 0;
  const double rank = std::ceil(q * static_cast<double>(sample.size())) - 1;
  const auto i =
      static_cast<ptrdiff_t>(std::clamp(rank, 0.0, static_cast<double>(sample.size() - 1)));
  std::nth_element(sample.begin(), sample.begin() + i, sample.end());
  return sample[static_cast<size_t>(i)];
}

double Mean(const std::vector<double>& sample) {
  if (sample.empty()) return 0;
  return std::accumulate(sample.begin(), sample.end(), 0.0) / static_cast<double>(sample.size());
}

std::string MachineName() {
  std::ifstream in("/proc/cpuinfo");
  std::string line, model = "unknown CPU", flags;
  while (std::getline(in, line)) {
    const size_t colon = line.find(": ");
    if (colon == std::string::npos) continue;
    if (line.starts_with("model name")) model = line.substr(colon + 2);
    if (line.starts_with("flags")) flags = line.substr(colon + 1) + " ";
    if (!flags.empty()) break;
  }
  std::string name = model + ", " + std::to_string(std::thread::hardware_concurrency()) + " CPUs";
  const char* separator = ", ";
  for (const char* flag : {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8"}) {
    if (flags.find(std::string(" ") + flag + " ") == std::string::npos) continue;
    name += separator + std::string(flag);
    separator = "+";
  }
  return name;
}

std::string CommitName() {
  if (const char* commit = std::getenv("ICECACHE_COMMIT"); commit != nullptr && *commit != '\0')
    return commit;
  std::string name;
  if (FILE* pipe = popen("git rev-parse --short=12 HEAD 2>/dev/null", "r")) {
    char buffer[64];
    while (std::fgets(buffer, sizeof(buffer), pipe) != nullptr) name += buffer;
    pclose(pipe);
  }
  while (!name.empty() && name.back() == '\n') name.pop_back();
  return name.empty() ? "unknown" : name;
}

std::string BuildName() {
  std::ifstream file("/proc/self/exe", std::ios::binary);
  const std::string program((std::istreambuf_iterator<char>(file)),
                            std::istreambuf_iterator<char>());
  if (!file || program.empty()) return "unknown";
  char name[17];
  std::snprintf(name, sizeof(name), "%016llx",
                static_cast<unsigned long long>(Checksum64(std::as_bytes(std::span(program)))));
  return name;
}

double ReadBandwidthGBs(uint32_t threads) {
  constexpr size_t kWords = kReadBandwidthBytes / sizeof(uint64_t);
  constexpr int kRounds = 3;
  std::vector<double> rates(threads * kRounds);
  std::barrier together(threads);
  const auto read = [&](uint32_t thread) {
    HostBuffer buffer = HostBuffer::Allocate(kReadBandwidthBytes).value();
    const auto* p = reinterpret_cast<const uint64_t*>(buffer.data());
    std::memset(buffer.data(), 1, kReadBandwidthBytes);
    for (int round = 0; round < kRounds; ++round) {
      together.arrive_and_wait();
      const double begin = ThreadCpuMicros();
      uint64_t sum[8] = {};
      for (size_t i = 0; i < kWords; i += 8)
        for (size_t k = 0; k < 8; ++k) sum[k] += p[i + k];
      const uint64_t all = std::accumulate(sum, sum + 8, uint64_t{0});
      KV_CHECK(all == kWords * 0x0101010101010101u);
      rates[round * threads + thread] = kReadBandwidthBytes / (ThreadCpuMicros() - begin) / 1e3;
    }
  };
  {
    std::vector<std::jthread> others;
    for (uint32_t i = 1; i < threads; ++i) others.emplace_back(read, i);
    read(0);
  }
  double best = 0;
  for (auto round = rates.begin(); round != rates.end(); round += threads)
    best = std::max(best, std::accumulate(round, round + threads, 0.0));
  return best;
}

CacheSweep::CacheSweep() : words_((size_t{96} << 20) / sizeof(uint64_t), 1) {}

void CacheSweep::Run() {
  sum_ = std::accumulate(words_.begin(), words_.end(), sum_);
  asm volatile("" : : "r"(sum_) : "memory");
}

}  // namespace icecache
