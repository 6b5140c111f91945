// Settings of icecache-server, and the refusals that come before anything is started.
//
// Every key is a flag, an ICECACHE_* variable and a TOML key (common/config.h). Three steps, all
// before a thread or a socket exists: ParseServerConfig reads and checks each value, ReadMachine
// asks the kernel, CheckServerConfig compares the two. A refusal says what was asked, what there
// is, and the exact remedy.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/config.h"
#include "common/limits.h"
#include "common/log.h"
#include "common/status.h"

namespace icecache {

inline constexpr char kServerVersion[] = "0.1.0";

struct ServerConfig {
  std::string host = "127.0.0.1";
  uint32_t port = 7400;  // 0: any free one
  std::string http_host = "127.0.0.1";
  uint32_t http_port = 7401;
  uint64_t memory_size = 0;  // bytes of page frames and rows, over all shards
  std::string data_dir;      // empty: nothing is written to disk
  uint32_t cold_threads = 4;
  uint64_t cold_write_rate = 0;  // bytes a second; 0: no bound
  bool cold_direct_io = false;
  uint32_t threads = 1;  // shards
  uint32_t build_threads = 1;
  std::string transports;           // UCX_TLS; empty: the default of common/transport.h
  std::string push_pages = "auto";  // into memory of workers' GPUs: ChoosePushDevice
  uint32_t merge_tokens = limits::kMergedTokensDefault;  // 0: segments are never merged
  std::string token_file;
  std::string tls_cert;  // PEM; empty: the control plane is in the clear
  std::string tls_key;
  bool allow_plaintext = false;  // beyond loopback without TLS
  uint32_t lease_ms = 0;
  uint32_t heartbeat_ms = 0;
  uint32_t drain_timeout_ms = 0;
  std::string log_level = "info";
  std::string log_format = "text";
  std::string port_file;  // JSON with the ports chosen, written when the server is ready

  // Not settings of their own: parsed from the above.
  LogLevel level = LogLevel::kInfo;
  LogFormat format = LogFormat::kText;
};

// What the machine offers. Bytes; ~0 where there is no limit.
struct Machine {
  uint32_t cores = 1;                 // that this process may use
  uint64_t memory_available = ~0ull;  // MemAvailable
  uint64_t cgroup_available =
      ~0ull;                       // what is left of the tightest memory limit of the control group
  uint64_t shm_available = ~0ull;  // free in /dev/shm
  uint64_t memlock = ~0ull;        // ulimit -l
  uint64_t files = ~0ull;          // ulimit -Hn: main() raises the soft limit to it
  std::vector<std::string> first_addresses =
      {};  // IPv4, one of each network interface; empty: unknown
};
// `root`: where proc, sys and dev are found; tests give a folder of their own. Unreadable: no
// limit.
Machine ReadMachine(const std::string& root = "");

// Defaults that depend on the machine: half of the cores for shards and for builds, memory_size
// half of what is available but at most 4 GiB.
ServerConfig DefaultServerConfig(const Machine& machine);

struct ParsedServerConfig {
  ServerConfig config;
  ConfigParser::Outcome outcome;  // exit: print text and leave
  std::string merged;             // TOML, for /config
};
Result<ParsedServerConfig> ParseServerConfig(int argc, const char* const* argv,
                                             const Machine& machine,
                                             ConfigParser::Environment environment = {});

// Refuses what cannot work: an IPv4 address that is not an interface's first (UCX's TCP knows no
// other), a non-loopback address without a token file or without TLS
// (INVALID_ARGUMENT; TLS may be waived), more memory than the machine or its control group has, a
// small /dev/shm, a low `ulimit -l` for RDMA, a `ulimit -n` that does not do for the memory's
// extents and one worker (RESOURCE_EXHAUSTED).
Status CheckServerConfig(const ServerConfig& config, const Machine& machine);

// 127.0.0.0/8, ::1 or "localhost".
bool IsLoopbackHost(const std::string& host);

}  // namespace icecache
