#include "common/ucx_environment.h"

#include <sys/statvfs.h>
#include <ucm/api/ucm.h>
#include <ucs/config/global_opts.h>
#include <ucs/debug/debug.h>

#include <array>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

#include "common/size.h"

namespace icecache {
namespace {

// Facts: UCX 1.13.1 of Debian 12, notes "feasibility" 2, 3 and "kvstores" 6.
constexpr std::array kSettings = {
    UcxSetting{
        "UCX_TLS", "posix,cma,tcp,self",
        "tcp must be there even for shared memory: connections are made through it; RDMA hosts "
        "set e.g. rc,tcp,self"},
    UcxSetting{
        "UCX_POSIX_ERROR_HANDLING", "y",
        "without it endpoints that report dead peers silently use tcp instead of shared memory: "
        "ping 9 us instead of 0.9"},
    UcxSetting{
        "UCX_POSIX_SEG_SIZE", "33000",
        "four pages and headers at a time, 2 MiB under way: with 8K a reply of 128 pages over "
        "shared memory takes 15 % longer"},
    UcxSetting{"UCX_TCP_TX_SEG_SIZE", "64K", "8K halves the bandwidth of page replies over tcp"},
    UcxSetting{"UCX_TCP_RX_SEG_SIZE", "128K",
               "must hold the peer's segments; see UCX_TCP_TX_SEG_SIZE"},
    UcxSetting{
        "UCX_TCP_PUT_ENABLE", "n",
        "with it every connection on one host also gets tcp lanes, whose sockets are polled by a "
        "system call at each turn (ping 2.4 us instead of 1.0), and large messages leave shared "
        "memory for them"},
    UcxSetting{"UCX_RNDV_THRESH", "2M",
               "up to 128 pages of 8 KiB go at once: asking first costs 15 to 40 % over both tcp "
               "and shared memory"},
    UcxSetting{"UCX_TCP_CM_REUSEADDR", "y", "a restarted server gets its port back at once"},
};

// Read when libucs is loaded, before main(): applied by call, and not put into the environment,
// where UCX would warn that nobody reads them.
constexpr std::array kLoadTimeSettings = {
    UcxSetting{"UCX_MEM_EVENTS", "n",
               "no hooks in malloc and mmap: nothing here needs a registration cache, and "
               "ThreadSanitizer dies of them"},
    UcxSetting{"UCX_HANDLE_ERRORS", "none", "crashes belong to the operator's core dump"},
    UcxSetting{"UCX_ERROR_SIGNALS", "", "SEGV, ILL, BUS, FPE belong to us and the sanitizers"},
    UcxSetting{"UCX_DEBUG_SIGNO", "", "HUP is ours: reload"},
    UcxSetting{"UCX_WARN_UNUSED_ENV_VARS", "n",
               "hosts without shared memory or tcp do not read the settings of it"},
};

bool SetByUser(const char* name) { return std::getenv(name) != nullptr; }

void TakeBackSignals(bool error_signals, bool hang_up) {
  if (error_signals) {
    for (const int signal : {SIGSEGV, SIGILL, SIGBUS, SIGFPE}) ucs_debug_disable_signal(signal);
  }
  if (hang_up) ucs_debug_disable_signal(SIGHUP);
}

void StopMemoryEvents() {
  ucm_global_config_t options = ucm_global_opts;
  options.enable_events = 0;
  options.enable_malloc_hooks = 0;
  options.enable_malloc_reloc = 0;
  ucm_set_global_opts(&options);
}

void Apply() {
  for (const UcxSetting& setting : kSettings) {
    ::setenv(setting.name, setting.value, /*overwrite=*/0);
  }
  TakeBackSignals(!SetByUser("UCX_ERROR_SIGNALS") && !SetByUser("UCX_HANDLE_ERRORS"),
                  !SetByUser("UCX_DEBUG_SIGNO"));
  if (!SetByUser("UCX_MEM_EVENTS")) StopMemoryEvents();
  for (const char* name : {"HANDLE_ERRORS", "WARN_UNUSED_ENV_VARS"}) {
    const std::string variable = std::string("UCX_") + name;
    for (const UcxSetting& setting : kLoadTimeSettings) {
      if (variable != setting.name || SetByUser(setting.name)) continue;
      // Cannot fail for a known name; if UCX drops it one day, its default is a matter of taste
      // only.
      (void)ucs_global_opts_set_value(name, setting.value);
    }
  }
}

std::vector<UcxSetting> AllSettings() {
  std::vector<UcxSetting> all(kSettings.begin(), kSettings.end());
  all.insert(all.end(), kLoadTimeSettings.begin(), kLoadTimeSettings.end());
  return all;
}

}  // namespace

std::span<const UcxSetting> UcxSettings() {
  static const std::vector<UcxSetting> all = AllSettings();
  return all;
}

void ApplyUcxEnvironment() {
  static std::once_flag once;
  std::call_once(once, Apply);
}

Status CheckSharedMemory(uint64_t needed_bytes, const std::string& directory) {
  struct statvfs info {};
  if (::statvfs(directory.c_str(), &info) != 0) {
    return ResourceExhausted("shared memory directory " + directory + " is not usable (" +
                             std::strerror(errno) +
                             "): mount a tmpfs there, or set UCX_TLS=tcp,self to do without");
  }
  const uint64_t free_bytes = uint64_t{info.f_bavail} * info.f_frsize;
  if (free_bytes >= needed_bytes) return OkStatus();
  return ResourceExhausted(directory + " has " + FormatSize(free_bytes) + " free, " +
                           FormatSize(needed_bytes) +
                           " are needed: enlarge it (docker run --shm-size, or mount -o "
                           "remount,size=...), or set UCX_TLS=tcp,self to do without");
}

bool UsesSharedMemory(std::string_view transports) {
  if (transports.starts_with('^')) return true;  // "all but": not worth guessing
  while (!transports.empty()) {
    const size_t comma = transports.find(',');
    const std::string_view name = transports.substr(0, comma);
    for (const std::string_view shared : {"posix", "sysv", "mm", "sm", "shm", "all"}) {
      if (name == shared) return true;
    }
    if (comma == std::string_view::npos) break;
    transports.remove_prefix(comma + 1);
  }
  return false;
}

// Lines such as "#    lane[0]:  2:posix/memory.0 md[1] -> md[1]/posix/sysdev[255] am am_bw#0".
std::string UcxLanes(std::string_view endpoint_info) {
  std::string lanes;
  bool shared = false;
  for (size_t at; (at = endpoint_info.find("lane[")) != std::string_view::npos;) {
    endpoint_info.remove_prefix(at);
    const std::string_view line = endpoint_info.substr(0, endpoint_info.find('\n'));
    endpoint_info.remove_prefix(line.size());
    const size_t colon = line.find(':');
    const size_t begin = colon == std::string_view::npos ? colon : line.find(':', colon + 1);
    if (begin == std::string_view::npos) continue;
    std::string_view name = line.substr(begin + 1);
    name = name.substr(0, name.find_first_of(". "));
    if (("," + lanes + ",").find("," + std::string(name) + ",") != std::string::npos) continue;
    lanes += (lanes.empty() ? "" : ",") + std::string(name);
    shared |= name.starts_with("posix") || name.starts_with("sysv");
  }
  return shared ? lanes + " (shared memory)" : lanes;
}

}  // namespace icecache
