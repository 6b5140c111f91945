// Chaos: a server and its workers as processes, and a seeded schedule (schedule.h) of what goes
// wrong in real life, for as long as asked. Finds: a wrong byte (chaos_worker.cc compares
// everything with a model of what was written), a context that should be there and is not or the
// other way round (registry.h), a leaked byte (the ledger after every event, and an empty server at
// the end), a hang (every action and every wait has a limit).
//
//   chaos [--seconds 45 | --minutes N] [--seed N] [--workers 3]
//
// The same seed gives the same schedule and the same actions of every worker; which of them meet in
// time is the machine's. On a failure it prints the command that repeats the run.
#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <sstream>

#include "cacheserver/context/tenant.h"
#include "common/control_client.h"
#include "common/ucx_environment.h"
#include "tests/chaos/registry.h"
#include "tests/chaos/schedule.h"
#include "tests/chaos/store_disk.h"
#include "tests/support/process.h"
#include "tests/support/tenants.h"

namespace icecache::chaos {
namespace {

using test::Process;
using test::ProcessResult;
using test::Seconds;
using Clock = std::chrono::steady_clock;

constexpr Seconds kPatience{30};  // of every wait

struct Options {
  double seconds = 45;
  uint64_t seed = 0;
  uint32_t workers = 3;
};

constexpr const char* kTenants[] = {"alice", "bob"};

// It lies beside this program.
std::string WorkerProgram() {
  return std::filesystem::read_symlink("/proc/self/exe").parent_path() / "chaos_worker";
}

class Chaos {
 public:
  explicit Chaos(const Options& options)
      : options_(options),
        schedule_(options.seed, options.workers),
        started_(Clock::now()),
        disk_(dir_.path()) {
    for (const std::string tenant : kTenants) {
      tokens_ += test::TenantEntry(tenant, tenant + "-secret", "quota = \"40MiB\"\n");
      test::WriteFile(RegistryFile(tenant), "");
    }
    test::WriteFile(dir_.path("tokens.toml"), tokens_);
    StartServer();
    for (uint32_t i = 0; i < options.workers; ++i) workers_.emplace_back();
    for (uint32_t i = 0; i < options.workers; ++i) StartWorker(i);
  }

  // The exit code.
  int Run() {
    const auto end =
        started_ + std::chrono::duration_cast<Clock::duration>(Seconds(options_.seconds));
    while (failure_.empty() && Clock::now() < end) {
      const Turn turn = schedule_.Next();
      Sleep(turn.wait);
      Make(turn);
      CheckLedger();
      CheckWorkers();
      if (turn.detail % 4 == 0) CheckContexts();
    }
    if (failure_.empty()) Finish();
    if (failure_.empty()) {
      Report();
      return 0;
    }
    std::fprintf(stderr, "chaos: FAILED: %s\nrepeat: chaos --seconds %g --seed %llu --workers %u\n",
                 failure_.c_str(), options_.seconds, static_cast<unsigned long long>(options_.seed),
                 options_.workers);
    test::WriteFile(dir_.path("server.log"), log_ + server_->process().Err());
    dir_.Keep();
    std::fprintf(stderr, "kept: %s, with server.log\n", dir_.path().c_str());
    return 1;
  }

 private:
  struct Worker {
    std::string tenant;
    std::unique_ptr<Process> process;
    uint32_t lives = 0;
    std::string past;  // what ended lives have printed
  };

  std::string RegistryFile(const std::string& tenant) const {
    return dir_.path(tenant + ".registry");
  }
  double Elapsed() const { return Seconds(Clock::now() - started_).count(); }
  static void Sleep(double seconds) { usleep(static_cast<useconds_t>(seconds * 1e6)); }
  void Say(const std::string& what) {
    std::printf("%7.2f %s\n", Elapsed(), what.c_str());
    std::fflush(stdout);
  }
  void Fail(const std::string& what) {
    if (failure_.empty()) failure_ = what;
  }
  static std::string Tail(const std::string& text) {
    return text.size() > 3000 ? text.substr(text.size() - 3000) : text;
  }

  // REQUIRES: no server runs. A store that was damaged before is moved away: what it had kept is
  // gone.
  void StartServer() {
    if (disk_.damaged()) Replace();
    server_started_ms_ = NowMs();
    if (server_ == nullptr) {
      server_ = std::make_unique<test::TestServer>(
          std::vector<std::string>{"--memory-size", "96MiB", "--threads", "2", "--lease-ms", "1500",
                                   "--token-file", dir_.path("tokens.toml"), "--drain-timeout-ms",
                                   "2000", "--data-dir", disk_.data_dir()},
          disk_.Environment());
    } else if (!TryRestart()) {
      Fail("the server does not start: " + Tail(server_->process().Err()));
    }
    std::filesystem::remove(disk_.damage_file());
    CheckContexts();
  }

