#include "common/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <map>

#include "common/config_values.h"

namespace icecache {
namespace {

using testing::HasSubstr;
using testing::StartsWith;

// Settings of every kind in a parser, and one command with keys of its own.
struct Program {
  std::string host = "localhost";
  uint32_t port = 7400;
  uint64_t seed = 1;
  double ratio = 0.5;
  bool verbose = false;
  uint64_t memory_size = 1u << 30;
  uint32_t lease_ms = 10000;
  std::vector<std::string> peers;
  std::string secret;
  std::string prompt = "none";
  uint32_t tokens = 64;
  std::string level = "info";
  ConfigParser parser{"prog", "A program.", "prog --port 1\nprog generate hello"};

  Program() {
    parser.Add("host", &host, "address to listen on");
    parser.Add("port", &port, "its port", 0, 65535);
    parser.Add("seed", &seed, "of everything random");
    parser.Add("ratio", &ratio, "a share", 0, 1);
    parser.Section("Extras");
    parser.Add("verbose", &verbose, "say more");
    parser.AddSize("memory_size", &memory_size, "bytes of pages");
    parser.AddMillis("lease_ms", &lease_ms, "how long");
    parser.AddList("peers", &peers, "who else");
    parser.AddSecret("secret", &secret, "what only we know");
    parser.Add("level", &level, "of the log");
    parser.AddCheck("level", [this] {
      return level == "info" || level == "debug" ? OkStatus()
                                                 : InvalidArgument("'" + level + "' is no level");
    });
    auto& generate = parser.AddCommand("generate", "Makes text.", "prog generate --tokens 3 hi");
    generate.Add("tokens", &tokens, "how many", 1, 1000);
    generate.AddPositional("prompt", &prompt, "what to start from", false);
  }

  std::map<std::string, std::string> environment;
  Result<ConfigParser::Outcome> Run(std::vector<const char*> arguments) {
    arguments.insert(arguments.begin(), "prog");
    return parser.Parse(static_cast<int>(arguments.size()), arguments.data(), "prog 1.2.3",
                        [this](const char* name) -> const char* {
                          const auto it = environment.find(name);
                          return it == environment.end() ? nullptr : it->second.c_str();
                        });
  }
  std::string Error(std::vector<const char*> arguments) {
    const auto outcome = Run(std::move(arguments));
    return outcome.ok() ? "" : outcome.status().ToString();
  }
};

class TempFile {
 public:
  explicit TempFile(const std::string& text) {
    char name[] = "/tmp/icecache-config-XXXXXX";
    const int fd = mkstemp(name);
    EXPECT_GE(fd, 0);
    close(fd);
    path_ = name;
    std::ofstream(path_, std::ios::binary) << text;
  }
  ~TempFile() { std::remove(path_.c_str()); }
  TempFile(const TempFile&) = delete;
  TempFile& operator=(const TempFile&) = delete;
  const char* path() const { return path_.c_str(); }
  std::string Line(int line) const { return path_ + ":" + std::to_string(line); }

