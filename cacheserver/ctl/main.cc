// icecachectl: looks into a running icecache-server and tends it. Speaks the control plane as a
// tenant: without the admin right it sees and touches what is its tenant's.
//
// The exit code is the status code of common/status.h: 0 done, 2 not found, 4 no right, 9 no
// server, 11 damage found, ...
#include <csignal>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "cacheserver/ctl/render.h"
#include "cacheserver/ctl/smoke.h"
#include "common/config.h"
#include "common/limits.h"
#include "common/log.h"
#include "common/ucx_environment.h"

namespace icecache {
namespace {

constexpr char kVersion[] = "icecachectl 0.1.0";

struct Options {
  std::string server = "127.0.0.1:7400";
  std::string tenant, secret, tls_ca;
  uint32_t timeout_ms = 60000;
  bool json = false;
  std::string name;   // of a context
  std::string child;  // fork
  std::string owner;
  uint32_t at = 0;
  bool shared = false;
  std::string bench = "smoke";
  uint32_t tokens = 2048;
  uint32_t selections = 200;
};

struct Command {
  const char* name;
  const char* help;
  const char* examples;
  bool takes_name, name_required;
};
constexpr Command kCommands[] = {
    {"contexts", "Contexts: state, tokens, segments, bytes", "icecachectl contexts --json", false,
     false},
    {"tenants", "Tenants: rights, weight, service, quota, memory, contexts", "icecachectl tenants",
     false, false},
    {"leases", "Leases: who uses which context until when", "icecachectl leases", false, false},
    {"memory", "Memory by shard and tenant", "icecachectl memory", false, false},
    {"explain",
     "Where a context's pages are and what its last selections covered, or why it is gone",
     "icecachectl explain report-2025", true, true},
    {"verify",
     "Read all pages of a context, or of all, against their checksums; exit code 11: damage",
     "icecachectl verify\nicecachectl verify report-2025 --json", true, false},
    {"drop", "Drop a context and end its leases", "icecachectl drop report-2025", true, true},
};

void AddCommands(ConfigParser& parser, Options* o) {
  for (const Command& command : kCommands) {
    ConfigParser& own = parser.AddCommand(command.name, command.help, command.examples);
    if (command.takes_name)
      own.AddPositional("context", &o->name, "name of the context", command.name_required);
  }
  ConfigParser& fork = parser.AddCommand(
      "fork", "A second name for the content of a published context; nothing is copied",
      "icecachectl fork report-2025 report-2025-q1\n"
      "icecachectl fork report-2025 introduction --at 2048");
  fork.AddPositional("parent", &o->name, "name of the context to fork", true);
  fork.AddPositional("child", &o->child, "name of the new context", true);
  fork.Add("at", &o->at, "only so many of its first tokens, whose last segment is copied; 0: all",
           0, limits::kContextTokensMax);
  fork.Add("owner", &o->owner, "tenant that has shared the parent; empty: one's own");
  ConfigParser& publish =
      parser.AddCommand("publish", "Make a sealed context outlive its creator",
                        "icecachectl publish report-2025\nicecachectl publish manual --shared");
  publish.AddPositional("context", &o->name, "name of the context", true);
  publish.Add("shared", &o->shared, "also to other tenants");
  parser.AddCommand("drain", "End the server when its work is done, as SIGTERM does; for admins",
                    "icecachectl drain");
  ConfigParser& bench = parser.AddCommand(
      "bench", "smoke: upload, select, compare and time a small context of its own",
      "icecachectl bench smoke --json");
  bench.AddPositional("what", &o->bench, "smoke", false);
  bench.Add("tokens", &o->tokens, "tokens of the context", 256, 1u << 20);
  bench.Add("selections", &o->selections, "how many to time", 1, 1u << 20);
}

std::optional<wire::InspectTopic> TopicOf(const std::string& command) {
  constexpr std::pair<const char*, wire::InspectTopic> kTopics[] = {
      {"contexts", wire::InspectTopic::kContexts}, {"tenants", wire::InspectTopic::kTenants},
      {"leases", wire::InspectTopic::kLeases},     {"memory", wire::InspectTopic::kMemory},
      {"explain", wire::InspectTopic::kExplain},   {"verify", wire::InspectTopic::kVerify}};
  for (const auto& [name, topic] : kTopics)
    if (command == name) return topic;
  return std::nullopt;
}

Status Report(ControlClient& control, const Options& o, wire::InspectTopic topic) {
  KV_ASSIGN_OR_RETURN(const std::string json, control.Inspect(topic, o.name));
  std::string text = json + "\n";
  if (!o.json) {
    KV_ASSIGN_OR_RETURN(text, RenderReport(topic, json));
  }
  std::fputs(text.c_str(), stdout);
  if (topic == wire::InspectTopic::kVerify) {
    KV_ASSIGN_OR_RETURN(const uint64_t damaged, DamagedSlices(json));
    if (damaged > 0)
      return DataLoss(std::to_string(damaged) +
                      " slices are damaged; drop their contexts and "
                      "prefill again, and look at the machine's memory");
  }
  if (topic == wire::InspectTopic::kExplain) {
    KV_ASSIGN_OR_RETURN(const bool found, FoundContext(json));
    if (!found) return NotFound("no context '" + o.name + "'");
  }
  return OkStatus();
}

Status Fork(ControlClient& control, const Options& o) {
  KV_ASSIGN_OR_RETURN(const wire::Grant grant, control.Fork({.parent = o.name,
                                                               .name = o.child,
                                                               .tokens = o.at,
                                                               .owner = o.owner}));
  Status status = control.Seal(grant.context.id);
  if (status.ok()) status = control.Publish(grant.context.id);
  return status;
}

Status Publish(ControlClient& control, const Options& o) {
  KV_ASSIGN_OR_RETURN(const wire::ContextInfo info, control.Describe(o.name));
  return control.Publish(info.id, false, o.shared);
}

Status Bench(Reactor& reactor, ControlClient& control, const Options& o) {
  if (o.bench != "smoke")
    return InvalidArgument("bench '" + o.bench + "': there is smoke; others: icecache-bench");
  KV_ASSIGN_OR_RETURN(const SmokeResult result,
                      RunSmoke(reactor, control, {.tokens = o.tokens, .selections = o.selections}));
  const double mb = static_cast<double>(result.rows_bytes) / 1e6;
  if (o.json) {
    const nlohmann::json out = {{"bench", "smoke"},
                                {"server", o.server},
                                {"tokens", o.tokens},
                                {"selections", o.selections},
                                {"rows_mb", mb},
                                {"upload_seconds", result.upload_seconds},
                                {"pages_compared", result.pages},
                                {"select_p50_us", result.select_p50_us},
                                {"select_p99_us", result.select_p99_us},
                                {"select_max_us", result.select_max_us}};
    std::printf("%s\n", out.dump().c_str());
    return OkStatus();
  }
  std::printf("%.1f MB of rows sent and indexed in %.2f s\n", mb, result.upload_seconds);
  std::printf("%u selections: p50 %.0f us, p99 %.0f us, max %.0f us\n", o.selections,
              result.select_p50_us, result.select_p99_us, result.select_max_us);
  std::printf("%llu pages compared with what was sent: all right\n",
              static_cast<unsigned long long>(result.pages));
  return OkStatus();
}

Status RunCommand(const std::string& command, const Options& o) {
  const std::unique_ptr<Clock> clock = MakeSteadyClock();
  Reactor reactor(*clock, Duration::zero());
  ControlClientOptions options;
  options.address = o.server;
  options.tenant = o.tenant;
  options.secret = o.secret;
  options.tls_ca = o.tls_ca;
  options.client = "icecachectl";
  options.deadline = std::chrono::milliseconds(o.timeout_ms);
  KV_ASSIGN_OR_RETURN(std::unique_ptr<ControlClient> control,
                      ControlClient::Connect(reactor, options));
  if (const auto topic = TopicOf(command)) return Report(*control, o, *topic);
  Status status;
  if (command == "drop") status = control->Drop(o.name);
  if (command == "publish") status = Publish(*control, o);
  if (command == "fork") status = Fork(*control, o);
  if (command == "drain") status = control->Drain();
  if (command == "bench") return Bench(reactor, *control, o);
  if (status.ok() && o.json) std::printf("{\"done\": \"%s\"}\n", command.c_str());
  return status;
}

int Fail(const Status& status) {
  std::fprintf(stderr, "icecachectl: %s\n", status.ToString().c_str());
  return static_cast<int>(status.code());
}

int Main(int argc, char** argv) {
  ApplyUcxEnvironment();
  std::signal(SIGPIPE, SIG_IGN);
  Options o;
  ConfigParser parser(
      "icecachectl", "Looks into a running icecache-server and tends it.",
      "icecachectl contexts\n"
      "icecachectl explain report-2025 --server cache.example:7400 --tls-ca ca.pem\n"
      "ICECACHE_SECRET=... icecachectl memory --tenant alice --json\n"
      "icecachectl bench smoke");
  parser.Add("server", &o.server, "host:port of the server's control plane");
  parser.Add("tenant", &o.tenant, "tenant to speak as; empty: the server's default one");
  parser.AddSecret("secret", &o.secret, "the tenant's secret (better in ICECACHE_SECRET)");
  parser.Add("tls_ca", &o.tls_ca,
             "speak TLS and trust this PEM file of certificates, or the machine's: system");
  parser.AddMillis("timeout_ms", &o.timeout_ms, "how long to wait for an answer");
  parser.Add("json", &o.json, "print JSON instead of tables");
  AddCommands(parser, &o);
  const auto outcome = parser.Parse(argc, argv, kVersion);
  if (!outcome.ok()) return Fail(outcome.status());
  if (outcome->exit) {
    std::fputs(outcome->text.c_str(), stdout);
    return outcome->exit_code;
  }
  InitLogging(LogLevel::kWarn, LogFormat::kText, "icecachectl");
  if (outcome->command.empty())
    return Fail(InvalidArgument("which command? see icecachectl --help"));
  const Status status = RunCommand(outcome->command, o);
  return status.ok() ? 0 : Fail(status);
}

}  // namespace
}  // namespace icecache

int main(int argc, char** argv) { return icecache::Main(argc, argv); }