  // What the server has said stays: what it lost may have been lost some starts ago.
  bool TryRestart() {
    log_ += server_->process().Err();
    return server_->TryRestart();
  }

  void Replace() {
    disk_.Replace();
    durable_since_ms_ = NowMs();
  }

  // Damage is found when the server starts, which is refused with a remedy, or when what is damaged
  // is asked for.
  void DamageStore(uint64_t detail) {
    KillServer();
    if (disk_.damaged()) return StartServer();
    const std::string what = disk_.Damage(detail);
    if (what.empty()) return StartServer();
    server_started_ms_ = NowMs();
    if (disk_.damaged_beyond_tables()) durable_since_ms_ = NowMs();
    if (TryRestart()) {
      Say("damaged " + what + ": the server starts");
      return CheckContexts();
    }
    const ProcessResult result = server_->process().Wait(kPatience);
    const std::string said = server_->process().Err();
    if (!result.exited || result.exit_code != static_cast<int>(StatusCode::kDataLoss) ||
        said.find("--data-dir") == std::string::npos) {
      return Fail("a server with a damaged store (" + what + ") ends with code " +
                  std::to_string(result.exit_code) + " and the words: " + Tail(said));
    }
    Say("damaged " + what + ": the server refuses to start");
    StartServer();
  }

  void StartWorker(uint32_t i) {
    Worker& worker = workers_[i];
    if (worker.process != nullptr) worker.past += worker.process->Out();
    worker.tenant = i % 2 == 0 ? "alice" : "bob";
    const std::string id = std::to_string(i) + "." + std::to_string(worker.lives++);
    const uint64_t seed = options_.seed * 1000003 + i * 1009 + worker.lives;
    worker.process = std::make_unique<Process>(
        WorkerProgram(), std::vector<std::string>{
                             "--server", server_->address(), "--tenant", worker.tenant,
                             "--registry", RegistryFile(worker.tenant), "--foreign",
                             RegistryFile(worker.tenant == "alice" ? "bob" : "alice"), "--damage",
                             disk_.damage_file(), "--id", id, "--seed", std::to_string(seed)});
    if (!worker.process->WaitForOutput(kWorkerReady, kPatience)) Fail("a worker does not start");
  }

  void Make(const Turn& turn) {
    if (turn.trouble == Trouble::kNone) return;
    Say(turn.ToString());
    switch (turn.trouble) {
      case Trouble::kKillWorker:
        workers_[turn.worker].process->Signal(SIGKILL);
        workers_[turn.worker].process->Wait(kPatience);
        return StartWorker(turn.worker);
      case Trouble::kStopWorker:
        return Pause(*workers_[turn.worker].process, turn.pause);
      case Trouble::kStopServer:
        return Pause(server_->process(), turn.pause);
      case Trouble::kKillServer:
        KillServer();
        Sleep(turn.pause / 4);
        return StartServer();
      case Trouble::kDrainServer:
        return Drain(true);
      case Trouble::kReloadTokens:
        return server_->process().Signal(SIGHUP);
      case Trouble::kBadTokens:
        return BreakTokens();
      case Trouble::kFullDisk:
      case Trouble::kFullDiskAndKill:
        disk_.SetFull(true);
        Sleep(turn.pause);
        if (turn.trouble == Trouble::kFullDiskAndKill) KillServer();
        disk_.SetFull(false);
        if (turn.trouble == Trouble::kFullDiskAndKill) StartServer();
        return;
      case Trouble::kDamageStore:
        return DamageStore(turn.detail);
      case Trouble::kNone:
        return;
    }
  }

  void KillServer() {
    if (!server_->process().Running()) Fail("the server had ended by itself");
    server_->process().Signal(SIGKILL);
    server_->process().Wait(kPatience);
  }

  // The old file stays in force: the workers go on.
  void BreakTokens() {
    test::WriteFile(dir_.path("tokens.toml"), "[[tenant]]\nname = 7\n");
    server_->process().Signal(SIGHUP);
    if (!server_->process().WaitForOutput("the old one stays", kPatience))
      Fail("a broken token file was not refused");
    test::WriteFile(dir_.path("tokens.toml"), tokens_);
    server_->process().Signal(SIGHUP);
  }

  static void Pause(Process& process, double seconds) {
    process.Signal(SIGSTOP);
    Sleep(seconds);
    process.Signal(SIGCONT);
  }

  void Drain(bool again) {
    server_->process().Signal(SIGTERM);
    const ProcessResult result = server_->process().Wait(kPatience);
    if (!result.exited) return Fail("the server did not end within 30 s of SIGTERM");
    if (result.exit_code != 0)
      return Fail("the server drained and left with " + std::to_string(result.exit_code));
    if (again) StartServer();
  }

