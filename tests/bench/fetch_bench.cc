// icecache-bench fetch: how long pages take from a server process to this one, in each reply mode,
// next to copying the same amount of memory on one core and to an empty request, all in turns so
// that the neighbours of a shared machine disturb them alike, and next to the ping-pong of
// ucx_perftest (UCX alone). Content is checked before timing.
//
// Ends of a measurement: inline, the content is in this process's memory; mapped, it has been
// copied out of the server's; attend, the state of attention over it is here. Verification by
// checksum is timed apart. Pages are taken at random out of 264 MiB, as from a real store: from a
// document that fits into the caches everything is faster, and copying most of all.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <random>
#include <thread>

#include "common/checksum.h"
#include "common/log.h"
#include "tests/bench/command.h"
#include "tests/bench/measure.h"
#include "tests/support/process.h"
#include "worker/layer_upload.h"
#include "worker/server_link.h"

namespace icecache {
namespace {

using Json = nlohmann::ordered_json;

constexpr ModelShape kShape{
    .layers = 1, .kv_heads = 8, .query_heads = 32, .head_dim = 128, .dtype = DType::kF16};
constexpr uint32_t kPages = limits::kPagesPerSelectMax;  // of each head
constexpr uint32_t kTokens = kPages * limits::kPageTokens;
constexpr size_t kPageBytes = 2 * limits::kPageTokens * 128 * 2 + limits::kPageTokens * 4;
constexpr Duration kDeadline = std::chrono::seconds(20);

double MicrosSince(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start)
      .count();
}

struct Flags {
  std::vector<std::string> transport = {"shm"}, mode = {"inline", "mapped", "attend"},
                           pages = {"16", "128", "1024"};
  uint32_t rounds = 200;
  uint64_t seed = 1;
  bool json = false;
};

// A server process, a document in it, and the names of its pages.
class Served {
 public:
  Served(std::string transport, uint64_t seed) : transport_(std::move(transport)), random_(seed) {}

  Status Start();
  // Other pages than before, at random, of another head.
  void Shuffle(uint32_t count) {
    head_ = KvHeadId(static_cast<uint16_t>(random_() % kShape.kv_heads));
    auto& names = names_[head_.value];
    for (uint32_t i = 0; i < count; ++i) {
      std::swap(names[i], names[i + random_() % (names.size() - i)]);
    }
  }
  // One request in a mode; what came is in memory() then. server_us: the server's part.
  Status Fetch(ReplyMode mode, uint32_t count, double* server_us);
  Status CheckContent(ReplyMode mode, uint32_t count);
  double VerifyMicros() const;  // of the pages that came last
  double MemcpyMicros(uint32_t count);
  Result<double> EmptyRequestMicros();
  const std::string& transport() const { return transport_; }

 private:
  Status Upload();
  Status LearnNames();
  Status Ask(OutMessage message, bool keep);
  void TakePages(const InMessage& reply, bool keep);
  OutMessage SelectMessage(uint32_t count, uint8_t flags) const;
  OutMessage FetchMessage(ReplyMode mode, uint32_t count) const;
  const std::byte* memory(size_t i) const { return memory_.data() + i * kPageBytes; }