 private:
  std::string path_;
};

// ---- values ----

TEST(Config, DefaultsStayWithoutSources) {
  Program p;
  const auto outcome = p.Run({});
  ASSERT_TRUE(outcome.ok()) << outcome.status().ToString();
  EXPECT_FALSE(outcome->exit);
  EXPECT_EQ(outcome->command, "");
  EXPECT_EQ(p.host, "localhost");
  EXPECT_EQ(p.port, 7400u);
  EXPECT_EQ(p.ratio, 0.5);
  EXPECT_EQ(p.parser.SourceOf("port"), "default");
}

TEST(Config, FlagsOfEveryKind) {
  Program p;
  EXPECT_EQ(p.Error({"--host", "::1", "--port=80", "--seed", "9223372036854775807", "--ratio",
                     "0.25", "--verbose", "--memory-size", "4GiB", "--lease-ms", "2s", "--peers",
                     "a,b", "--peers=c", "--secret", "s3"}),
            "");
  EXPECT_EQ(p.host, "::1");
  EXPECT_EQ(p.port, 80u);
  EXPECT_EQ(p.seed, 9223372036854775807u);
  EXPECT_EQ(p.ratio, 0.25);
  EXPECT_TRUE(p.verbose);
  EXPECT_EQ(p.memory_size, uint64_t{4} << 30);
  EXPECT_EQ(p.lease_ms, 2000u);
  EXPECT_EQ(p.peers, (std::vector<std::string>{"a", "b", "c"}));
  EXPECT_EQ(p.secret, "s3");
  EXPECT_EQ(p.parser.SourceOf("memory_size"), "flag --memory-size");
}

TEST(Config, LastFlagWins) {
  Program p;
  EXPECT_EQ(p.Error({"--port", "1", "--port", "2", "--verbose", "--no-verbose"}), "");
  EXPECT_EQ(p.port, 2u);
  EXPECT_FALSE(p.verbose);
}

TEST(Config, BooleanForms) {
  for (const auto& [flag, value] : std::map<const char*, bool>{{"--verbose", true},
                                                               {"--no-verbose", false},
                                                               {"--verbose=true", true},
                                                               {"--verbose=false", false},
                                                               {"--verbose=off", false},
                                                               {"--verbose=YES", true}}) {
    Program p;
    p.verbose = !value;
    EXPECT_EQ(p.Error({flag}), "") << flag;
    EXPECT_EQ(p.verbose, value) << flag;
  }
  Program p;
  EXPECT_THAT(p.Error({"--verbose=maybe"}),
              HasSubstr("flag --verbose: verbose = 'maybe', expected true or false"));
}

TEST(Config, EmptyValueIsAValue) {
  Program p;
  EXPECT_EQ(p.Error({"--host=", "--port", "5"}), "");
  EXPECT_EQ(p.host, "");
  EXPECT_EQ(p.port, 5u);
  p.peers = {"x"};
  EXPECT_EQ(p.Error({"--peers="}), "");
  EXPECT_TRUE(p.peers.empty());
}

TEST(Config, FileOfEveryKind) {
  Program p;
  const TempFile file(R"(host = "h"
port = 81
seed = 5
ratio = 1
verbose = true
memory_size = 4096
lease_ms = "1.5s"
peers = ["a,b", "c"]

[generate]
tokens = 7
)");
  EXPECT_EQ(p.Error({"--config", file.path(), "generate"}), "");
  EXPECT_EQ(p.host, "h");
  EXPECT_EQ(p.port, 81u);
  EXPECT_EQ(p.seed, 5u);
  EXPECT_EQ(p.ratio, 1.0);
  EXPECT_TRUE(p.verbose);
  EXPECT_EQ(p.memory_size, 4096u);
  EXPECT_EQ(p.lease_ms, 1500u);
  EXPECT_EQ(p.peers, (std::vector<std::string>{"a,b", "c"}));
  EXPECT_EQ(p.tokens, 7u);
  EXPECT_EQ(p.parser.SourceOf("port"), file.Line(2));
  EXPECT_EQ(p.parser.SourceOf("tokens"), file.Line(11));
}

// ---- precedence ----

// All eight combinations of flag, environment and file, for a key of the parser and one of a
// command.
class Precedence : public testing::TestWithParam<int> {};

TEST_P(Precedence, FlagThenEnvironmentThenFileThenDefault) {
  const bool flag = (GetParam() & 1) != 0, variable = (GetParam() & 2) != 0,
             in_file = (GetParam() & 4) != 0;
  Program p;
  const TempFile file(in_file ? "port = 3\n[generate]\ntokens = 3\n" : "");
  if (variable) p.environment = {{"ICECACHE_PORT", "2"}, {"ICECACHE_TOKENS", "2"}};
  std::vector<const char*> arguments = {"--config", file.path(), "generate"};
  if (flag) arguments.insert(arguments.end(), {"--port", "1", "--tokens", "1"});
  ASSERT_EQ(p.Error(arguments), "");
  const uint32_t expected = flag ? 1 : variable ? 2 : in_file ? 3 : 0;
  EXPECT_EQ(p.port, expected == 0 ? 7400 : expected);
  EXPECT_EQ(p.tokens, expected == 0 ? 64 : expected);
  const std::string source = p.parser.SourceOf("port");
  EXPECT_EQ(source, flag       ? "flag --port"
                    : variable ? "variable ICECACHE_PORT"
                    : in_file  ? file.Line(1)
                               : "default");
  EXPECT_THAT(p.parser.Print(), HasSubstr("port = " + std::to_string(p.port) + "  # " + source));
}
INSTANTIATE_TEST_SUITE_P(All, Precedence, testing::Range(0, 8));

TEST(Config, ConfigFileFromEnvironmentAndFlagOverIt) {
  const TempFile one("port = 11\n"), two("port = 22\n");
  Program p;
  p.environment["ICECACHE_CONFIG"] = one.path();
  EXPECT_EQ(p.Error({}), "");
  EXPECT_EQ(p.port, 11u);
  EXPECT_EQ(p.Error({"--config", two.path()}), "");
  EXPECT_EQ(p.port, 22u);
}

TEST(Config, EmptyVariableCountsAsUnset) {
  Program p;
  p.environment["ICECACHE_PORT"] = "";
  EXPECT_EQ(p.Error({}), "");
  EXPECT_EQ(p.parser.SourceOf("port"), "default");
}

TEST(Config, AWrongValueIsRefusedAlsoWhereItIsOverruled) {
  Program p;
  p.environment["ICECACHE_PORT"] = "x";
  EXPECT_THAT(p.Error({"--port", "1"}), HasSubstr("variable ICECACHE_PORT: port = 'x'"));
}

// ---- errors: source, key, value, expectation ----

TEST(ConfigErrors, NameFlagKeyValueAndExpectation) {
  const std::vector<std::pair<std::vector<const char*>, const char*>> cases = {
      {{"--port", "70000"}, "flag --port: port = '70000', expected a whole number 0..65535"},
      {{"--port", "-1"}, "flag --port: port = '-1', expected a whole number"},
      {{"--port", "1x"}, "flag --port: port = '1x'"},
      {{"--port", "1.0"}, "flag --port: port = '1.0'"},
      {{"--port="}, "flag --port: port = ''"},
      {{"--seed", "9223372036854775808"}, "flag --seed: seed = '9223372036854775808', expected"},
      {{"--ratio", "1.5"}, "flag --ratio: ratio = '1.5', expected a number 0.0..1.0"},
      {{"--ratio", "nan"}, "flag --ratio: ratio = 'nan'"},
      {{"--memory-size", "4 gigs"},
       "flag --memory-size: memory_size = '4 gigs', expected a size such as 4GiB"},
      {{"--lease-ms", "soon"}, "lease_ms = 'soon', expected a time such as 250, 250ms or 2s"},
      {{"--level", "loud"}, "flag --level: level: 'loud' is no level"},
      {{"--prot", "1"}, "unknown flag --prot; did you mean --port?"},
      {{"--memory_size=1"}, "unknown flag --memory_size; did you mean --memory-size?"},
      {{"--prit-config"}, "unknown flag --prit-config; did you mean --print-config?"},
      {{"generate", "--token", "4"}, "unknown flag --token; did you mean --tokens?"},
      {{"generate", "--memorysize", "4"}, "did you mean --memory-size?"},
      {{"--utterly-different"}, "unknown flag --utterly-different (--help"},
      {{"-x"}, "unknown flag -x"},
      {{"generat"}, "unknown command 'generat'; did you mean generate?"},
      {{"generate", "one", "two"}, "unexpected argument 'two'"},
      {{"--port"}, "--port"},
      {{"--tokens", "3"}, "unknown flag --tokens"},
  };
  for (const auto& [arguments, text] : cases) {
    Program p;
    const std::string error = p.Error(arguments);
    EXPECT_THAT(error, HasSubstr(text));
    EXPECT_THAT(error, StartsWith("INVALID_ARGUMENT: "));
  }
}

TEST(ConfigErrors, NameFileLineKeyValueAndExpectation) {
  const std::vector<std::pair<const char*, const char*>> cases = {
      {"\nport = \"x\"", ":2: port = 'x', expected a whole number 0..65535"},
      {"port = 70000", ":1: port = '70000', expected a whole number 0..65535"},
      {"port = -1", ":1: port = '-1'"},
      {"port = 1.5", ":1: port = '1.5'"},
      {"host = 5", ":1: host = '5', expected text in quotes"},
      {"verbose = \"yes\"", ":1: verbose = 'yes', expected true or false"},
      {"ratio = true", ":1: ratio = 'true', expected a number 0.0..1.0"},
      {"memory_size = \"big\"", ":1: memory_size = 'big', expected a size"},
      {"memory_size = 1.5", ":1: memory_size = '1.5', expected a size"},
      {"lease_ms = false", ":1: lease_ms = 'false', expected a time"},
      {"peers = \"a\"", ":1: peers = 'a', expected a list such as a,b,c, written [\"a\", \"b\"]"},
      {"peers = [1]", ":1: peers = 'a list', expected a list"},
      {"host = [\"a\"]", ":1: host = 'a list', expected text"},
      {"[host]\na = 1", ":1: host = 'a table', expected text"},
      {"host = 1979-05-27", ":1: host = 'a date or time', expected text"},
      {"level = \"loud\"", ":1: level: 'loud' is no level"},
      {"# fine\nmemorysize = 1", ":2: unknown key memorysize; did you mean memory_size?"},
      {"[genrate]\ntokens = 1", ":1: unknown key genrate; did you mean [generate]?"},
      {"[generate]\ntoken = 1", ":2: unknown key token in [generate]; did you mean tokens?"},
      {"[generate]\nprompt = \"x\"", ":2: unknown key prompt in [generate]"},
      {"[generate]\ntokens = 0", ":2: tokens = '0', expected a whole number 1..1000"},
      {"generate = 1", ":1: unknown key generate"},
      {"port = 1\nport = 2", ":2: not TOML"},
      {"port = ", ":1: not TOML"},
      {"help = true", ":1: unknown key help"},
  };
  for (const auto& [text, error] : cases) {
    Program p;
    const TempFile file(text);
    EXPECT_THAT(p.Error({"--config", file.path()}),
                StartsWith(std::string("INVALID_ARGUMENT: ") + file.path() + error))
        << text;
  }
}

TEST(ConfigErrors, NameVariable) {
  Program p;
  p.environment["ICECACHE_LEASE_MS"] = "1h";
  EXPECT_THAT(p.Error({}), HasSubstr("variable ICECACHE_LEASE_MS: lease_ms = '1h', expected"));
  p.environment = {{"ICECACHE_LEVEL", "loud"}};
  EXPECT_THAT(p.Error({}), HasSubstr("variable ICECACHE_LEVEL: level: 'loud' is no level"));
}

TEST(ConfigErrors, FileThatCannotBeRead) {
  Program p;
  EXPECT_THAT(p.Error({"--config", "/nowhere/x.toml"}), HasSubstr("NOT_FOUND: "));
  EXPECT_THAT(p.Error({"--config", "/tmp"}), HasSubstr("'/tmp' cannot be read"));
  const TempFile large(std::string((1u << 20) + 1, '#'));
  EXPECT_THAT(p.Error({"--config", large.path()}), HasSubstr("more than 1048576 bytes"));
  EXPECT_THAT(p.Error({"--config"}), HasSubstr("--config"));
}

TEST(ConfigErrors, SecretsAreNotRepeated) {
  Program p;
  const TempFile file("secret = 12345\n");
  const std::string error = p.Error({"--config", file.path()});
  EXPECT_THAT(error, HasSubstr("secret = (hidden), expected text in quotes"));
  EXPECT_THAT(error, testing::Not(HasSubstr("12345")));
}

TEST(ConfigErrors, RequiredValuesMustComeFromSomewhere) {
  std::string model;
  const auto parse = [&](std::vector<const char*> arguments, const char* variable) {
    ConfigParser parser("p", "", "");
    parser.Add("model", &model, "folder of weights", true);
    arguments.insert(arguments.begin(), "p");
    return parser.Parse(static_cast<int>(arguments.size()), arguments.data(), "1",
                        [&](const char*) { return variable; });
  };
  EXPECT_EQ(
      parse({}, nullptr).status().message(),
      "model is missing: folder of weights; give --model, ICECACHE_MODEL or model in the file");
  EXPECT_TRUE(parse({"--model", "m"}, nullptr).ok());
  EXPECT_TRUE(parse({"--help"}, nullptr).ok());
  ConfigParser parser("p", "", "");
  std::string prompt;
  parser.AddPositional("prompt", &prompt, "a text", true);
  const char* argv[] = {"p", "hello"};
  const auto none = [](const char*) -> const char* { return nullptr; };
  EXPECT_EQ(parser.Parse(1, argv, "1", none).status().message(),
            "argument prompt is missing: a text");
  ASSERT_TRUE(parser.Parse(2, argv, "1", none).ok());
  EXPECT_EQ(prompt, "hello");
}

// ---- commands and built-in flags ----

TEST(Config, CommandTakesItsKeysAndItsParents) {
  Program p;
  const auto outcome = p.Run({"--port", "5", "generate", "--tokens", "3", "hi there", "--verbose"});
  ASSERT_TRUE(outcome.ok()) << outcome.status().ToString();
  EXPECT_EQ(outcome->command, "generate");
  EXPECT_EQ(p.port, 5u);
  EXPECT_EQ(p.tokens, 3u);
  EXPECT_EQ(p.prompt, "hi there");
  EXPECT_TRUE(p.verbose);
  Program q;
  EXPECT_EQ(q.Error({"generate", "--", "--not-a-flag"}), "");
  EXPECT_EQ(q.prompt, "--not-a-flag");
}

TEST(Config, VersionAndHelpEndTheProgram) {
  Program p;
  auto outcome = p.Run({"--version"});
  ASSERT_TRUE(outcome.ok());
  EXPECT_TRUE(outcome->exit);
  EXPECT_EQ(outcome->exit_code, 0);
  EXPECT_EQ(outcome->text, "prog 1.2.3\n");

  p.secret = "hunter2";
  outcome = p.Run({"--help"});
  ASSERT_TRUE(outcome.ok());
  EXPECT_TRUE(outcome->exit);
  for (const char* text :
       {"A program.", "--memory-size SIZE", "bytes of pages", "1GiB", "--verbose", "--no-verbose",
        "Extras:", "generate", "Makes text.", "--print-config", "--check-config", "--config FILE",
        "ICECACHE_", "Examples:\n  prog --port 1\n  prog generate hello"}) {
    EXPECT_THAT(outcome->text, HasSubstr(text));
  }
  EXPECT_THAT(outcome->text, testing::Not(HasSubstr("hunter2")));
  outcome = p.Run({"generate", "--help"});
  ASSERT_TRUE(outcome.ok());
  for (const char* text : {"Makes text.", "--tokens N", "[64]", "prompt", "[generate]",
                           "prog generate --tokens 3 hi"}) {
    EXPECT_THAT(outcome->text, HasSubstr(text));
  }
  EXPECT_THAT(outcome->text, testing::Not(HasSubstr("--memory-size")));
}

TEST(Config, CheckConfigSaysSoAndStillRefuses) {
  Program p;
  const auto outcome = p.Run({"--check-config"});
  ASSERT_TRUE(outcome.ok());
  EXPECT_TRUE(outcome->exit);
  EXPECT_THAT(outcome->text, HasSubstr("valid"));
  EXPECT_NE(p.Error({"--check-config", "--port", "x"}), "");
}

TEST(Config, PrintedConfigurationReadsBackTheSame) {
  Program p;
  const auto outcome = p.Run({"--print-config", "generate", "--tokens", "9", "--host",
                              "a \"b\"\\\n\x01", "--ratio", "0.1", "--memory-size", "1000001",
                              "--lease-ms", "1", "--peers", "x y,z", "--secret", "hunter2"});
  ASSERT_TRUE(outcome.ok()) << outcome.status().ToString();
  EXPECT_TRUE(outcome->exit);
  EXPECT_THAT(outcome->text, HasSubstr("port = 7400  # default"));
  EXPECT_THAT(outcome->text, HasSubstr("[generate]\ntokens = 9  # flag --tokens"));
  EXPECT_THAT(outcome->text, testing::Not(HasSubstr("hunter2")));
  Program q;
  const TempFile file(outcome->text);
  ASSERT_EQ(q.Error({"--config", file.path(), "generate"}), "");
  EXPECT_EQ(q.host, p.host);
  EXPECT_EQ(q.ratio, 0.1);
  EXPECT_EQ(q.memory_size, 1000001u);
  EXPECT_EQ(q.lease_ms, 1u);
  EXPECT_EQ(q.peers, p.peers);
  EXPECT_EQ(q.tokens, 9u);
  EXPECT_EQ(q.secret, "");
}

TEST(Config, ChecksRunOnlyForValuesThatWereSet) {
  Program p;
  p.level = "a default that would not pass";
  EXPECT_EQ(p.Error({}), "");
}

TEST(ConfigDeathTest, KeysAreSnakeCaseAndNew) {
  uint32_t n = 0;
  const auto add = [&](const char* key) {
    Program p;
    p.parser.Add(key, &n, "");
  };
  EXPECT_DEATH(add("port"), "invariant");
  EXPECT_DEATH(add("Port"), "invariant");
  EXPECT_DEATH(add("a-b"), "invariant");
  EXPECT_DEATH(add("print_config"), "invariant");
  EXPECT_DEATH(add("tokens"), "invariant");  // the command's
}

// ---- values as text ----

TEST(ConfigValues, Millis) {
  using config::ParseMillis;
  EXPECT_EQ(ParseMillis("250"), 250u);
  EXPECT_EQ(ParseMillis("250ms"), 250u);
  EXPECT_EQ(ParseMillis("2s"), 2000u);
  EXPECT_EQ(ParseMillis("1.1s"), 1100u);
  EXPECT_EQ(ParseMillis("0"), 0u);
  EXPECT_EQ(ParseMillis("4294967295"), 4294967295u);
  for (const char* bad : {"", "s", "ms", "-1", "1.5", "4294967296", "1e99s", "1m", "1 s", "nan",
                          "inf", "0.0001s", "2S"}) {
    EXPECT_EQ(ParseMillis(bad), std::nullopt) << bad;
  }
}

TEST(ConfigValues, Lists) {
  using config::SplitList;
  EXPECT_TRUE(SplitList("").empty());
  EXPECT_EQ(SplitList("a"), std::vector<std::string>{"a"});
  EXPECT_EQ(SplitList("a,,b"), (std::vector<std::string>{"a", "", "b"}));
  EXPECT_EQ(SplitList("a,"), (std::vector<std::string>{"a", ""}));
}

TEST(ConfigValues, SuggestsOnlyWhatIsNear) {
  const std::vector<std::string> keys = {"--port", "--port-file", "--memory-size"};
  EXPECT_EQ(config::DidYouMean("--prot", keys), "; did you mean --port?");
  EXPECT_EQ(config::DidYouMean("--PORT_FILE", keys), "; did you mean --port-file?");
  EXPECT_EQ(config::DidYouMean("--memory", keys), "");
  EXPECT_EQ(config::DidYouMean("--zzzzz", keys), "");
}

}  // namespace
}  // namespace icecache
