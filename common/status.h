// Status and Result: how expected failure travels.
//
// A function that can fail for a reason outside the program returns Status or Result<T>; a broken
// invariant inside it ends the process through KV_CHECK. Foreign errors (UCX, RocksDB, errno, Cap'n
// Proto exceptions) become a Status in the file that borders the library and nowhere else.
// A miss is not an error: look-ups return std::optional.
//
// A message names the thing, what was found, what was expected, and the remedy.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>

namespace icecache {

// Stable numbers: they travel on the wire (common/wire) and are the exit codes of the tools.
enum class StatusCode : uint8_t {
  kOk = 0,
  kInvalidArgument = 1,  // the caller's mistake: bad flag, file, message
  kNotFound = 2,
  kAlreadyExists = 3,
  kPermissionDenied = 4,    // known peer without the right
  kUnauthenticated = 5,     // unknown peer, wrong secret or ticket
  kResourceExhausted = 6,   // memory, quota, queue
  kFailedPrecondition = 7,  // right request at the wrong time (context not sealed, stale epoch)
  kOutOfRange = 8,
  kUnavailable = 9,  // peer gone; retry after reconnect
  kDeadlineExceeded = 10,
  kDataLoss = 11,  // checksum mismatch, truncated or corrupt data
  kCancelled = 12,
  kUnimplemented = 13,  // the peer speaks an older or newer protocol
  kInternal = 14,
};

// "DEADLINE_EXCEEDED"; never null.
std::string_view StatusCodeName(StatusCode code);

class [[nodiscard]] Status {
 public:
  Status() = default;  // OK
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }
  // "NOT_FOUND: context 'alice/doc' ..."; "OK".
  std::string ToString() const;
  // The same status with "where: " before its message; OK stays OK.
  Status WithContext(std::string_view where) const;

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

inline Status OkStatus() { return {}; }
inline Status InvalidArgument(std::string m) {
  return {StatusCode::kInvalidArgument, std::move(m)};
}
inline Status NotFound(std::string m) { return {StatusCode::kNotFound, std::move(m)}; }
inline Status AlreadyExists(std::string m) { return {StatusCode::kAlreadyExists, std::move(m)}; }
inline Status PermissionDenied(std::string m) {
  return {StatusCode::kPermissionDenied, std::move(m)};
}
inline Status Unauthenticated(std::string m) {
  return {StatusCode::kUnauthenticated, std::move(m)};
}
inline Status ResourceExhausted(std::string m) {
  return {StatusCode::kResourceExhausted, std::move(m)};
}
inline Status FailedPrecondition(std::string m) {
  return {StatusCode::kFailedPrecondition, std::move(m)};
}
inline Status OutOfRange(std::string m) { return {StatusCode::kOutOfRange, std::move(m)}; }
inline Status Unavailable(std::string m) { return {StatusCode::kUnavailable, std::move(m)}; }
inline Status DeadlineExceeded(std::string m) {
  return {StatusCode::kDeadlineExceeded, std::move(m)};
}
inline Status DataLoss(std::string m) { return {StatusCode::kDataLoss, std::move(m)}; }
inline Status Cancelled(std::string m) { return {StatusCode::kCancelled, std::move(m)}; }
inline Status Unimplemented(std::string m) { return {StatusCode::kUnimplemented, std::move(m)}; }
inline Status Internal(std::string m) { return {StatusCode::kInternal, std::move(m)}; }

// Prints `what` with file and line to stderr and aborts. For broken invariants only.
[[noreturn]] void CheckFailed(const char* file, int line, const char* what);

#define KV_CHECK(condition) \
  ((condition) ? (void)0 : ::icecache::CheckFailed(__FILE__, __LINE__, #condition))

// A value or the Status that explains its absence. value() of a failed Result aborts.
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}         // NOLINT: implicit by design
  Result(Status status) : status_(std::move(status)) {  // NOLINT: implicit by design
    KV_CHECK(!status_.ok());
  }

  bool ok() const { return value_.has_value(); }
  const Status& status() const { return status_; }
  T& value() & {
    KV_CHECK(ok());
    return *value_;
  }
  const T& value() const& {
    KV_CHECK(ok());
    return *value_;
  }
  T&& value() && {
    KV_CHECK(ok());
    return *std::move(value_);
  }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }
  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }

 private:
  std::optional<T> value_;
  Status status_;
};

#define KV_CONCAT_INNER(a, b) a##b
#define KV_CONCAT(a, b) KV_CONCAT_INNER(a, b)
// Returns the Status of `expr` from the enclosing function unless it is OK.
#define KV_RETURN_IF_ERROR(expr)                                                  \
  do {                                                                            \
    if (::icecache::Status kv_status = (expr); !kv_status.ok()) return kv_status; \
  } while (false)
// auto x = expr's value, or return its Status: KV_ASSIGN_OR_RETURN(auto x, F());
#define KV_ASSIGN_OR_RETURN(lhs, expr) \
  KV_ASSIGN_OR_RETURN_INNER(KV_CONCAT(kv_result_, __LINE__), lhs, expr)
#define KV_ASSIGN_OR_RETURN_INNER(result, lhs, expr) \
  auto result = (expr);                              \
  if (!result.ok()) return result.status();          \
  lhs = std::move(result).value()

// Of the ends of things done side by side; OK when all are.
inline Status FirstError(std::span<const Status> statuses) {
  for (const Status& status : statuses) KV_RETURN_IF_ERROR(status);
  return OkStatus();
}

}  // namespace icecache
