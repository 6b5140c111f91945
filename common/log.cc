#include "common/log.h"

#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <atomic>
#include <cstdio>
#include <memory>

namespace icecache {
namespace {

std::atomic<LogFormat> g_format{LogFormat::kText};

std::string JsonEscape(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char buffer[8];
      std::snprintf(buffer, sizeof buffer, "\\u%04x", static_cast<unsigned>(c));
      out += buffer;
    } else {
      out += c;
    }
  }
  return out;
}

// A value with spaces or quotes is quoted, so that a line splits back into its fields; control
// characters are escaped, so that no name that came over the wire can forge a line or drive a
// terminal.
std::string TextEscape(std::string_view text, bool quote) {
  std::string out;
  for (const char c : text) {
    const auto u = static_cast<unsigned char>(c);
    if (c == '\n') {
      out += "\\n";
    } else if (u < 0x20 || u == 0x7f) {
      char buffer[8];
      std::snprintf(buffer, sizeof buffer, "\\x%02x", static_cast<unsigned>(u));
      out += buffer;
    } else {
      if (quote && (c == '"' || c == '\\')) out += '\\';
      out += c;
    }
  }
  return quote ? '"' + out + '"' : out;
}

std::string Render(std::string_view event, LogFields fields) {
  std::string line;
  if (g_format.load(std::memory_order_relaxed) == LogFormat::kJson) {
    line = "\"msg\":\"" + JsonEscape(event) + "\"";
    for (const auto& [key, value] : fields) {
      line += ",\"" + JsonEscape(key) + "\":\"" + JsonEscape(value) + "\"";
    }
    return line;
  }
  line = TextEscape(event, false);
  for (const auto& [key, value] : fields) {
    const bool quote = value.empty() || value.find_first_of(" \"\n\t\r") != std::string::npos;
    line += " " + std::string(key) + "=" + TextEscape(value, quote);
  }
  return line;
}

void Write(spdlog::level::level_enum level, std::string_view event, LogFields fields) {
  spdlog::logger* logger = spdlog::default_logger_raw();
  if (logger->should_log(level)) logger->log(level, spdlog::string_view_t(Render(event, fields)));
}

}  // namespace

Result<LogLevel> ParseLogLevel(std::string_view name) {
  if (name == "debug") return LogLevel::kDebug;
  if (name == "info") return LogLevel::kInfo;
  if (name == "warn") return LogLevel::kWarn;
  if (name == "error") return LogLevel::kError;
  if (name == "off") return LogLevel::kOff;
  return InvalidArgument("log level '" + std::string(name) +
                         "' is not one of debug, info, warn, error, off");
}

Result<LogFormat> ParseLogFormat(std::string_view name) {
  if (name == "text") return LogFormat::kText;
  if (name == "json") return LogFormat::kJson;
  return InvalidArgument("log format '" + std::string(name) + "' is not one of text, json");
}

void InitLogging(LogLevel level, LogFormat format, std::string_view program) {
  g_format = format;
  auto logger = std::make_shared<spdlog::logger>(std::string(program),
                                                 std::make_shared<spdlog::sinks::stderr_sink_mt>());
  logger->set_pattern(format == LogFormat::kJson
                          ? R"({"ts":"%Y-%m-%dT%H:%M:%S.%e%z","level":"%l","program":"%n",%v})"
                          : "%Y-%m-%d %H:%M:%S.%e %L %n: %v");
  static constexpr spdlog::level::level_enum kLevels[] = {spdlog::level::debug, spdlog::level::info,
                                                          spdlog::level::warn, spdlog::level::err,
                                                          spdlog::level::off};
  logger->set_level(kLevels[static_cast<int>(level)]);
  logger->flush_on(spdlog::level::info);
  spdlog::set_default_logger(std::move(logger));
}

void LogDebug(std::string_view event, LogFields fields) {
  Write(spdlog::level::debug, event, fields);
}
void LogInfo(std::string_view event, LogFields fields) {
  Write(spdlog::level::info, event, fields);
}
void LogWarn(std::string_view event, LogFields fields) {
  Write(spdlog::level::warn, event, fields);
}
void LogError(std::string_view event, LogFields fields) {
  Write(spdlog::level::err, event, fields);
}

}  // namespace icecache
