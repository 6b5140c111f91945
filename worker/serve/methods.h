// The ways to attend that a worker offers, by the names used in flags and reports.
#pragma once

#include <array>
#include <string_view>

#include "common/status.h"

namespace icecache {

enum class Method { kIceCache, kFullKv, kExact, kSinkWindow };

inline constexpr std::array<Method, 4> kAllMethods = {Method::kIceCache, Method::kFullKv,
                                                      Method::kExact, Method::kSinkWindow};

std::string_view MethodName(Method method);  // "icecache" | "full_kv" | "exact" | "sink_window"
Result<Method> ParseMethod(std::string_view name);
// Keeps K and V of every token in the worker.
inline bool NeedsLocalKv(Method method) {
  return method == Method::kFullKv || method == Method::kExact;
}

}  // namespace icecache
