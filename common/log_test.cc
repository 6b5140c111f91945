#include "common/log.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

namespace icecache {
namespace {

using testing::EndsWith;
using testing::HasSubstr;

// stderr of `write` under these settings.
template <typename Write>
std::string Logged(LogLevel level, LogFormat format, Write write) {
  testing::internal::CaptureStderr();
  InitLogging(level, format, "prog");
  write();
  return testing::internal::GetCapturedStderr();
}

TEST(Log, TextNamesProgramEventAndFields) {
  const std::string line = Logged(LogLevel::kInfo, LogFormat::kText, [] {
    LogInfo("listening", {{"address", "127.0.0.1:7400"}, {"why", "two words"}, {"none", ""}});
  });
  EXPECT_THAT(line,
              HasSubstr(" I prog: listening address=127.0.0.1:7400 why=\"two words\" none=\"\"\n"));
}

TEST(Log, LevelsBelowTheChosenOneAreSilent) {
  const auto all = [] {
    LogDebug("d");
    LogInfo("i");
    LogWarn("w");
    LogError("e");
  };
  const auto lines = [&](LogLevel level) {
    const std::string text = Logged(level, LogFormat::kText, all);
    return std::count(text.begin(), text.end(), '\n');
  };
  EXPECT_EQ(lines(LogLevel::kDebug), 4);
  EXPECT_EQ(lines(LogLevel::kInfo), 3);
  EXPECT_EQ(lines(LogLevel::kWarn), 2);
  EXPECT_EQ(lines(LogLevel::kError), 1);
  EXPECT_EQ(lines(LogLevel::kOff), 0);
}

TEST(Log, JsonLineIsOneObjectWithItsFields) {
  const std::string line = Logged(LogLevel::kInfo, LogFormat::kJson, [] {
    LogWarn("slow", {{"ms", "12"}});
  });
  EXPECT_THAT(line, EndsWith("}\n"));
  const auto json = nlohmann::json::parse(line);
  EXPECT_EQ(json["level"], "warning");
  EXPECT_EQ(json["program"], "prog");
  EXPECT_EQ(json["msg"], "slow");
  EXPECT_EQ(json["ms"], "12");
  EXPECT_THAT(json["ts"].get<std::string>(), testing::MatchesRegex("....-..-..T..:..:..\\.....*"));
}

TEST(Log, JsonEscapesWhateverStandsInAField) {
  std::string every;
  for (int c = 1; c < 128; ++c) every += static_cast<char>(c);
  every += "\xc3\xa9 %v {} \"quoted\" \\ end";
  const std::string line = Logged(LogLevel::kInfo, LogFormat::kJson, [&] {
    LogInfo(every, {{every, every}});
  });
  EXPECT_EQ(std::count(line.begin(), line.end(), '\n'), 1) << "one event, one line";
  const auto json = nlohmann::json::parse(line);
  EXPECT_EQ(json["msg"], every);
  EXPECT_EQ(json[every], every);
}

TEST(Log, TextKeepsOneEventOnOneLine) {
  const std::string line = Logged(LogLevel::kInfo, LogFormat::kText, [] {
    LogInfo("refused", {{"name", "a\nERROR forged line"}, {"quoted", "say \"x\" y"}});
  });
  EXPECT_EQ(std::count(line.begin(), line.end(), '\n'), 1);
  EXPECT_THAT(line, HasSubstr("name=\"a\\nERROR forged line\""));
  EXPECT_THAT(line, HasSubstr("quoted=\"say \\\"x\\\" y\""));
}

TEST(Log, NamesParseOrListTheChoices) {
  EXPECT_EQ(ParseLogLevel("warn").value(), LogLevel::kWarn);
  EXPECT_EQ(ParseLogLevel("off").value(), LogLevel::kOff);
  EXPECT_THAT(ParseLogLevel("loud").status().message(), HasSubstr("debug, info, warn, error, off"));
  EXPECT_EQ(ParseLogFormat("json").value(), LogFormat::kJson);
  EXPECT_THAT(ParseLogFormat("xml").status().message(), HasSubstr("text, json"));
}

}  // namespace
}  // namespace icecache
