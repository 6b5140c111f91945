// Logging: one process-wide sink on stderr, as text for people or JSON lines for collectors.
// spdlog stays behind log.cc. No log call belongs on a per-token path.
#pragma once

#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>

#include "common/status.h"

namespace icecache {

enum class LogLevel { kDebug, kInfo, kWarn, kError, kOff };
enum class LogFormat { kText, kJson };

Result<LogLevel> ParseLogLevel(std::string_view name);    // debug|info|warn|error|off
Result<LogFormat> ParseLogFormat(std::string_view name);  // text|json

// Once, early in main(), before other threads start. Without it: info, text.
void InitLogging(LogLevel level, LogFormat format, std::string_view program);

// A line: an event in plain words plus named values, e.g.
//   LogInfo("listening", {{"address", a}, {"port", "7400"}});
// text: "listening address=... port=7400"; json: {"ts":..., "level":"info", "msg":"listening",
// ...}.
using LogFields = std::initializer_list<std::pair<std::string_view, std::string>>;
void LogDebug(std::string_view event, LogFields fields = {});
void LogInfo(std::string_view event, LogFields fields = {});
void LogWarn(std::string_view event, LogFields fields = {});
void LogError(std::string_view event, LogFields fields = {});

}  // namespace icecache
