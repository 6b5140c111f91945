// icecache-server: command line, signals, start-up line. Everything else is Server.
//
//   SIGTERM, SIGINT   drain and exit 0; a second one exits at once
//   SIGHUP            read the token file, the certificate and its key again
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <boost/asio/signal_set.hpp>
#include <csignal>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <optional>

#include "cacheserver/server.h"
#include "common/address.h"
#include "common/file_limit.h"
#include "common/limits.h"
#include "common/log.h"
#include "common/size.h"
#include "common/ucx_environment.h"

namespace icecache {
namespace {

// Spinning before sleep saves the peer ~10 us per request where it has a core of its own, and takes
// its core where it has not.
Duration SpinBeforeArm(uint32_t threads, uint32_t cores) {
  return threads < cores ? Duration(limits::kSpinBeforeArm) : Duration::zero();
}

int Fail(const Status& status) {
  std::fprintf(stderr, "icecache-server: %s\n", status.ToString().c_str());
  return static_cast<int>(status.code());
}

// systemd's readiness protocol: one datagram to a unix socket. Silent when nobody asked.
void NotifySupervisor(const char* state) {
  const char* path = std::getenv("NOTIFY_SOCKET");
  sockaddr_un to{};
  if (path == nullptr || path[0] == '\0' || std::strlen(path) >= sizeof to.sun_path) return;
  to.sun_family = AF_UNIX;
  std::memcpy(to.sun_path, path, std::strlen(path));
  if (to.sun_path[0] == '@') to.sun_path[0] = '\0';  // abstract namespace
  const int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return;
  const auto length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + std::strlen(path));
  if (sendto(fd, state, std::strlen(state), MSG_NOSIGNAL, reinterpret_cast<sockaddr*>(&to),
             length) < 0) {
    LogWarn("supervisor not notified", {{"socket", path}, {"error", std::strerror(errno)}});
  }
  close(fd);
}

std::string PortOf(const std::string& address) {
  const Result<HostPort> parsed = ParseHostPort(address);
  return parsed.ok() ? std::to_string(parsed->port) : "0";
}

// Whole or not at all: a script that waits for the file must not read half of it.
Status WritePortFile(const std::string& path, const Server& server) {
  if (path.empty()) return OkStatus();
  const std::string temporary = path + ".tmp";
  std::ofstream file(temporary);
  file << "{\"port\": " << PortOf(server.control_address())
       << ", \"http_port\": " << PortOf(server.http_address()) << ", \"data_ports\": [";
  const char* separator = "";
  for (const std::string& address : server.data_addresses()) {
    file << separator << PortOf(address);
    separator = ", ";
  }
  file << "], \"pid\": " << getpid() << "}\n";
  file.close();
  if (!file || std::rename(temporary.c_str(), path.c_str()) != 0) {
    return Unavailable("port-file " + path + ": " + std::strerror(errno) +
                       "; give a path that can be written");
  }
  return OkStatus();
}

class Signals {
 public:
  Signals(Server& server, const ServerConfig& config)
      : server_(server),
        token_file_(config.token_file),
        tls_cert_(config.tls_cert),
        tls_key_(config.tls_key),
        set_(server.reactor().io(), SIGTERM, SIGINT, SIGHUP) {
    Wait();
  }

 private:
  void Wait() {
    set_.async_wait([this](const boost::system::error_code& error, int signal) {
      if (error) return;
      if (signal == SIGHUP) {
        Reload();
      } else if (draining_) {
        LogWarn("second signal: leaving at once");
        std::_Exit(128 + signal);
      } else {
        draining_ = true;
        NotifySupervisor("STOPPING=1");
        server_.Drain();
      }
      Wait();
    });
  }

  void Reload() {
    if (token_file_.empty() && tls_cert_.empty())
      return LogWarn("SIGHUP: there is no token file and no certificate to read again");
    if (!token_file_.empty()) ReloadTokens();
    if (!tls_cert_.empty()) ReloadCertificate();
  }

