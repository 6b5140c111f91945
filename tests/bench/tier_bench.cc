// icecache-bench tier: what sharing and the cold tier cost. Three measurements, against a real server
// with its disk:
//
//   pressure  documents of `factor` times the server's memory, asked at random. Every answer is
//             compared with the first one to the same question, and every page with its checksum.
//   forks     of one document: memory that 16 of them take, and how long each takes to be granted.
//   restart   durable documents, kill -9, the kernel's page cache dropped where that is permitted,
//             start: how long until the server is ready, and until the first answer.
#include <signal.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <random>

#include "common/checksum.h"
#include "kernels/distance.h"
#include "tests/bench/command.h"
#include "tests/bench/measure.h"
#include "tests/support/process.h"
#include "worker/layer_upload.h"
#include "worker/server_link.h"

namespace icecache {
namespace {

using Json = nlohmann::ordered_json;
using SteadyTime = std::chrono::steady_clock::time_point;

constexpr ModelShape kShape{
    .layers = 2, .kv_heads = 4, .query_heads = 16, .head_dim = 128, .dtype = DType::kF16};
constexpr uint32_t kWindow = 64;
constexpr uint32_t kQuestions = 16;  // of each document, layer by layer
constexpr Duration kDeadline = std::chrono::seconds(60);

double SecondsSince(SteadyTime start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

struct Flags {
  std::vector<std::string> factor = {"0.5", "4"};
  uint64_t memory = 128u << 20;
  uint64_t durable = 512u << 20;  // of the restart; 0: none
  uint32_t doc_tokens = 4096;
  uint32_t pages = 16;
  uint32_t rounds = 400;
  bool direct_io = false;
  uint64_t seed = 1;
  bool json = false;
};

class Bench {
 public:
  Bench(const Flags& flags, uint64_t memory) : flags_(flags), random_(flags.seed) {
    std::vector<std::string> args = {"--memory-size", std::to_string(memory), "--threads", "1",
                                     "--transports", "posix,cma,tcp,self", "--data-dir",
                                     dir_.path("data")};
    if (flags.direct_io) args.push_back("--cold-direct-io");
    server_ = std::make_unique<test::TestServer>(args);
  }

  Status Connect() {
    link_.reset();
    ServerLinkOptions options;
    options.control.address = server_->address();
    options.control.client = "icecache-bench";
    options.control.deadline = kDeadline;
    options.ucx.transports = "posix,cma,tcp,self";
    options.cache.request_deadline = kDeadline;
    options.cache.reply_mode = ReplyMode::kInline;
    KV_ASSIGN_OR_RETURN(link_, ServerLink::Connect(options));
    return OkStatus();
  }
  uint64_t doc_bytes() const { return uint64_t{flags_.doc_tokens} * kShape.token_bytes(); }
  Status Upload(uint32_t docs, bool durable);
  Status Open(uint32_t doc);
  // One selection of all heads of a layer; `key` identifies the answer.
  Status Ask(uint32_t doc, uint32_t question, uint64_t* key);
  Status CheckAnswers(uint32_t docs);
  Result<Json> Pressure(double factor, uint32_t docs);
  Result<Json> Forks();
  Result<Json> Restart(uint32_t docs);
  double Metric(const std::string& name) const;

 private:
  const Flags& flags_;
  std::mt19937_64 random_;
  test::TempDir dir_;
  std::unique_ptr<test::TestServer> server_;
  std::unique_ptr<ServerLink> link_;
  std::map<uint32_t, ContextHandle> docs_;
  std::map<std::pair<uint32_t, uint32_t>, uint64_t> answers_;
};

// Rows of topics: a walk over 64 directions with noise, so that clusterings find what there is.
std::shared_ptr<LayerRows> MakeRows(uint32_t tokens, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<float> topics(64 * size_t{kShape.head_dim});
  std::normal_distribution<float> normal(0, 1);
  for (float& x : topics) x = normal(random);
  auto rows = std::make_shared<LayerRows>(kShape, TokenPos(0), tokens);
  std::vector<float> row(kShape.head_dim);
  for (uint16_t h = 0; h < kShape.kv_heads; ++h) {
    for (const std::span<std::byte> part : {rows->k(KvHeadId(h)), rows->v(KvHeadId(h))}) {
      size_t topic = 0;
      for (uint32_t t = 0; t < tokens; ++t) {
        if (random() % 8 == 0) topic = random() % 64;
        uint64_t bits = random();
        for (uint32_t j = 0; j < kShape.head_dim; ++j) {
          bits = bits * 6364136223846793005ull + 1442695040888963407ull;
          row[j] = topics[topic * kShape.head_dim + j] +
                   static_cast<float>(static_cast<int32_t>(bits >> 32)) * 0x1p-31f;
        }
        FromF32(row.data(), row.size(), kShape.dtype,
                part.data() + size_t{t} * kShape.row_bytes());
      }
    }
  }
  return rows;
}

Status Bench::Upload(uint32_t docs, bool durable) {
  for (uint32_t d = 0; d < docs; ++d) {
    wire::Create create;
    create.name = "doc" + std::to_string(d);
    create.shape = kShape;
    create.model = "bench";
    create.sink_tokens = 4;
    create.window_tokens = kWindow;
    create.policy = "cluster_tree";
    KV_ASSIGN_OR_RETURN(const wire::Grant grant, link_->control().Create(create));
    docs_[d] = {grant.context.id, grant.epoch, kShape};
    KV_RETURN_IF_ERROR(link_->cache().Attach(grant));
    LayerUpload upload(link_->cache(), docs_[d]);
    for (uint16_t layer = 0; layer < kShape.layers; ++layer) {
      KV_RETURN_IF_ERROR(upload.WaitRows());
      upload.Start(LayerId(layer), MakeRows(flags_.doc_tokens, flags_.seed * 1000 + d * 8 + layer),
                   {});
    }
    KV_RETURN_IF_ERROR(upload.WaitAll());
    KV_RETURN_IF_ERROR(link_->control().Seal(docs_[d].id));
    KV_RETURN_IF_ERROR(link_->control().Publish(docs_[d].id, durable));
  }
  return OkStatus();
}

Status Bench::Open(uint32_t doc) {
  KV_ASSIGN_OR_RETURN(const wire::Grant grant,
                      link_->control().Open("doc" + std::to_string(doc)));
  docs_[doc] = {grant.context.id, grant.epoch, kShape};
  return link_->cache().Attach(grant);
}

Status Bench::Ask(uint32_t doc, uint32_t question, uint64_t* key) {
  std::mt19937_64 random(flags_.seed * 77 + doc * kQuestions + question);
  std::normal_distribution<float> normal(0, 0.12f);
  std::vector<float> queries(size_t{kShape.query_heads} * kShape.head_dim);
  for (float& q : queries) q = normal(random);
  wire::SelectRequest request;
  request.context = docs_.at(doc).id;
  request.epoch = docs_.at(doc).epoch;
  request.layer = LayerId(static_cast<uint16_t>(question % kShape.layers));
  for (uint16_t h = 0; h < kShape.kv_heads; ++h) request.heads.emplace_back().head = KvHeadId(h);
  request.max_pages = flags_.pages;
  request.read_cap = 1024;
  OutMessage message;
  wire::Encode(request, &message);
  message.body.push_back(std::as_bytes(std::span(queries)));
  bool done = false;
  Status status;
  link_->cache().Call(ShardId(0), std::move(message), kDeadline, [&](const Result<InMessage>& r) {
    done = true;
    status = r.status();
    if (!r.ok()) return;
    Result<wire::SelectReply> reply = wire::DecodeSelectReply(*r, kShape);
    status = reply.status();
    if (!reply.ok()) return;
    *key = 0;
    for (const wire::HeadSelection& head : reply->heads) {
      for (const wire::PagePayload& page : head.pages) {
        const uint64_t sum = PageChecksum({page.segment.value, page.page.value, page.version},
                                          page.k_rows, page.v_rows, page.positions);
        if (sum != page.checksum) status = DataLoss("a page does not match its checksum");
        *key = *key * 31 + sum;
      }
    }
  });
  KV_RETURN_IF_ERROR(link_->cache().Wait([&] { return done; }, kDeadline));
  return status;
}

Status Bench::CheckAnswers(uint32_t docs) {
  for (uint32_t d = 0; d < docs; ++d) {
    for (uint32_t q = 0; q < kQuestions; ++q) {
      uint64_t key = 0;
      KV_RETURN_IF_ERROR(Ask(d, q, &key));
      const auto [it, fresh] = answers_.emplace(std::pair(d, q), key);
      if (!fresh && it->second != key) return DataLoss("the same question got another answer");
    }
  }
  return OkStatus();
}

double Bench::Metric(const std::string& name) const {
  const std::string page = server_->HttpGet("/metrics");
  const size_t at = page.find("\n" + name + " ");
  return at == std::string::npos ? 0 : std::strtod(page.c_str() + at + name.size() + 2, nullptr);
}

Result<Json> Bench::Pressure(double factor, uint32_t docs) {
  KV_RETURN_IF_ERROR(Connect());
  KV_RETURN_IF_ERROR(Upload(docs, false));
  KV_RETURN_IF_ERROR(CheckAnswers(docs));
  std::vector<double> latency;
  const double promoted = Metric("icecache_pages_promoted_total");
  const auto start = std::chrono::steady_clock::now();
  for (uint32_t i = 0; i < flags_.rounds; ++i) {
    const auto doc = static_cast<uint32_t>(random_() % docs);
    const auto question = static_cast<uint32_t>(random_() % kQuestions);
    uint64_t key = 0;
    const auto asked = std::chrono::steady_clock::now();
    KV_RETURN_IF_ERROR(Ask(doc, question, &key));
    latency.push_back(SecondsSince(asked) * 1e6);
    if (key != answers_.at({doc, question})) return DataLoss("a question got another answer");
  }
  const double seconds = SecondsSince(start);
  Json out;
  out["bench"] = "tier";
  out["measurement"] = "pressure";
  out["factor"] = factor;
  out["memory_bytes"] = flags_.memory;
  out["documents"] = docs;
  out["document_bytes"] = doc_bytes();
  out["selects_per_s"] = flags_.rounds / seconds;
  out["latency_us_p50"] = Quantile(latency, 0.5);
  out["latency_us_p99"] = Quantile(latency, 0.99);
  out["pages_promoted_per_select"] =
      (Metric("icecache_pages_promoted_total") - promoted) / flags_.rounds;
  out["held_bytes"] = server_->StatusNumber("/memory/held_bytes");
  out["wrong_answers"] = 0;
  return out;
}

Result<Json> Bench::Forks() {
  constexpr uint32_t kForks = 16;
  KV_RETURN_IF_ERROR(Connect());
  KV_RETURN_IF_ERROR(Upload(1, false));
  const double one = server_->StatusNumber("/memory/used_bytes");
  std::vector<double> latency;
  for (uint32_t i = 0; i < kForks; ++i) {
    const auto start = std::chrono::steady_clock::now();
    KV_ASSIGN_OR_RETURN(const wire::Grant grant,
                        link_->control().Fork("doc0", "fork" + std::to_string(i)));
    KV_RETURN_IF_ERROR(link_->cache().Attach(grant));
    latency.push_back(SecondsSince(start) * 1e3);
    docs_[1 + i] = {grant.context.id, grant.epoch, kShape};
  }
  uint64_t of_parent = 0;
  KV_RETURN_IF_ERROR(Ask(0, 0, &of_parent));
  const double all = server_->StatusNumber("/memory/used_bytes");
  Json out;
  out["bench"] = "tier";
  out["measurement"] = "forks";
  out["forks"] = kForks;
  out["document_bytes"] = doc_bytes();
  out["more_memory_share"] = all / one - 1;
  out["open_ms_p50"] = Quantile(latency, 0.5);
  out["open_ms_max"] = Quantile(latency, 1);
  return out;
}

Result<Json> Bench::Restart(uint32_t docs) {
  KV_RETURN_IF_ERROR(Connect());
  const auto begin = std::chrono::steady_clock::now();
  KV_RETURN_IF_ERROR(Upload(docs, true));
  const double publish_s = SecondsSince(begin);
  KV_RETURN_IF_ERROR(CheckAnswers(docs));
  server_->process().Signal(SIGKILL);
  link_.reset();
  server_->process().Wait(std::chrono::seconds(10));
  std::ofstream drop("/proc/sys/vm/drop_caches");
  drop << "3" << std::flush;
  const bool dropped = drop.good();
  const auto start = std::chrono::steady_clock::now();
  server_->Restart();
  const double ready_s = SecondsSince(start);
  KV_RETURN_IF_ERROR(Connect());
  KV_RETURN_IF_ERROR(Open(docs - 1));
  uint64_t key = 0;
  KV_RETURN_IF_ERROR(Ask(docs - 1, 0, &key));
  const double first_s = SecondsSince(start);
  if (key != answers_.at({docs - 1, 0})) return DataLoss("another answer after the restart");
  for (uint32_t d = 0; d + 1 < docs; ++d) KV_RETURN_IF_ERROR(Open(d));
  KV_RETURN_IF_ERROR(CheckAnswers(docs));
  Json out;
  out["bench"] = "tier";
  out["measurement"] = "restart";
  out["durable_bytes"] = docs * doc_bytes();
  out["documents"] = docs;
  out["page_cache_dropped"] = dropped;
  out["upload_and_publish_s"] = publish_s;
  out["ready_s"] = ready_s;
  out["first_answer_s"] = first_s;
  out["all_answers_s"] = SecondsSince(start);
  out["wrong_answers"] = 0;
  return out;
}

class TierCommand final : public BenchCommand {
 public:
  const char* name() const override { return "tier"; }
  const char* description() const override {
    return "Cost of the cold tier: working sets larger than memory, and restarts: one JSON object "
           "each";
  }
  const char* examples() const override {
    return "icecache-bench tier --memory 128MiB --factor 0.5,2,4 --json\n"
           "icecache-bench tier --factor 4 --durable 4GiB --doc-tokens 32768";
  }
  void AddFlags(ConfigParser* parser) override {
    parser->AddList("factor", &flags_.factor, "Size of the documents in multiples of the memory");
    parser->AddSize("memory", &flags_.memory, "The server's memory");
    parser->AddSize("durable", &flags_.durable, "Documents of the restart; 0: leave it out");
    parser->Add("doc_tokens", &flags_.doc_tokens, "Tokens of a document", 256, 1000000);
    parser->Add("pages", &flags_.pages, "Pages of a selection, per head", 1, 4096);
    parser->Add("rounds", &flags_.rounds, "Selections of each measurement", 3, 1000000);
    parser->Add("direct_io", &flags_.direct_io, "Past the kernel's page cache");
    parser->Add("seed", &flags_.seed, "Seed of content and order");
    parser->Add("json", &flags_.json, "One JSON object per line instead of lines for people");
  }
  Status Run() override;

 private:
  void Print(Json point) const;
  Flags flags_;
};

void TierCommand::Print(Json point) const {
  point["direct_io"] = flags_.direct_io;
  point["seed"] = flags_.seed;
  point["commit"] = CommitName();
  point["machine"] = MachineName();
  if (flags_.json) {
    std::printf("%s\n", point.dump().c_str());
  } else {
    for (const auto& [key, value] : point.items()) {
      std::printf("%s=%s ", key.c_str(), value.dump().c_str());
    }
    std::printf("\n");
  }
  std::fflush(stdout);
}

Status TierCommand::Run() {
  // The server that was built beside this program.
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe");
  ::setenv("ICECACHE_BIN_DIR", self.parent_path().c_str(), 0);
  for (const std::string& text : flags_.factor) {
    const double factor = std::strtod(text.c_str(), nullptr);
    if (!(factor > 0)) return InvalidArgument("factor '" + text + "', expected a number above 0");
    Bench bench(flags_, flags_.memory);
    const double docs = factor * static_cast<double>(flags_.memory) /
                        static_cast<double>(bench.doc_bytes());
    KV_ASSIGN_OR_RETURN(Json point,
                        bench.Pressure(factor, std::max(1u, static_cast<uint32_t>(docs + 0.5))));
    Print(std::move(point));
  }
  {
    Bench bench(flags_, 4 * uint64_t{flags_.doc_tokens} * kShape.token_bytes() + (64u << 20));
    KV_ASSIGN_OR_RETURN(Json point, bench.Forks());
    Print(std::move(point));
  }
  if (flags_.durable == 0) return OkStatus();
  Bench bench(flags_, flags_.memory);
  const uint64_t docs = std::max<uint64_t>(1, flags_.durable / bench.doc_bytes());
  KV_ASSIGN_OR_RETURN(Json point, bench.Restart(static_cast<uint32_t>(docs)));
  Print(std::move(point));
  return OkStatus();
}

}  // namespace

std::unique_ptr<BenchCommand> MakeTierCommand() { return std::make_unique<TierCommand>(); }

}  // namespace icecache
