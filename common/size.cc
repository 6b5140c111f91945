#include "common/size.h"

#include <array>
#include <cctype>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <utility>

namespace icecache {
namespace {

constexpr std::array<std::pair<std::string_view, double>, 13> kUnits = {{
    {"", 1},
    {"b", 1},
    {"kib", 1024.0},
    {"mib", 1048576.0},
    {"gib", 1073741824.0},
    {"tib", 1099511627776.0},
    {"kb", 1e3},
    {"mb", 1e6},
    {"gb", 1e9},
    {"tb", 1e12},
    {"k", 1024.0},
    {"m", 1048576.0},
    {"g", 1073741824.0},
}};

}  // namespace

Result<uint64_t> ParseSize(std::string_view text) {
  const auto bad = [&] {
    return InvalidArgument("'" + std::string(text) +
                           "' is not a size; write it like 4GiB, 512MiB or 65536");
  };
  double number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || number < 0) return bad();
  std::string unit;
  for (const char* p = end; p != text.data() + text.size(); ++p) {
    if (*p != ' ' || !unit.empty()) unit += static_cast<char>(std::tolower(*p));
  }
  for (const auto& [name, factor] : kUnits) {
    if (unit != name) continue;
    const double bytes = number * factor;
    if (!(bytes < 9.0e18) || (unit.empty() && bytes != std::floor(bytes))) return bad();
    return static_cast<uint64_t>(bytes);
  }
  return bad();
}

std::string FormatSize(uint64_t bytes) {
  static constexpr std::array<const char*, 5> kNames = {"B", "KiB", "MiB", "GiB", "TiB"};
  size_t unit = 0;
  uint64_t scale = 1;
  while (unit + 1 < kNames.size() && bytes >= scale * 1024) {
    scale *= 1024;
    ++unit;
  }
  if (bytes % scale == 0) return std::to_string(bytes / scale) + kNames[unit];
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%.1f%s",
                static_cast<double>(bytes) / static_cast<double>(scale), kNames[unit]);
  return buffer;
}

}  // namespace icecache
