#include "worker/progress.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <utility>

namespace icecache {
namespace {

constexpr int kWidth = 30;
constexpr std::chrono::milliseconds kRedraw{100};

}  // namespace

ProgressBar::ProgressBar(std::string label, bool enabled)
    : label_(std::move(label)), enabled_(enabled), start_(std::chrono::steady_clock::now()) {}

void ProgressBar::Update(uint64_t done, uint64_t total) {
  if (!enabled_ || total == 0) return;
  const auto now = std::chrono::steady_clock::now();
  if (visible_ && now - drawn_ < kRedraw && done < total) return;
  drawn_ = now;
  visible_ = true;
  const double part = std::min(1.0, static_cast<double>(done) / static_cast<double>(total));
  const double seconds = std::chrono::duration<double>(now - start_).count();
  const int filled = static_cast<int>(part * kWidth);
  const std::string bar = std::string(static_cast<size_t>(filled), '#') +
                          std::string(static_cast<size_t>(kWidth - filled), '.');
  const double left = part > 0 ? seconds * (1 - part) / part : 0;
  std::fprintf(stderr, "\r%s [%s] %3.0f %%  %.0f s left\x1b[K", label_.c_str(), bar.c_str(),
               100 * part, left);
  std::fflush(stderr);
}

void ProgressBar::Finish() {
  if (!visible_) return;
  visible_ = false;
  std::fputs("\r\x1b[K", stderr);
  std::fflush(stderr);
}

bool ProgressBar::OnTerminal() { return ::isatty(STDERR_FILENO) == 1; }

}  // namespace icecache
