// Child processes for integration tests: start a real program, read what it prints, send it
// signals, and never leave it behind. Every wait has a limit; a child that outlives its test is
// killed.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

namespace icecache::test {

using Seconds = std::chrono::duration<double>;

// A directory under the system's temporary one, removed with its content unless it is kept.
class TempDir {
 public:
  TempDir();
  ~TempDir();
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  std::string path(const std::string& name = "") const;
  void Keep() { keep_ = true; }

 private:
  std::string path_;
  bool keep_ = false;
};

struct ProcessResult {
  bool exited = false;  // false: still running when the time was up, or ended by a signal
  int exit_code = -1;
  int signal = 0;  // that ended it, 0 if none
};

// One running program. stdout and stderr go to files, so a chatty child never blocks.
class Process {
 public:
  // `program`: a path, or the bare name of a program in ICECACHE_BIN_DIR. `environment`: extra
  // VAR=value.
  Process(const std::string& program, const std::vector<std::string>& args,
          const std::vector<std::string>& environment = {});
  ~Process();  // SIGKILL if still there
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  pid_t pid() const { return pid_; }
  void Signal(int signal);
  void Freeze();  // SIGSTOP, and waits until it has taken effect
  bool Running();
  ProcessResult Wait(Seconds limit);
  std::string Out() const;
  std::string Err() const;
  // True when `text` appears on stderr (or stdout) before the limit or the end of the process.
  bool WaitForOutput(const std::string& text, Seconds limit);
  double CpuSeconds() const;  // user + system so far

 private:
  void Reap(int options);

  TempDir files_;
  pid_t pid_ = -1;
  std::optional<ProcessResult> result_;
};

// An icecache-server on free ports, ready to serve, with its ports read from its port file.
class TestServer {
 public:
  explicit TestServer(std::vector<std::string> extra_args = {},
                      std::vector<std::string> environment = {});
  // Starts again with the same arguments and the same ports.
  void Restart();
  // The same; false when it ended, or was not ready within 30 s. process() says why.
  bool TryRestart();

  Process& process() { return *process_; }
  std::string address() const { return "127.0.0.1:" + std::to_string(port_); }
  uint16_t port() const { return port_; }
  // Body of GET `path` on the admin port; empty when there is no answer.
  std::string HttpGet(const std::string& path) const;
  // A metric without labels; -1 when absent.
  double Metric(const std::string& name) const;
  // Until the metric is what `right` says; false after a minute.
  bool WaitForMetric(const std::string& name, const std::function<bool(double)>& right) const;
  // A number of /status by JSON pointer ("/memory/used_bytes"); -1 when absent.
  double StatusNumber(const std::string& pointer) const;

 private:
  bool Start(uint16_t port, uint16_t http_port);

  TempDir dir_;
  std::vector<std::string> args_;
  std::vector<std::string> environment_;
  std::unique_ptr<Process> process_;
  uint16_t port_ = 0;
  uint16_t http_port_ = 0;
};

// A TCP port of loopback that nobody listens at now.
uint16_t FreePort();
std::string ReadFile(const std::string& path);
void WriteFile(const std::string& path, const std::string& content);
std::string SourcePath(const std::string& relative);  // in the repository
// So many words of real English, the same on every machine.
std::string EnglishText(size_t words);
// A prompt for the recall model: the text, a fact, and the text again. Asked kFactQuestion, the
// model answers with words that begin with kFactAnswer.
std::string FactPrompt(const std::string& text);
inline constexpr const char* kFactQuestion = "<ask> amberfalcon";
inline constexpr const char* kFactAnswer = "oslo";

}  // namespace icecache::test