  const std::string transport_;
  std::mt19937_64 random_;
  std::unique_ptr<test::TestServer> server_;
  std::unique_ptr<ServerLink> link_;
  ContextHandle context_;
  std::shared_ptr<LayerRows> rows_;
  KvHeadId head_;
  std::vector<wire::ResidentPage> names_[kShape.kv_heads];  // the first ones are asked for
  std::vector<float> queries_;                              // of one head
  std::vector<std::byte> memory_ = std::vector<std::byte>(kPages * kPageBytes);
  std::vector<std::byte> arena_ =
      std::vector<std::byte>(kShape.kv_heads * kPages * kPageBytes, std::byte{1});
  wire::SelectReply reply_;  // its spans are not valid any more
  Status status_;
};

std::string UcxTransports(const std::string& transport) {
  return transport == "tcp" ? "tcp,self" : "posix,cma,tcp,self";
}

// A round trip of 64 bytes as UCX alone has it, by its own measuring program, with our settings.
Result<double> RawPingMicros(const std::string& transport) {
  const std::vector<std::string> environment = {"UCX_TLS=" + UcxTransports(transport)};
  std::string reason;
  for (int attempt = 0; attempt < 2; ++attempt) {
    // It polls without end. At real-time priority (chrt) that can starve the kernel's own network
    // threads, so the second attempt gives the priority up.
    std::vector<std::string> command = {"ucx_perftest", "-p", std::to_string(test::FreePort())};
    if (attempt > 0) command.insert(command.begin(), {"chrt", "--other", "0"});
    test::Process server("/usr/bin/env", command, environment);
    std::this_thread::sleep_for(std::chrono::milliseconds(200));  // it says nothing when it listens
    for (const char* argument :
         {"127.0.0.1", "-t", "ucp_am_lat", "-s", "64", "-n", "1000", "-w", "100", "-f", "-v"}) {
      command.push_back(argument);
    }
    test::Process client("/usr/bin/env", command, environment);
    const test::ProcessResult result = client.Wait(test::Seconds(5));
    const std::string out = client.Out();  // a line of names, then "1000,<p50 of one way>,..."
    const size_t row = out.find('\n'), comma = row == out.npos ? row : out.find(',', row);
    const double micros =
        comma == std::string::npos ? 0 : 2 * std::strtod(out.c_str() + comma + 1, nullptr);
    if (result.exited && result.exit_code == 0 && micros > 0) return micros;
    reason = client.Err() + server.Err();
  }
  return Unavailable("ucx_perftest gives no answer (" + reason +
                     "); it is in the package ucx-utils");
}

Status Served::Start() {
  const std::string tls = UcxTransports(transport_);
  server_ = std::make_unique<test::TestServer>(
      std::vector<std::string>{"--memory-size", "1GiB", "--threads", "1", "--transports", tls});
  ServerLinkOptions options;
  options.control.address = server_->address();
  options.control.client = "icecache-bench";
  options.ucx.transports = tls;
  options.cache.request_deadline = kDeadline;  // uploads on a machine with busy neighbours
  KV_ASSIGN_OR_RETURN(link_, ServerLink::Connect(options));
  queries_.resize(size_t{kShape.group()} * kShape.head_dim);
  std::normal_distribution<float> normal(0, 0.1f);
  for (float& q : queries_) q = normal(random_);
  KV_RETURN_IF_ERROR(Upload());
  return LearnNames();
}

Status Served::Upload() {
  wire::Create create;
  create.name = "bench";
  create.shape = kShape;
  create.model = "bench";
  create.sink_tokens = 0;
  create.window_tokens = 0;
  create.policy = "sequential";
  KV_ASSIGN_OR_RETURN(const wire::Grant grant, link_->control().Create(create));
  context_ = {grant.context.id, grant.epoch, kShape};
  KV_RETURN_IF_ERROR(link_->cache().Attach(grant));
  rows_ = std::make_shared<LayerRows>(kShape, TokenPos(0), kTokens);
  for (uint16_t h = 0; h < kShape.kv_heads; ++h) {
    for (const std::span<std::byte> part : {rows_->k(KvHeadId(h)), rows_->v(KvHeadId(h))}) {
      for (size_t i = 0; i < part.size(); i += 8) {
        // Numbers of f16 between 2^-3 and 2, of either sign.
        const uint64_t four = (random_() & 0x8fff8fff8fff8fffull) | 0x3000300030003000ull;
        std::memcpy(part.data() + i, &four, sizeof(four));
      }
    }
  }
  LayerUpload upload(link_->cache(), context_);
  upload.Start(LayerId(0), rows_, {});
  return upload.WaitAll();
}

OutMessage Served::SelectMessage(uint32_t count, uint8_t flags) const {
  wire::SelectRequest request;
  request.context = context_.id;
  request.epoch = context_.epoch;
  request.heads.emplace_back().head = head_;
  request.max_pages = count;
  request.flags = flags | wire::kSelectNoResidual;
  request.append_first = kTokens;
  OutMessage message;
  wire::Encode(request, &message);
  message.body.push_back(std::as_bytes(std::span(queries_)));
  return message;
}

OutMessage Served::FetchMessage(ReplyMode mode, uint32_t count) const {
  wire::FetchPagesRequest request;
  request.context = context_.id;
  request.epoch = context_.epoch;
  request.head = head_;
  const auto& names = names_[head_.value];
  request.pages.assign(names.begin(), names.begin() + count);
  request.flags = mode == ReplyMode::kMapped ? wire::kSelectMapped : 0;
  OutMessage message;
  wire::Encode(request, &message);
  return message;
}

Status Served::LearnNames() {
  for (uint16_t h = 0; h < kShape.kv_heads; ++h) {
    head_ = KvHeadId(h);
    KV_RETURN_IF_ERROR(Ask(SelectMessage(kPages, wire::kSelectMapped), false));
    for (const wire::PagePayload& page : reply_.heads[0].pages) {
      names_[h].push_back({page.segment, page.page, page.version, page.fill});
    }
    if (names_[h].size() != kPages) {
      return Internal("the server has " + std::to_string(names_[h].size()) +
                      " pages of a head, expected " + std::to_string(kPages));
    }
  }
  return OkStatus();
}

// What the worker holds afterwards. keep: inline content is copied too, to be checked.
void Served::TakePages(const InMessage& reply, bool keep) {
  Result<wire::SelectReply> decoded = wire::DecodeSelectReply(reply, kShape);
  status_ = decoded.status();
  if (!status_.ok()) return;
  std::vector<wire::PagePayload>& pages = decoded->heads[0].pages;
  ShardLink& link = link_->cache().link(ShardId(0));
  for (wire::PagePayload& page : pages) {
    if (page.place == wire::PagePlace::kMapped) link.Resolve(context_.id, kShape, &page);
  }
  size_t at = 0;
  for (const wire::PagePayload& page : pages) {
    if ((page.place != wire::PagePlace::kMapped && !keep) || page.k_rows.empty()) continue;
    std::byte* out = memory_.data() + at++ * kPageBytes;
    for (const auto part : {page.k_rows, page.v_rows, page.positions}) {
      std::memcpy(out, part.data(), part.size());
      out += part.size();
    }
  }
  reply_ = std::move(*decoded);
}

Status Served::Ask(OutMessage message, bool keep) {
  bool done = false;
  status_ = OkStatus();
  link_->cache().Call(ShardId(0), std::move(message), kDeadline,
                      [&](const Result<InMessage>& reply) {
                        done = true;
                        if (reply.ok()) return TakePages(*reply, keep);
                        status_ = reply.status();
                      });
  KV_RETURN_IF_ERROR(link_->cache().Wait([&] { return done; }, kDeadline));
  return status_;
}

Status Served::Fetch(ReplyMode mode, uint32_t count, double* server_us) {
  KV_RETURN_IF_ERROR(Ask(mode == ReplyMode::kAttend ? SelectMessage(count, wire::kSelectAttend)
                                                    : FetchMessage(mode, count),
                         false));
  *server_us = static_cast<double>(reply_.select_ns) / 1000;
  if (reply_.heads[0].pages.size() == count) return OkStatus();
  return Internal("the server answered with " + std::to_string(reply_.heads[0].pages.size()) +
                  " pages, expected " + std::to_string(count));
}

// Every row against what was uploaded.
Status Served::CheckContent(ReplyMode mode, uint32_t count) {
  Shuffle(count);
  if (mode == ReplyMode::kAttend) {
    KV_RETURN_IF_ERROR(Ask(SelectMessage(count, wire::kSelectAttend), false));
    const bool all =
        std::all_of(reply_.heads[0].pages.begin(), reply_.heads[0].pages.end(),
                    [](const auto& page) { return page.place == wire::PagePlace::kAttended; });
    return all && !reply_.heads[0].residual.empty()
               ? OkStatus()
               : Internal("the server has not attended to what it was asked to");
  }
  std::fill(memory_.begin(), memory_.end(), std::byte{0});
  KV_RETURN_IF_ERROR(Ask(FetchMessage(mode, count), true));
  const size_t row = kShape.row_bytes();
  for (uint32_t i = 0; i < count; ++i) {
    for (uint32_t t = 0; t < limits::kPageTokens; ++t) {
      uint32_t position = 0;
      std::memcpy(&position, memory(i) + 2 * limits::kPageTokens * row + t * 4, sizeof(position));
      if (position < kTokens &&
          std::memcmp(memory(i) + t * row, rows_->k(head_).data() + position * row, row) == 0 &&
          std::memcmp(memory(i) + (limits::kPageTokens + t) * row,
                      rows_->v(head_).data() + position * row, row) == 0) {
        continue;
      }
      return DataLoss("page " + std::to_string(names_[head_.value][i].page.value) + " row " +
                      std::to_string(t) + " is not what was uploaded");
    }
  }
  return OkStatus();
}

double Served::VerifyMicros() const {
  const size_t rows = limits::kPageTokens * kShape.row_bytes();
  const auto start = std::chrono::steady_clock::now();
  uint64_t sum = 0;
  for (size_t i = 0; i < reply_.heads[0].pages.size(); ++i) {
    const wire::PagePayload& page = reply_.heads[0].pages[i];
    sum += PageChecksum({page.segment.value, page.page.value, page.version}, {memory(i), rows},
                        {memory(i) + rows, rows},
                        {memory(i) + 2 * rows, kPageBytes - 2 * rows}) == page.checksum;
  }
  const double micros = MicrosSince(start);
  return sum > reply_.heads[0].pages.size() ? -1 : micros;
}

double Served::MemcpyMicros(uint32_t count) {
  const auto& names = names_[head_.value];
  const auto start = std::chrono::steady_clock::now();
  for (uint32_t i = 0; i < count; ++i) {
    std::memcpy(memory_.data() + i * kPageBytes,
                arena_.data() + (head_.value * kPages + names[i].page.value % kPages) * kPageBytes,
                kPageBytes);
  }
  return MicrosSince(start);
}

// The smallest request and answer: an unknown kind, refused by the shard's dispatcher.
Result<double> Served::EmptyRequestMicros() {
  OutMessage message;
  message.kind = 60;
  bool done = false;
  const auto start = std::chrono::steady_clock::now();
  link_->cache().Call(ShardId(0), std::move(message), kDeadline, [&](const Result<InMessage>& r) {
    done = true;
    status_ = r.status();
  });
  KV_RETURN_IF_ERROR(link_->cache().Wait([&] { return done; }, kDeadline));
  const double micros = MicrosSince(start);
  if (status_.code() != StatusCode::kUnimplemented)
    return Internal("empty request: " + status_.ToString());
  return micros;
}

Result<Json> MeasurePoint(Served& served, ReplyMode mode, uint32_t count, const Json& ping_us,
                          const Flags& flags) {
  KV_RETURN_IF_ERROR(served.CheckContent(mode, count));
  std::vector<double> fetch, copy, empty, verify, server;
  for (uint32_t i = 0; i < flags.rounds; ++i) {
    served.Shuffle(count);
    copy.push_back(served.MemcpyMicros(count));
    KV_ASSIGN_OR_RETURN(const double round_trip, served.EmptyRequestMicros());
    empty.push_back(round_trip);
    double server_us = 0;
    const auto start = std::chrono::steady_clock::now();
    KV_RETURN_IF_ERROR(served.Fetch(mode, count, &server_us));
    fetch.push_back(MicrosSince(start));
    server.push_back(server_us);
    if (mode != ReplyMode::kAttend) verify.push_back(served.VerifyMicros());
  }
  const double bytes = static_cast<double>(count) * kPageBytes;
  Json out;
  out["bench"] = "fetch";
  out["transport"] = served.transport();
  out["mode"] = ReplyModeName(mode);
  out["pages"] = count;
  out["page_bytes"] = kPageBytes;
  out["latency_us_p50"] = Quantile(fetch, 0.5);
  out["latency_us_p99"] = Quantile(fetch, 0.99);
  out["gb_per_s"] = bytes / Quantile(fetch, 0.5) / 1000;
  out["memcpy_gb_per_s"] = bytes / Quantile(copy, 0.5) / 1000;
  out["ping_us_p50"] = ping_us;
  out["empty_request_us_p50"] = Quantile(empty, 0.5);
  out["memcpy_us_p50"] = Quantile(copy, 0.5);
  out["share_of_memcpy_rate"] = Quantile(copy, 0.5) / Quantile(fetch, 0.5);
  out["verify_us_p50"] = Quantile(verify, 0.5);
  out["server_select_us_p50"] = Quantile(server, 0.5);
  out["rounds"] = flags.rounds;
  out["seed"] = flags.seed;
  out["commit"] = CommitName();
  out["machine"] = MachineName();
  return out;
}

class FetchCommand final : public BenchCommand {
 public:
  const char* name() const override { return "fetch"; }
  const char* description() const override {
    return "Time of pages from a server process, by transport and reply mode: one JSON object each";
  }
  const char* examples() const override {
    return "icecache-bench fetch --transport shm,tcp --mode inline,mapped --pages 16,128 --json";
  }
  void AddFlags(ConfigParser* parser) override {
    parser->AddList("transport", &flags_.transport, "shm, tcp");
    parser->AddList("mode", &flags_.mode, "inline, mapped, attend");
    parser->AddList("pages", &flags_.pages, "Pages of 8 KiB per request, at most 4096");
    parser->Add("rounds", &flags_.rounds, "Measurements of each point", 3, 1000000);
    parser->Add("seed", &flags_.seed, "Seed of content and order");
    parser->Add("json", &flags_.json, "One JSON object per line instead of a table");
  }
  Status Run() override;

