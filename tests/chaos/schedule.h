// What goes wrong, when, and to whom: a function of the seed alone. Every turn draws the same
// numbers whatever comes of it, so that a run can be repeated.
#pragma once

#include <array>
#include <cstdint>
#include <random>
#include <string>

namespace icecache::chaos {

enum class Trouble : uint8_t {
  kNone,
  kKillWorker,
  kStopWorker,
  kStopServer,
  kKillServer,
  kDrainServer,
  kReloadTokens,     // SIGHUP
  kBadTokens,        // SIGHUP with a token file that is broken
  kFullDisk,         // for a while
  kFullDiskAndKill,  // the server dies while its disk is full
  kDamageStore,      // bytes of its files change while the server is down
};
inline constexpr std::array<const char*, 11> kTroubleNames = {
    "peace",           "kill a worker",       "stop a worker",         "stop the server",
    "kill the server", "drain the server",    "reload the token file", "break the token file",
    "fill the disk",   "fill the disk, kill", "damage the store"};

struct Turn {
  Trouble trouble = Trouble::kNone;
  double wait = 0;      // seconds before it
  uint32_t worker = 0;  // whom, where it is a worker
  double pause = 0;     // seconds it lasts
  uint64_t detail = 0;  // seeds what is left to chance: which bytes of which file

  std::string ToString() const {
    return std::string(kTroubleNames[static_cast<size_t>(trouble)]) + " (worker " +
           std::to_string(worker) + ", " + std::to_string(pause) + " s, detail " +
           std::to_string(detail) + ")";
  }
};

class Schedule {
 public:
  Schedule(uint64_t seed, uint32_t workers) : random_(seed), workers_(workers) {}

  Turn Next() {
    // Out of 32; the rest is peace.
    static constexpr std::array<uint32_t, 11> kShares = {0, 7, 4, 4, 3, 2, 1, 1, 3, 1, 2};
    Turn turn;
    turn.wait = 0.2 + 0.001 * static_cast<double>(random_() % 1000);
    turn.worker = static_cast<uint32_t>(random_() % workers_);
    turn.pause = 0.001 * static_cast<double>(random_() % 2500);
    turn.detail = random_();
    uint64_t dice = random_() % 32;
    for (size_t i = 1; i < kShares.size(); ++i) {
      if (dice < kShares[i]) {
        turn.trouble = static_cast<Trouble>(i);
        break;
      }
      dice -= kShares[i];
    }
    return turn;
  }

 private:
  std::mt19937_64 random_;
  const uint32_t workers_;
};

}  // namespace icecache::chaos
