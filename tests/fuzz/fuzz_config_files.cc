// Text files of the server: configuration and tokens. Input: one byte for the format, then the
// file's bytes.
#include <unistd.h>

#include <fstream>

#include "cacheserver/context/tenant.h"
#include "common/config.h"
#include "tests/fuzz/fuzz_target.h"

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

std::vector<std::string> Seeds() {
  return {
      "\x01host = \"::1\"\nport = 7400\nmemory_size = \"4GiB\"\nflag = true\nlease_ms = \"2s\"\n",
      "\x01port = 70000\n", "\x01# nothing\n",
      std::string("\x02[[tenant]]\nname = \"alice\"\nsecret_sha256 = \"c0ffee:") +
          HashSecret("c0ffee", "s") +
          "\"\nquota = \"8GiB\"\nweight = 2\nrights = [\"read\", \"write\"]\n\n[[tenant]]\nname = "
          "\"bob\"\nsecret_sha256 = \"00:" +
          HashSecret("00", "t") + "\"\n"};
}

}  // namespace icecache::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace icecache;
  if (size == 0) return 0;
  const std::string text(reinterpret_cast<const char*>(data) + 1, size - 1);
  if (data[0] % 2 == 1) {
    fuzz::CheckConfig(text);
  } else {
    (void)TenantTable::Parse(text, "fuzz");
  }
  return 0;
}
