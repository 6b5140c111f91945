#include "tests/support/process.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "common/status.h"

namespace icecache::test {
namespace {

using Clock = std::chrono::steady_clock;

std::string ProgramPath(const std::string& program) {
  if (program.find('/') != std::string::npos) return program;
  const char* dir = std::getenv("ICECACHE_BIN_DIR");
  KV_CHECK(dir != nullptr);  // run through ctest, or set it to build/<preset>/bin
  return std::string(dir) + "/" + program;
}

void Pause() { std::this_thread::sleep_for(std::chrono::milliseconds(5)); }

}  // namespace

TempDir::TempDir() {
  std::string pattern = (std::filesystem::temp_directory_path() / "icecache-test-XXXXXX").string();
  KV_CHECK(mkdtemp(pattern.data()) != nullptr);
  path_ = pattern;
}
TempDir::~TempDir() {
  if (keep_) return;
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}
std::string TempDir::path(const std::string& name) const {
  return name.empty() ? path_ : path_ + "/" + name;
}

Process::Process(const std::string& program, const std::vector<std::string>& args,
                 const std::vector<std::string>& environment) {
  // Everything that allocates happens before fork: the child may only exec.
  const std::string path = ProgramPath(program);
  std::vector<std::string> words = {path};
  words.insert(words.end(), args.begin(), args.end());
  std::vector<char*> argv;
  for (std::string& w : words) argv.push_back(w.data());
  argv.push_back(nullptr);
  std::vector<std::string> variables = environment;
  for (char** e = environ; *e != nullptr; ++e) variables.emplace_back(*e);
  std::vector<char*> envp;
  for (std::string& v : variables) envp.push_back(v.data());
  envp.push_back(nullptr);
  const int out = open(files_.path("out").c_str(), O_CREAT | O_WRONLY | O_APPEND, 0600);
  const int err = open(files_.path("err").c_str(), O_CREAT | O_WRONLY | O_APPEND, 0600);
  const int in = open("/dev/null", O_RDONLY);
  KV_CHECK(out >= 0 && err >= 0 && in >= 0);
  pid_ = fork();
  KV_CHECK(pid_ >= 0);
  if (pid_ == 0) {
    dup2(in, 0);
    dup2(out, 1);
    dup2(err, 2);
    execve(path.c_str(), argv.data(), envp.data());
    _exit(127);
  }
  close(out);
  close(err);
  close(in);
}

Process::~Process() {
  if (Running()) {
    kill(pid_, SIGKILL);
    Reap(0);
  }
}

void Process::Reap(int options) {
  if (result_.has_value()) return;
  int status = 0;
  if (waitpid(pid_, &status, options) != pid_) return;
  ProcessResult r;
  r.exited = WIFEXITED(status);
  r.exit_code = r.exited ? WEXITSTATUS(status) : -1;
  r.signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
  result_ = r;
}

void Process::Signal(int signal) {
  if (Running()) kill(pid_, signal);
}

void Process::Freeze() {
  Signal(SIGSTOP);
  const auto stopped = [this] {
    const std::string stat = ReadFile("/proc/" + std::to_string(pid_) + "/stat");
    const size_t name_end = stat.rfind(')');
    return name_end == std::string::npos || stat.compare(name_end, 3, ") T") == 0;
  };
  while (Running() && !stopped()) Pause();
}

bool Process::Running() {
  Reap(WNOHANG);
  return !result_.has_value();
}

ProcessResult Process::Wait(Seconds limit) {
  const auto end = Clock::now() + std::chrono::duration_cast<Clock::duration>(limit);
  while (Running() && Clock::now() < end) Pause();
  return result_.value_or(ProcessResult{});
}

std::string Process::Out() const { return ReadFile(files_.path("out")); }
std::string Process::Err() const { return ReadFile(files_.path("err")); }

bool Process::WaitForOutput(const std::string& text, Seconds limit) {
  const auto end = Clock::now() + std::chrono::duration_cast<Clock::duration>(limit);
  while (true) {
    const bool last = !Running() || Clock::now() >= end;
    if ((Err() + Out()).find(text) != std::string::npos) return true;
    if (last) return false;
    Pause();
  }
}

double Process::CpuSeconds() const {
  std::istringstream stat(ReadFile("/proc/" + std::to_string(pid_) + "/stat"));
  std::string rest;
  std::getline(stat, rest, ')');  // the name may hold spaces
  std::string field;
  double ticks = 0;
  for (int i = 3; i <= 15 && stat >> field; ++i) {
    if (i >= 14) ticks += std::stod(field);
  }
  return ticks / static_cast<double>(sysconf(_SC_CLK_TCK));
}

TestServer::TestServer(std::vector<std::string> extra_args, std::vector<std::string> environment)
    : args_(std::move(extra_args)), environment_(std::move(environment)) {
  KV_CHECK(Start(0, 0));
}

// The kernel may have lent one of the server's ports to a client meanwhile: until that is gone.
void TestServer::Restart() {
  const auto end = Clock::now() + std::chrono::seconds(30);
  while (!TryRestart()) {
    KV_CHECK(process_->Err().find("Address already in use") != std::string::npos);
    KV_CHECK(Clock::now() < end);
    Pause();
  }
}

bool TestServer::TryRestart() {
  process_.reset();
  return Start(port_, http_port_);
}

bool TestServer::Start(uint16_t port, uint16_t http_port) {
  const std::string port_file = dir_.path("ports.json");
  std::filesystem::remove(port_file);
  std::vector<std::string> args = {"--port",      std::to_string(port),
                                   "--http-port", std::to_string(http_port),
                                   "--port-file", port_file};
  args.insert(args.end(), args_.begin(), args_.end());
  process_ = std::make_unique<Process>("icecache-server", args, environment_);
  const auto end = Clock::now() + std::chrono::seconds(30);
  nlohmann::json ports;
  while (Clock::now() < end && process_->Running()) {
    ports = nlohmann::json::parse(ReadFile(port_file), nullptr, false);
    if (ports.is_object()) break;
    Pause();
  }
  if (!ports.is_object()) {
    std::fprintf(stderr, "the server did not start:\n%s\n", process_->Err().c_str());
    return false;
  }
  port_ = ports.at("port").get<uint16_t>();
  http_port_ = ports.at("http_port").get<uint16_t>();
  return true;
}

std::string TestServer::HttpGet(const std::string& path) const {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in to{};
  to.sin_family = AF_INET;
  to.sin_port = htons(http_port_);
  to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  const timeval limit{5, 0};
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  std::string response;
  if (connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof to) == 0) {
    const std::string request =
        "GET " + path + " HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n";
    if (send(fd, request.data(), request.size(), MSG_NOSIGNAL) ==
        static_cast<ssize_t>(request.size())) {
      std::array<char, 4096> buffer;
      for (ssize_t n; (n = recv(fd, buffer.data(), buffer.size(), 0)) > 0;) {
        response.append(buffer.data(), static_cast<size_t>(n));
      }
    }
  }
  close(fd);
  const size_t body = response.find("\r\n\r\n");
  return body == std::string::npos ? "" : response.substr(body + 4);
}

