// Byte sizes as people write them: "4GiB", "512MiB", "65536".
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "common/status.h"

namespace icecache {

// Accepts digits (with a fraction when a unit follows) and a unit of B, KiB, MiB, GiB, TiB, or
// kB, MB, GB, TB (powers of 1000), case-insensitive, with an optional space before it.
// INVALID_ARGUMENT with an example otherwise, or when the value does not fit.
Result<uint64_t> ParseSize(std::string_view text);

// The shortest exact form: "4GiB"; otherwise one decimal: "1.5GiB".
std::string FormatSize(uint64_t bytes);

}  // namespace icecache
