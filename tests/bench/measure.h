// Clocks, quantiles and the description of the machine that every result carries.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace icecache {

// CPU time of this process (all its threads), in microseconds: on a shared machine wall time says
// what the neighbours did. One reading costs ~0.3 us.
double ProcessCpuMicros();
// The same for the calling thread.
double ThreadCpuMicros();
// The least that two readings of the thread's clock lie apart.
double ThreadClockCostMicros();

// q-quantile (0..1) of a sample, by nearest rank; 0 when empty.
double Quantile(std::vector<double> sample, double q);
double Mean(const std::vector<double>& sample);

// "AMD EPYC, 2 CPUs, avx2+fma+f16c" and the like.
std::string MachineName();
// $ICECACHE_COMMIT, or git's answer in the working directory, or "unknown".
std::string CommitName();

// Checksum of the running program's file, in hex: what computed a result. "unknown" when it cannot
// be read.
std::string BuildName();

// Sequential read of 256 MiB, best of three, in GB/s: by one core the ruler for every memory-bound
// figure; by several at once, each in a buffer of its own, all together.
inline constexpr size_t kReadBandwidthBytes = size_t{256} << 20;
double ReadBandwidthGBs(uint32_t threads = 1);

// Empties the caches of what was in them, by reading 96 MiB: what comes then is as on data that
// nobody has used for a while.
class CacheSweep {
 public:
  CacheSweep();
  void Run();

 private:
  std::vector<uint64_t> words_;
  uint64_t sum_ = 0;
};

}  // namespace icecache
