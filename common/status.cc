#include "common/status.h"

#include <array>
#include <cstdio>
#include <cstdlib>

namespace icecache {

std::string_view StatusCodeName(StatusCode code) {
  static constexpr std::array<std::string_view, 15> kNames = {"OK",
                                                              "INVALID_ARGUMENT",
                                                              "NOT_FOUND",
                                                              "ALREADY_EXISTS",
                                                              "PERMISSION_DENIED",
                                                              "UNAUTHENTICATED",
                                                              "RESOURCE_EXHAUSTED",
                                                              "FAILED_PRECONDITION",
                                                              "OUT_OF_RANGE",
                                                              "UNAVAILABLE",
                                                              "DEADLINE_EXCEEDED",
                                                              "DATA_LOSS",
                                                              "CANCELLED",
                                                              "UNIMPLEMENTED",
                                                              "INTERNAL"};
  auto index = static_cast<size_t>(code);
  return index < kNames.size() ? kNames[index] : "UNKNOWN";
}

std::string Status::ToString() const {
  std::string text(StatusCodeName(code_));
  return message_.empty() ? text : text + ": " + message_;
}

Status Status::WithContext(std::string_view where) const {
  return ok() ? *this : Status(code_, std::string(where) + ": " + message_);
}

void CheckFailed(const char* file, int line, const char* what) {
  std::fprintf(stderr, "%s:%d: invariant broken: %s\n", file, line, what);
  std::abort();
}

}  // namespace icecache
