// A progress bar on stderr for people: redrawn ten times a second at most, gone when finished, with
// the rate and the time left. Draws nothing when disabled. One thread.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace icecache {

class ProgressBar {
 public:
  ProgressBar(std::string label, bool enabled);
  ~ProgressBar() { Finish(); }
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  void Update(uint64_t done, uint64_t total);
  void Finish();  // clears the line

  // True when stderr is a terminal.
  static bool OnTerminal();

 private:
  const std::string label_;
  const bool enabled_;
  const std::chrono::steady_clock::time_point start_;
  std::chrono::steady_clock::time_point drawn_;
  bool visible_ = false;
};

}  // namespace icecache