 private:
  Status RunTransport(const std::string& transport);
  Flags flags_;
};

Status FetchCommand::Run() {
  InitLogging(LogLevel::kWarn, LogFormat::kText, "icecache-bench");  // stdout is for figures
  // The server that was built beside this program.
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe");
  ::setenv("ICECACHE_BIN_DIR", self.parent_path().c_str(), 0);
  if (!flags_.json) {
    std::printf("%-9s %-7s %5s %12s %12s %8s %8s %8s %9s %9s\n", "transport", "mode", "pages",
                "p50 us", "p99 us", "GB/s", "memcpy", "share", "ping us", "verify us");
  }
  for (const std::string& transport : flags_.transport) {
    if (transport != "shm" && transport != "tcp") {
      return InvalidArgument("transport '" + transport + "', expected shm or tcp");
    }
    KV_RETURN_IF_ERROR(RunTransport(transport));
  }
  return OkStatus();
}

Status FetchCommand::RunTransport(const std::string& transport) {
  Served served(transport, flags_.seed);
  KV_RETURN_IF_ERROR(served.Start());
  const Result<double> ping = RawPingMicros(transport);  // polls: no answer on a crowded machine
  if (!ping.ok()) std::fprintf(stderr, "ping_us_p50: %s\n", ping.status().ToString().c_str());
  const Json ping_us = ping.ok() ? Json(*ping) : Json(nullptr);
  for (const std::string& name : flags_.mode) {
    KV_ASSIGN_OR_RETURN(const ReplyMode mode, ParseReplyMode(name));
    if (mode == ReplyMode::kAuto) return InvalidArgument("mode auto: name the one to measure");
    for (const std::string& pages : flags_.pages) {
      const unsigned long count = std::strtoul(pages.c_str(), nullptr, 10);
      if (count < 1 || count > kPages) {
        return InvalidArgument("pages '" + pages + "', expected 1 to " + std::to_string(kPages));
      }
      KV_ASSIGN_OR_RETURN(const Json point, MeasurePoint(served, mode, static_cast<uint32_t>(count),
                                                         ping_us, flags_));
      if (flags_.json) {
        std::printf("%s\n", point.dump().c_str());
      } else {
        const auto number = [&](const char* key) {
          return point.at(key).is_number() ? point.at(key).get<double>() : NAN;
        };
        std::printf("%-9s %-7s %5lu %12.1f %12.1f %8.2f %8.2f %8.2f %9.1f %9.1f\n",
                    transport.c_str(), name.c_str(), count, number("latency_us_p50"),
                    number("latency_us_p99"), number("gb_per_s"), number("memcpy_gb_per_s"),
                    number("share_of_memcpy_rate"), number("ping_us_p50"), number("verify_us_p50"));
      }
      std::fflush(stdout);
    }
  }
  return OkStatus();
}

}  // namespace

std::unique_ptr<BenchCommand> MakeFetchCommand() { return std::make_unique<FetchCommand>(); }

}  // namespace icecache