double TestServer::Metric(const std::string& name) const {
  const std::string page = "\n" + HttpGet("/metrics");
  const size_t at = page.find("\n" + name + " ");
  return at == std::string::npos ? -1 : std::stod(page.substr(at + name.size() + 2));
}

bool TestServer::WaitForMetric(const std::string& name,
                               const std::function<bool(double)>& right) const {
  const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (!right(Metric(name))) {
    if (std::chrono::steady_clock::now() >= limit) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  return true;
}

double TestServer::StatusNumber(const std::string& pointer) const {
  const auto status = nlohmann::json::parse(HttpGet("/status"), nullptr, false);
  const nlohmann::json::json_pointer at(pointer);
  if (!status.is_object() || !status.contains(at) || !status.at(at).is_number()) return -1;
  return status.at(at).get<double>();
}

uint16_t FreePort() {
  const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof address;
  auto* generic = reinterpret_cast<sockaddr*>(&address);
  const bool known =
      fd >= 0 && ::bind(fd, generic, length) == 0 && ::getsockname(fd, generic, &length) == 0;
  if (fd >= 0) ::close(fd);
  return known ? ntohs(address.sin_port) : 0;
}

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

void WriteFile(const std::string& path, const std::string& content) {
  std::ofstream(path, std::ios::binary) << content;
}

std::string SourcePath(const std::string& relative) {
  const char* root = std::getenv("ICECACHE_SOURCE_DIR");
  KV_CHECK(root != nullptr);
  return std::string(root) + "/" + relative;
}

std::string EnglishText(size_t words) {
  const std::string source = ReadFile(SourcePath("LICENSE"));
  KV_CHECK(!source.empty());
  std::string out;
  for (size_t i = 0, n = 0; n < words; i = (i + 1) % source.size()) {
    out += source[i];
    if (source[i] == ' ') ++n;
  }
  return out;
}

std::string FactPrompt(const std::string& text) {
  return "<bos> " + text + " <fact> amberfalcon oslo tokyo <end> " + text;
}

}  // namespace icecache::test
