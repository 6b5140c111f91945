// Text files of the server: configuration and tokens.
#include <unistd.h>

#include <fstream>

#include "cacheserver/context/tenant.h"
#include "common/config.h"
#include "tests/fuzz/fuzz_target.h"
#include "tests/support/tenants.h"

namespace icecache::fuzz {
namespace {

void CheckConfig(const std::string& text) {
  static const std::string path = "/tmp/fuzz-config-" + std::to_string(getpid()) + ".toml";
  std::ofstream(path, std::ios::binary) << text;
  ConfigParser parser("fuzz", "a program", "fuzz --port 1");
  std::string host = "localhost";
  uint32_t port = 1;
  uint64_t bytes = 1;
  bool flag = false;
  uint32_t ms = 1;
  parser.Add("host", &host, "a name");
  parser.Add("port", &port, "a port", 1, 65535);
  parser.AddSize("memory_size", &bytes, "a size");
  parser.Add("flag", &flag, "yes or no");
  parser.AddMillis("lease_ms", &ms, "a time");
  const char* argv[] = {"fuzz", "--config", path.c_str()};
  const auto outcome =
      parser.Parse(3, argv, "1", [](const char*) -> const char* { return nullptr; });
  unlink(path.c_str());
  if (outcome.ok() && (port < 1 || port > 65535)) Broken("accepted values are in range");
}

}  // namespace

std::vector<Target> Targets() {
  const std::string tokens =
      test::TenantEntry("alice", "s",
                        "quota = \"8GiB\"\nweight = 2\nrights = [\"read\", \"write\"]\n") +
      "\n" + test::TenantEntry("bob", "t");
  return {
      {"config",
       {"host = \"::1\"\nport = 7400\nmemory_size = \"4GiB\"\nflag = true\nlease_ms = \"2s\"\n",
        "port = 70000\n", "# nothing\n"},
       CheckConfig},
      {"tokens", {tokens}, [](const std::string& text) { (void)TenantTable::Parse(text, "fuzz"); }},
  };
}

}  // namespace icecache::fuzz
