#include "cacheserver/server_config.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>

#include "cacheserver/page_push.h"
#include "common/limits.h"
#include "common/size.h"
#include "common/ucx_environment.h"

namespace icecache {
namespace {

constexpr uint64_t kNoLimit = ~0ull;
constexpr uint64_t kDefaultMemoryMax = 4ull << 30;
constexpr uint64_t kRdmaMemlockMin = 1ull << 30;
constexpr uint64_t kOwnFiles = 64;  // sockets of control and admin, the cold store, what libraries open

std::string ReadText(const std::string& path) {
  std::ifstream file(path);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

uint64_t ParseNumber(std::string_view text, uint64_t otherwise) {
  uint64_t value = 0;
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end != text.data() ? value : otherwise;
}

uint64_t ReadNumber(const std::string& path, uint64_t otherwise) {
  return ParseNumber(ReadText(path), otherwise);
}

uint64_t ReadMemAvailable(const std::string& root) {
  std::istringstream lines(ReadText(root + "/proc/meminfo"));
  std::string line;
  while (std::getline(lines, line)) {
    if (!line.starts_with("MemAvailable:")) continue;
    size_t digit = line.find_first_of("0123456789");
    if (digit == std::string::npos) break;
    return ParseNumber(std::string_view(line).substr(digit), 0) * 1024;
  }
  return kNoLimit;
}

uint64_t Left(uint64_t limit, uint64_t used) {
  // cgroup v1 says "no limit" with a number near 2^63.
  if (limit >= (1ull << 62)) return kNoLimit;
  return limit > used ? limit - used : 0;
}

// The tightest of the memory limits from this process's group up to the root.
uint64_t ReadCgroupAvailable(const std::string& root) {
  uint64_t available = kNoLimit;
  std::istringstream lines(ReadText(root + "/proc/self/cgroup"));
  std::string line;
  while (std::getline(lines, line)) {
    const bool v2 = line.starts_with("0::");
    const size_t v1 = line.find(":memory:");
    if (!v2 && v1 == std::string::npos) continue;
    std::string group = v2 ? line.substr(3) : line.substr(v1 + 8);
    const std::string base = root + "/sys/fs/cgroup" + (v2 ? "" : "/memory");
    // In a container the path may name the host's tree; the mount's own root is then the group.
    for (int depth = 0; depth < 32; ++depth) {
      const std::string at = base + group;
      const uint64_t limit =
          ReadNumber(at + (v2 ? "/memory.max" : "/memory.limit_in_bytes"), kNoLimit);
      const uint64_t used = ReadNumber(at + (v2 ? "/memory.current" : "/memory.usage_in_bytes"), 0);
      if (limit != kNoLimit) available = std::min(available, Left(limit, used));
      if (group.empty()) break;
      const size_t slash = group.rfind('/');
      group.resize(slash == std::string::npos ? 0 : slash);
    }
  }
  return available;
}

uint32_t ReadCores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
  return static_cast<uint32_t>(std::max(1, CPU_COUNT(&set)));
}

bool WantsRdma(const std::string& transports) {
  std::istringstream names(transports);
  std::string name;
  while (std::getline(names, name, ',')) {
    for (const char* rdma : {"rc", "dc", "ud", "ib"}) {
      if (name == rdma || name.starts_with(std::string(rdma) + "_")) return true;
    }
  }
  return false;
}

Status CheckHost(const ServerConfig& c) {
  if (IsLoopbackHost(c.host) || !c.token_file.empty()) return OkStatus();
  return InvalidArgument("host " + c.host +
                         " is not loopback and there is no token file, so anybody could read every "
                         "context; give --token-file FILE, or --host 127.0.0.1");
}

// Secrets and tickets travel on the control plane.
Status CheckTls(const ServerConfig& c) {
  if (c.tls_cert.empty() != c.tls_key.empty()) {
    return InvalidArgument(
        "tls-cert and tls-key belong together: give both PEM files, or neither for no TLS");
  }
  if (IsLoopbackHost(c.host) || !c.tls_cert.empty() || c.allow_plaintext) return OkStatus();
  return InvalidArgument(
      "host " + c.host +
      " is not loopback and the control plane would carry secrets in the clear; give --tls-cert "
      "FILE and --tls-key FILE, or --allow-plaintext where the network itself is trusted");
}

// UCX asks the kernel for one address of an interface and listens there; a connection to another
// address of it is made and then lost. Wildcards work with all.
Status CheckFirstAddress(const ServerConfig& c, const Machine& machine) {
  in_addr v4{};
  const auto& first = machine.first_addresses;
  if (inet_pton(AF_INET, c.host.c_str(), &v4) != 1 || v4.s_addr == INADDR_ANY || first.empty() ||
      std::find(first.begin(), first.end(), c.host) != first.end()) {
    return OkStatus();
  }
  std::string choice;
  for (const std::string& address : first) choice += address + ", ";
  return InvalidArgument("host " + c.host +
                         " is not the first address of a network interface here, and UCX's TCP "
                         "serves no other; give one of " +
                         choice + "or 0.0.0.0");
}

Status CheckHttpHost(const ServerConfig& c) {
  if (IsLoopbackHost(c.http_host) || !c.token_file.empty()) return OkStatus();
  return InvalidArgument("http-host " + c.http_host +
                         " is not loopback and there is no token file with an admin in it; give "
                         "--token-file FILE, or --http-host 127.0.0.1");
}

Status CheckMemory(const ServerConfig& c, const Machine& machine) {
  const uint64_t pool_min = uint64_t{limits::kPoolBytesMin} * c.threads;
  if (c.memory_size < pool_min) {
    return InvalidArgument("memory-size " + FormatSize(c.memory_size) + " is too little for " +
                           std::to_string(c.threads) + " shards; give --memory-size " +
                           FormatSize(pool_min) + " or more, or fewer --threads");
  }
  if (c.memory_size > machine.memory_available) {
    return ResourceExhausted("memory-size " + FormatSize(c.memory_size) + " is more than the " +
                             FormatSize(machine.memory_available) +
                             " this machine has available; give a smaller --memory-size");
  }
  if (c.memory_size > machine.cgroup_available) {
    return ResourceExhausted(
        "memory-size " + FormatSize(c.memory_size) + " is more than the " +
        FormatSize(machine.cgroup_available) +
        " left under the memory limit of this control group; give a smaller --memory-size "
        "or raise the limit (systemd: MemoryMax=, containers: --memory)");
  }
  return OkStatus();
}

// Each shard maps some of /dev/shm by itself, and each connection on this host as much again.
Status CheckSharedMemoryRoom(const ServerConfig& c, const Machine& machine) {
  const uint64_t needed = kUcxSharedBytesPerWorker * 2 * c.threads;
  const bool shared =
      c.transports.empty() || UsesSharedMemory(c.transports);  // it is in the default
  if (!shared || machine.shm_available >= needed) return OkStatus();
  return ResourceExhausted(
      "/dev/shm has " + FormatSize(machine.shm_available) + " free and " + FormatSize(needed) +
      " are needed for connections on this host by " + std::to_string(c.threads) +
      " shards; run: mount -o remount,size=1G /dev/shm (containers: --shm-size 1g)");
}

Status CheckLockedMemory(const ServerConfig& c, const Machine& machine) {
  if (!WantsRdma(c.transports) || machine.memlock >= kRdmaMemlockMin) return OkStatus();
  return ResourceExhausted(
      "transports " + c.transports + " lock memory and `ulimit -l` is " +
      FormatSize(machine.memlock) +
      "; run: ulimit -l unlimited (systemd: LimitMEMLOCK=infinity, containers: --ulimit "
      "memlock=-1)");
}

// Besides the extents: the program itself, a listener and one worker's connection for each shard.
Status CheckFiles(const ServerConfig& c, const Machine& machine) {
  const uint64_t needed = kOwnFiles + c.memory_size / limits::kExtentBytes +
                          uint64_t{2} * c.threads * kUcxFilesPerWorker;
  if (machine.files >= needed) return OkStatus();
  return ResourceExhausted(
      "a server of " + FormatSize(c.memory_size) + " and " + std::to_string(c.threads) +
      " shards opens " + std::to_string(needed) + " files and more with each worker, and " +
      "`ulimit -Hn` is " + std::to_string(machine.files) +
      "; raise it (systemd: LimitNOFILE=1048576, containers: --ulimit nofile=1048576) or lower "
      "--memory-size");
}

Status CheckDataDir(const ServerConfig& c) {
  if (c.data_dir.empty()) return OkStatus();
  std::error_code error;
  std::filesystem::create_directories(c.data_dir, error);
  if (!error && access(c.data_dir.c_str(), R_OK | W_OK | X_OK) == 0) return OkStatus();
  return InvalidArgument("data-dir " + c.data_dir + ": " +
                         (error ? error.message() : std::strerror(errno)) +
                         "; name a folder that this user can write");
}

// Three times, so that two lost renewals are survived.
Status CheckLease(const ServerConfig& c) {
  if (c.heartbeat_ms != 0 && uint64_t{c.heartbeat_ms} * 3 <= c.lease_ms) return OkStatus();
  return InvalidArgument("lease-ms " + std::to_string(c.lease_ms) +
                         " must be at least three times heartbeat-ms " +
                         std::to_string(c.heartbeat_ms) + ", which must not be 0");
}

constexpr char kDescription[] =
    "Holds the K/V cache of long contexts on this machine's CPU memory, finds the pages that "
    "matter to a query, "
    "and serves them to workers over shared memory, TCP or RDMA.";
constexpr char kExamples[] =
    "icecache-server --memory-size 16GiB\n"
    "icecache-server --config /etc/icecache/server.toml --check-config\n"
    "icecache-server --host 0.0.0.0 --token-file /etc/icecache/tokens.toml --tls-cert server.pem "
    "--tls-key server.key\n"
    "icecache-server --memory-size 16GiB --data-dir /var/lib/icecache\n"
    "icecache-server --port 0 --http-port 0 --port-file /tmp/ports.json\n"
    "ICECACHE_LOG_LEVEL=debug icecache-server --print-config";

void AddKeys(ConfigParser& parser, ServerConfig& c) {
  parser.Add("host", &c.host,
             "address for workers, control and data; other than loopback needs --token-file");
  parser.Add("port", &c.port, "control port; 0: any free one", 0, 65535);
  parser.Add("http_host", &c.http_host,
             "address of /metrics, /live, /ready, /status; other than loopback needs a token");
  parser.Add("http_port", &c.http_port, "port of the admin pages; 0: any free one", 0, 65535);
  parser.AddSize("memory_size", &c.memory_size,
                 "memory for pages and rows, as 4GiB or 512MiB, over all shards");
  parser.Add(
      "data_dir", &c.data_dir,
      "folder of the cold store: durable contexts, and pages that memory has no room for; empty: "
      "all in memory");
  parser.Add("cold_threads", &c.cold_threads, "threads that read and write the cold store", 1,
             limits::kColdThreadsMax);
  parser.AddSize("cold_write_rate", &c.cold_write_rate,
                 "bound on background writes of the cold store, bytes a second; 0: none");
  parser.Add("cold_direct_io", &c.cold_direct_io,
             "read and write the cold store past the kernel's page cache");
  parser.Add("threads", &c.threads, "shards: threads that own and serve the pages", 1,
             limits::kShardsMax);
  parser.Add("build_threads", &c.build_threads, "threads that cluster pages in the background", 1,
             256);
  parser.Add("merge_tokens", &c.merge_tokens,
             "small sealed segments of a chain are merged in the background, to at most so many "
             "tokens; 0: never",
             0, limits::kContextTokensMax);
  parser.Add("transports", &c.transports,
             "what UCX may use (UCX_TLS), as posix,cma,tcp,self; must contain tcp");
  parser.Add("push_pages", &c.push_pages,
             "write pages into memory of GPUs of workers on this host that ask for it (--page-way "
             "ipc): auto (where there is a GPU) or off");
  parser.AddCheck("push_pages", [&c] { return CheckPushName(c.push_pages); });
  parser.Add("token_file", &c.token_file,
             "TOML file of tenants and hashed secrets; reloaded on SIGHUP");
  parser.Add("tls_cert", &c.tls_cert,
             "PEM file with this server's certificate and its chain: TLS on the control plane");
  parser.Add("tls_key", &c.tls_key, "PEM file with the certificate's private key");
  parser.Add("allow_plaintext", &c.allow_plaintext,
             "serve other hosts without TLS: secrets travel in the clear");
  parser.AddMillis("lease_ms", &c.lease_ms, "how long a silent worker keeps its contexts");
  parser.AddMillis("heartbeat_ms", &c.heartbeat_ms,
                   "how often workers are told to renew their leases");
  parser.AddMillis("drain_timeout_ms", &c.drain_timeout_ms,
                   "how long SIGTERM waits for work in flight");
  parser.Add("log_level", &c.log_level, "debug, info, warn, error or off");
  parser.Add("log_format", &c.log_format, "text or json");
  parser.Add("port_file", &c.port_file, "write the ports chosen as JSON to this file once ready");
}

void AddChecks(ConfigParser& parser, ServerConfig& c, const Machine& machine) {
  parser.AddCheck("host", [&c] { return CheckHost(c); });
  for (const char* key : {"host", "tls_cert", "tls_key"})
    parser.AddCheck(key, [&c] { return CheckTls(c); });
  parser.AddCheck("http_host", [&c] { return CheckHttpHost(c); });
  parser.AddCheck("memory_size", [&c, &machine] { return CheckMemory(c, machine); });
  parser.AddCheck("data_dir", [&c] { return CheckDataDir(c); });
  parser.AddCheck("lease_ms", [&c] { return CheckLease(c); });
  parser.AddCheck("heartbeat_ms", [&c] { return CheckLease(c); });
  parser.AddCheck("log_level", [&c]() -> Status {
    KV_ASSIGN_OR_RETURN(c.level, ParseLogLevel(c.log_level));
    return OkStatus();
  });
  parser.AddCheck("log_format", [&c]() -> Status {
    KV_ASSIGN_OR_RETURN(c.format, ParseLogFormat(c.log_format));
    return OkStatus();
  });
  parser.AddCheck("transports", [&c]() -> Status {
    const std::string list = "," + c.transports + ",";
    if (c.transports.empty() || c.transports == "all" || list.find(",tcp,") != std::string::npos) {
      return OkStatus();
    }
    return InvalidArgument("'" + c.transports +
                           "' lacks tcp, over which connections are made; add it: " + c.transports +
                           ",tcp");
  });
}

std::vector<std::string> ReadFirstAddresses() {
  std::vector<std::string> first;
  std::set<std::string> seen;
  ifaddrs* all = nullptr;
  if (getifaddrs(&all) != 0) return first;
  for (const ifaddrs* it = all; it != nullptr; it = it->ifa_next) {
    if (it->ifa_addr == nullptr || it->ifa_addr->sa_family != AF_INET) continue;
    const std::string name(it->ifa_name);  // an alias, eth0:1, is no interface of its own
    if (!seen.insert(name.substr(0, name.find(':'))).second) continue;
    char text[INET_ADDRSTRLEN];
    const auto* v4 = reinterpret_cast<const sockaddr_in*>(it->ifa_addr);
    if (inet_ntop(AF_INET, &v4->sin_addr, text, sizeof(text)) != nullptr) first.push_back(text);
  }
  freeifaddrs(all);
  return first;
}

}  // namespace

Machine ReadMachine(const std::string& root) {
  Machine machine;
  machine.cores = ReadCores();
  machine.memory_available = ReadMemAvailable(root);
  machine.cgroup_available = ReadCgroupAvailable(root);
  struct statvfs shm {};
  if (statvfs((root + "/dev/shm").c_str(), &shm) == 0) {
    machine.shm_available = uint64_t{shm.f_bavail} * shm.f_frsize;
  }
  struct rlimit lock {};
  if (getrlimit(RLIMIT_MEMLOCK, &lock) == 0 && lock.rlim_cur != RLIM_INFINITY) {
    machine.memlock = lock.rlim_cur;
  }
  machine.first_addresses = ReadFirstAddresses();
  struct rlimit files {};
  if (getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_max != RLIM_INFINITY) {
    machine.files = files.rlim_max;
  }
  return machine;
}

ServerConfig DefaultServerConfig(const Machine& machine) {
  ServerConfig config;
  const uint64_t half = std::min(machine.memory_available, machine.cgroup_available) / 2;
  // Whole MiB: it is printed and read by people.
  config.memory_size =
      std::clamp(half, uint64_t{limits::kPoolBytesMin}, kDefaultMemoryMax) >> 20 << 20;
  config.threads = std::clamp(machine.cores / 2, 1u, limits::kShardsMax);
  config.build_threads = std::max(1u, machine.cores / 2);
  config.lease_ms = static_cast<uint32_t>(limits::kLeaseTime.count());
  config.heartbeat_ms = static_cast<uint32_t>(limits::kHeartbeatInterval.count());
  config.drain_timeout_ms = static_cast<uint32_t>(limits::kDrainTimeout.count());
  return config;
}

bool IsLoopbackHost(const std::string& host) {
  if (host == "localhost") return true;
  in_addr v4{};
  if (inet_pton(AF_INET, host.c_str(), &v4) == 1) return (ntohl(v4.s_addr) >> 24) == 127;
  in6_addr v6{};
  return inet_pton(AF_INET6, host.c_str(), &v6) == 1 && IN6_IS_ADDR_LOOPBACK(&v6);
}

Result<ParsedServerConfig> ParseServerConfig(int argc, const char* const* argv,
                                             const Machine& machine,
                                             ConfigParser::Environment environment) {
  ParsedServerConfig parsed;
  parsed.config = DefaultServerConfig(machine);
  ConfigParser parser("icecache-server", kDescription, kExamples);
  AddKeys(parser, parsed.config);
  AddChecks(parser, parsed.config, machine);
  KV_ASSIGN_OR_RETURN(parsed.outcome,
                      parser.Parse(argc, argv, std::string("icecache-server ") + kServerVersion,
                                   std::move(environment)));
  if (!parsed.outcome.exit) parsed.merged = parser.Print();
  return parsed;
}

Status CheckServerConfig(const ServerConfig& c, const Machine& machine) {
  KV_RETURN_IF_ERROR(CheckHost(c));
  KV_RETURN_IF_ERROR(CheckFirstAddress(c, machine));
  KV_RETURN_IF_ERROR(CheckTls(c));
  KV_RETURN_IF_ERROR(CheckHttpHost(c));
  KV_RETURN_IF_ERROR(CheckMemory(c, machine));
  KV_RETURN_IF_ERROR(CheckSharedMemoryRoom(c, machine));
  KV_RETURN_IF_ERROR(CheckLockedMemory(c, machine));
  KV_RETURN_IF_ERROR(CheckFiles(c, machine));
  KV_RETURN_IF_ERROR(CheckDataDir(c));
  return CheckLease(c);
}

}  // namespace icecache