  void ReloadTokens() {
    Result<TenantTable> tenants = TenantTable::Load(token_file_);
    if (!tenants.ok()) {
      return LogError("token file not reloaded, the old one stays",
                      {{"status", tenants.status().ToString()}});
    }
    server_.Reload(*std::move(tenants));
  }

  void ReloadCertificate() {
    Result<std::shared_ptr<TlsContext>> tls = TlsContext::Server(tls_cert_, tls_key_);
    if (!tls.ok()) {
      return LogError("certificate not reloaded, the old one stays",
                      {{"status", tls.status().ToString()}});
    }
    server_.Reload(*std::move(tls));
  }

  Server& server_;
  const std::string token_file_, tls_cert_, tls_key_;
  boost::asio::signal_set set_;
  bool draining_ = false;
};

int Serve(ParsedServerConfig parsed, const Machine& machine) {
  const ServerConfig config = parsed.config;
  ServerParts parts;
  parts.config = config;
  parts.merged_config = std::move(parsed.merged);
  parts.spin = SpinBeforeArm(config.threads, machine.cores);
  parts.make_transport = [transports = config.transports](Reactor& reactor) {
    return MakeUcxTransport(reactor, UcxOptions{transports});
  };
  if (!config.token_file.empty()) {
    Result<TenantTable> tenants = TenantTable::Load(config.token_file);
    if (!tenants.ok()) return Fail(tenants.status());
    parts.tenants = *std::move(tenants);
  }
  if (!config.tls_cert.empty()) {
    Result<std::shared_ptr<TlsContext>> tls = TlsContext::Server(config.tls_cert, config.tls_key);
    if (!tls.ok()) return Fail(tls.status());
    parts.tls = *std::move(tls);
  }
  Result<std::unique_ptr<Server>> started = Server::Start(std::move(parts));
  if (!started.ok()) return Fail(started.status());
  Server& server = **started;
  std::optional<Signals> signals(std::in_place, server, config);
  if (Status status = WritePortFile(config.port_file, server); !status.ok()) return Fail(status);

  std::string data;
  for (const std::string& address : server.data_addresses())
    data += (data.empty() ? "" : ",") + address;
  LogInfo("ready", {{"control", server.control_address()},
                    {"data", data},
                    {"http", server.http_address()},
                    {"memory", FormatSize(config.memory_size)},
                    {"shards", std::to_string(config.threads)},
                    {"build_threads", std::to_string(config.build_threads)},
                    {"tenants", config.token_file.empty() ? "default only" : config.token_file},
                    {"control_tls", config.tls_cert.empty() ? "no" : "yes"},
                    {"transports", server.transport_description()},
                    {"version", kServerVersion}});
  NotifySupervisor("READY=1");
  const Status status = server.Run();
  signals.reset();  // before the loop that it listens on
  started->reset();
  if (!status.ok()) return Fail(status);
  LogInfo("stopped");
  return 0;
}

}  // namespace
}  // namespace icecache

int main(int argc, char** argv) {
  using namespace icecache;
  // First: it sets environment variables, and takes back the signal handlers that libucs has put in
  // place.
  ApplyUcxEnvironment();
  std::signal(SIGPIPE, SIG_IGN);  // a peer that is gone is an error of its socket
  std::signal(SIGXFSZ, SIG_IGN);  // a file at its limit (ulimit -f) is an error of its write
  RaiseFileLimit();
  const Machine machine = ReadMachine();
  Result<ParsedServerConfig> parsed = ParseServerConfig(argc, argv, machine);
  if (!parsed.ok()) return Fail(parsed.status());
  if (parsed->outcome.exit) {
    std::fputs(parsed->outcome.text.c_str(), stdout);
    return parsed->outcome.exit_code;
  }
  InitLogging(parsed->config.level, parsed->config.format, "icecache-server");
  if (Status status = CheckServerConfig(parsed->config, machine); !status.ok()) return Fail(status);
  return Serve(*std::move(parsed), machine);
}