  nlohmann::json Status() {
    for (int i = 0; i < 6; ++i) {
      auto status = nlohmann::json::parse(server_->HttpGet("/status"), nullptr, false);
      if (status.is_object()) return status;
    }
    if (!server_->process().Running()) {
      Fail("the server is gone: " + Tail(server_->process().Err()));
    } else {
      Fail("the server answers no /status within 30 s");
    }
    return {};
  }

  // The sum over tenants is the sum over shards, and neither exceeds what there is.
  void CheckLedger() {
    if (!failure_.empty()) return;
    const nlohmann::json status = Status();
    if (!status.is_object()) return;
    uint64_t tenants = 0, shards = 0;
    for (const auto& tenant : status["tenants"]) {
      tenants += tenant["held_bytes"].get<uint64_t>();
      if (tenant["held_bytes"].get<uint64_t>() > tenant["quota_bytes"].get<uint64_t>())
        return Fail("a tenant holds more than its quota: " + tenant.dump());
    }
    for (const auto& shard : status["shards"]) shards += shard["held_bytes"].get<uint64_t>();
    if (tenants != shards || shards > status["memory"]["size_bytes"].get<uint64_t>()) {
      Fail("ledger: tenants hold " + std::to_string(tenants) + " bytes, shards " +
           std::to_string(shards));
    }
  }

  void CheckWorkers() {
    for (Worker& worker : workers_) {
      if (!worker.process->Running())
        return Fail("a worker has found: " + Tail(worker.process->Err()));
    }
  }

  // What was published is there for as long as was promised, what was dropped stays away, and
  // nothing outlives the server that was not to.
  void CheckContexts() {
    for (const char* tenant : kTenants) {
      if (!failure_.empty()) return;
      const Registry registry(RegistryFile(tenant));
      const std::map<std::string, Entry> before = registry.Entries();
      const auto listed = List(tenant);
      if (!failure_.empty()) return;
      std::map<std::string, Entry> after = registry.Entries();
      for (const auto& [name, entry] : before) {
        const bool promised = entry.published && !after[name].dropping &&
                              (entry.asked_ms > server_started_ms_ ||
                               (entry.document.durable && entry.asked_ms > durable_since_ms_));
        if (promised && !listed.contains(name)) {
          return Fail("published and gone: " + entry.document.ToLine() + ", asked at " +
                      std::to_string(entry.asked_ms) + ", server of " +
                      std::to_string(server_started_ms_));
        }
        if (entry.dropped && entry.asked_ms > durable_since_ms_ && listed.contains(name))
          return Fail("dropped and there: " + name);
      }
      for (const auto& [name, published] : listed) {
        if (!published) continue;
        if (!after.contains(name)) return Fail("published, and nobody asked for it: " + name);
        const Entry& entry = after.at(name);
        if (!entry.document.durable && entry.asked_ms < server_started_ms_)
          return Fail("not durable, and it has outlived its server: " + name);
      }
      contexts_checked_ += listed.size();
    }
  }

  std::unique_ptr<ControlClient> Connect(Reactor& reactor, const std::string& tenant) {
    ControlClientOptions options;
    options.address = server_->address();
    options.tenant = tenant;
    options.secret = tenant + "-secret";
    auto client = ControlClient::Connect(reactor, options);
    if (client.ok()) return std::move(client).value();
    Fail(client.status().ToString());
    return nullptr;
  }

  // Names, and whether they are published.
  std::map<std::string, bool> List(const std::string& tenant) {
    const auto clock = MakeSteadyClock();
    Reactor reactor(*clock, Duration::zero());
    std::map<std::string, bool> names;
    const auto client = Connect(reactor, tenant);
    if (client == nullptr) return names;
    const auto contexts = client->List();
    if (!contexts.ok()) Fail("list: " + contexts.status().ToString());
    if (!contexts.ok()) return names;
    for (const wire::ContextInfo& context : *contexts) names[context.name] = context.published;
    return names;
  }

  // Peace: the disk is written again, everybody ends in time, what was promised is there, and when
  // it is dropped nothing is left, also after another start.
  void Finish() {
    Say("peace");
    if (disk_.damaged()) {
      KillServer();
      StartServer();
    }
    if (!Within(30, [&] { return Metric("icecache_cold_store_degraded") == 0; }))
      return Fail("the disk has room and the server does not write to it");
    for (Worker& worker : workers_) worker.process->Signal(SIGTERM);
    for (Worker& worker : workers_) {
      const ProcessResult result = worker.process->Wait(kPatience * 3);
      if (!result.exited || result.exit_code != 0)
        return Fail("a worker did not end well: " + Tail(worker.process->Err()));
      worker.past += worker.process->Out();
    }
    CheckContexts();
    for (const char* tenant : kTenants) DropAll(tenant);
    nlohmann::json status;
    if (!Within(15, [&] {
          status = Status();
          return status.is_object() && status["leases"] == 0 && status["contexts"].empty() &&
                 status["memory"]["used_bytes"] == 0;
        })) {
      return Fail("bytes or leases are left when everybody is gone: " + status.dump(1));
    }
    // Back may be what a full disk has kept a drop from taking, and the drop has said so
    // (CheckContexts knows of the others): now it goes.
    Drain(true);
    for (const char* tenant : kTenants) DropAll(tenant);
    Drain(true);
    for (const char* tenant : kTenants) {
      if (failure_.empty() && !List(tenant).empty()) Fail("dropped, and back after a restart");
    }
    if (failure_.empty()) Drain(false);
  }

  bool Within(double seconds, const std::function<bool()>& true_at_last) {
    const auto end = Clock::now() + std::chrono::duration_cast<Clock::duration>(Seconds(seconds));
    while (failure_.empty() && !true_at_last()) {
      if (Clock::now() > end) return false;
      Sleep(0.2);
    }
    return true;
  }

  // A metric without labels; -1: it is not there.
  double Metric(const std::string& name) const {
    std::istringstream lines(server_->HttpGet("/metrics"));
    for (std::string line; std::getline(lines, line);) {
      if (line.starts_with(name + " ")) return std::stod(line.substr(name.size()));
    }
    return -1;
  }

  void DropAll(const std::string& tenant) {
    if (!failure_.empty()) return;
    const auto clock = MakeSteadyClock();
    Reactor reactor(*clock, Duration::zero());
    const auto client = Connect(reactor, tenant);
    if (client == nullptr) return;
    const auto listed = List(tenant);
    Registry registry(RegistryFile(tenant));
    for (const auto& [name, published] : listed) {
      registry.Dropping(name);
      if (const icecache::Status status = client->Drop(name); !status.ok())
        return Fail("drop " + name + ": " + status.ToString());
      registry.Dropped(name);
    }
    Say(tenant + ": " + std::to_string(listed.size()) + " contexts dropped");
  }

  // A run in which nothing was checked has shown nothing.
  void Report() {
    std::map<std::string, std::map<std::string, uint64_t>> actions;
    uint64_t pages = 0, steps = 0, ok = 0;
    for (const Worker& worker : workers_) {
      std::istringstream lines(worker.past);
      std::string name, status;
      uint64_t p = 0, s = 0;
      while (lines >> name >> status >> p >> s) {
        ++actions[name][status];
        pages += p;
        steps += s;
        ok += status == "OK" ? 1 : 0;
      }
    }
    for (const auto& [name, statuses] : actions) {
      std::string line = name + ":";
      for (const auto& [status, count] : statuses)
        line += " " + std::to_string(count) + " " + status;
      Say(line);
    }
    Say("checked " + std::to_string(pages) + " pages and " + std::to_string(steps) +
        " attention steps");
    Say("compared " + std::to_string(contexts_checked_) +
        " listed contexts with what was promised");
    if (ok == 0 || pages == 0 || steps == 0 || contexts_checked_ == 0) {
      std::fprintf(stderr, "chaos: nothing was checked\n");
      std::exit(1);
    }
    Say("nothing found, seed " + std::to_string(options_.seed));
  }

  const Options options_;
  Schedule schedule_;
  const Clock::time_point started_;
  test::TempDir dir_;
  StoreDisk disk_;
  std::string tokens_;
  std::unique_ptr<test::TestServer> server_;
  std::string log_;  // of the servers before this one
  uint64_t server_started_ms_ = 0;
  uint64_t durable_since_ms_ = 0;  // what was published as durable before may be lost
  std::vector<Worker> workers_;
  uint64_t contexts_checked_ = 0;
  std::string failure_;
};

int Main(int argc, char** argv) {
  ApplyUcxEnvironment();
  signal(SIGPIPE, SIG_IGN);
  Options options;
  options.seed = std::random_device{}() % 1000000;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string flag = argv[i];
    if (flag == "--seconds") {
      options.seconds = std::stod(argv[i + 1]);
    } else if (flag == "--minutes") {
      options.seconds = 60 * std::stod(argv[i + 1]);
    } else if (flag == "--seed") {
      options.seed = std::stoull(argv[i + 1]);
    } else if (flag == "--workers") {
      options.workers = static_cast<uint32_t>(std::stoul(argv[i + 1]));
    } else {
      std::fprintf(stderr, "usage: chaos [--seconds 45 | --minutes N] [--seed N] [--workers 3]\n");
      return 2;
    }
  }
  std::printf("seed %llu\n", static_cast<unsigned long long>(options.seed));
  return Chaos(options).Run();
}

}  // namespace
}  // namespace icecache::chaos

int main(int argc, char** argv) { return icecache::chaos::Main(argc, argv); }
