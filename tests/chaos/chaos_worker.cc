// A worker that knows what every byte must be. Creates, forks, opens, decodes, seals, publishes and
// drops contexts of random documents in a random order until SIGTERM, and compares every page, row
// and attention output that comes back with the model (document.h). Refusals and lost connections
// are part of its life; a wrong byte, an error that nothing explains or a hang ends it with exit
// code 3.
//
//   chaos_worker --server HOST:PORT --tenant NAME --registry FILE --foreign FILE --damage FILE
//                --id N --seed S
//
// Registry: registry.h. Foreign: the other tenant's, whose names must lead nowhere. Damage: while
// this file exists, the server's disk has been damaged on purpose, and DATA_LOSS is an honest
// answer. Prints one line per action: name, status, pages checked, layer steps checked.
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <set>

#include "common/checksum.h"
#include "common/log.h"
#include "common/ucx_environment.h"
#include "tests/chaos/checking_sink.h"
#include "tests/chaos/document.h"
#include "tests/chaos/registry.h"
#include "worker/attention_icecache.h"
#include "worker/layer_upload.h"
#include "worker/server_link.h"

namespace icecache::chaos {
namespace {

using std::chrono::milliseconds;

constexpr unsigned kActionSecondsMax = 60;  // longer: a hang
constexpr uint32_t kChainMax = 4;
constexpr size_t kDocumentsMin = 24;  // of a tenant, before any is dropped
volatile sig_atomic_t g_stop = 0;

struct Options {
  std::string server, tenant, registry, foreign, damage, id;
  uint64_t seed = 1;
};

// What nothing in a run explains: the server or this worker has a bug.
bool Explained(const Status& status) {
  switch (status.code()) {
    case StatusCode::kInvalidArgument:
    case StatusCode::kAlreadyExists:
    case StatusCode::kOutOfRange:
    case StatusCode::kDataLoss:
    case StatusCode::kUnimplemented:
    case StatusCode::kInternal:
      return false;
    default:
      return true;
  }
}

class ChaosWorker {
 public:
  explicit ChaosWorker(const Options& options)
      : options_(options),
        random_(options.seed),
        registry_(options.registry),
        foreign_(options.foreign),
        backend_(MakeCpuAttention()) {}

  void Run() {
    while (g_stop == 0) {
      alarm(kActionSecondsMax);
      pages_ = steps_ = 0;
      const bool damaged = Damaged();
      const char* name = "connect";
      Status status = link_ == nullptr ? Connect() : OkStatus();
      if (status.ok()) status = Act(&name);
      alarm(0);
      std::printf("%s %s %llu %llu\n", name, std::string(StatusCodeName(status.code())).c_str(),
                  static_cast<unsigned long long>(pages_), static_cast<unsigned long long>(steps_));
      std::fflush(stdout);
      if (status.ok()) continue;
      const bool lost = status.code() == StatusCode::kDataLoss && (damaged || Damaged());
      if (!lost && !Explained(status)) Fail(std::string(name) + ": " + status.ToString());
      // Gone with its server, or dropped by somebody else.
      if (status.code() == StatusCode::kNotFound) gone_.insert(picked_);
      std::fprintf(stderr, "%s: %s\n", name, status.ToString().c_str());
      link_.reset();  // its leases end, and what was not published with them
      usleep(1000 * static_cast<useconds_t>(20 + random_() % 100));
    }
  }

 private:
  Status Connect() {
    ServerLinkOptions link;
    link.control.address = options_.server;
    link.control.tenant = options_.tenant;
    link.control.secret = options_.tenant + "-secret";
    link.control.client = "chaos-" + options_.id;
    link.control.deadline = std::chrono::seconds(4);
    link.control.interrupted = [] { return g_stop != 0; };
    link.cache.interrupted = link.control.interrupted;
    link.cache.request_deadline = std::chrono::seconds(3);
    link.cache.build_deadline = std::chrono::seconds(10);
    link.cache.reply_mode = random_() % 2 == 0 ? ReplyMode::kAuto : ReplyMode::kInline;
    KV_ASSIGN_OR_RETURN(link_, ServerLink::Connect(link));
    return OkStatus();
  }

  Status Act(const char** name) {
    const uint64_t dice = random_() % 16;
    if (dice < 5) return *name = "write", Write();
    if (dice < 9) return *name = "fork", Fork();
    if (dice < 13) return *name = "read", Read();
    if (dice < 14) return *name = "drop", Drop();
    return *name = "trespass", Trespass();
  }

  bool Damaged() const { return access(options_.damage.c_str(), F_OK) == 0; }

  std::string FreshName() {
    return options_.tenant + "-" + options_.id + "-" + std::to_string(next_name_++);
  }

  // A new document: prefill, some tokens more, sometimes published.
  Status Write() {
    Document document;
    document.name = FreshName();
    // A few are long, so that memory becomes short and pages move to disk and back.
    document.tokens = 40 + static_cast<uint32_t>(random_() % (random_() % 4 == 0 ? 4000 : 700));
    document.parts = {{0, random_()}};
    const Content content(document);
    wire::Create create;
    create.name = document.name;
    create.shape = kShape;
    create.model = kModel;
    create.sink_tokens = kSinkTokens;
    create.window_tokens = kWindowTokens;
    create.policy = random_() % 3 == 0 ? "exact" : "cluster_tree";
    KV_ASSIGN_OR_RETURN(const wire::Grant grant, link_->control().Create(create));
    const ContextHandle handle{grant.context.id, grant.epoch, kShape};
    KV_RETURN_IF_ERROR(link_->cache().Attach(grant));
    SinkWindow window(kShape, kSinkTokens, kWindowTokens);
    LayerUpload upload(link_->cache(), handle);
    for (uint16_t layer = 0; layer < kShape.layers; ++layer) {
      auto rows = std::make_shared<LayerRows>(content.rows(LayerId(layer)));
      window.LoadDocument(LayerId(layer), *rows);
      upload.Start(LayerId(layer), std::move(rows), {});
    }
    KV_RETURN_IF_ERROR(upload.WaitAll());
    KV_RETURN_IF_ERROR(CheckPages(handle, content, window.window_first(LayerId(0))));
    return GoOn(grant, document, window, create.policy == "exact");
  }

  Status Fork() {
    const std::optional<Document> parent = Pick();
    if (!parent) return OkStatus();
    Document document = *parent;
    document.name = FreshName();
    KV_ASSIGN_OR_RETURN(const wire::Grant grant,
                        link_->control().Fork(parent->name, document.name));
    KV_RETURN_IF_ERROR(CheckInfo(*parent, grant.context));
    KV_RETURN_IF_ERROR(link_->cache().Attach(grant));
    const ContextHandle handle{grant.context.id, grant.epoch, kShape};
    SinkWindow window(kShape, kSinkTokens, kWindowTokens);
    KV_RETURN_IF_ERROR(link_->cache().FetchWindow(handle, grant.context, &window));
    const Content content(document);
    for (uint16_t layer = 0; layer < kShape.layers; ++layer) {
      for (uint16_t head = 0; head < kShape.kv_heads; ++head) {
        const LayerId l(layer);
        const Status sinks =
            content.CheckRows(l, KvHeadId(head), 0, window.sinks(l, KvHeadId(head)));
        const Status tail = content.CheckRows(l, KvHeadId(head), window.window_first(l).value,
                                              window.window(l, KvHeadId(head)));
        for (const Status& status : {sinks, tail})
          if (!status.ok()) Fail("fork of " + parent->ToLine() + ": " + status.ToString());
      }
    }
    KV_RETURN_IF_ERROR(CheckPages(handle, content, window.window_first(LayerId(0))));
    KV_RETURN_IF_ERROR(CheckAnswers(handle, document, content, window.window_first(LayerId(0))));
    if (document.parts.size() >= kChainMax) return link_->control().Release(handle.id);
    return GoOn(grant, document, window, grant.context.policy == "exact");
  }

  Status Read() {
    const std::optional<Document> document = Pick();
    if (!document) return OkStatus();
    KV_ASSIGN_OR_RETURN(const wire::Grant grant, link_->control().Open(document->name));
    KV_RETURN_IF_ERROR(CheckInfo(*document, grant.context));
    KV_RETURN_IF_ERROR(link_->cache().Attach(grant));
    const ContextHandle handle{grant.context.id, grant.epoch, kShape};
    const Content content(*document);
    const TokenPos next(grant.context.tokens - grant.context.tail_tokens);
    for (int i = 0; i < 4; ++i) KV_RETURN_IF_ERROR(CheckPages(handle, content, next));
    KV_RETURN_IF_ERROR(CheckAnswers(handle, *document, content, next));
    return link_->control().Release(handle.id);
  }

  Status Drop() {
    const std::optional<Document> victim = Pick();
    if (!victim || Documents(registry_).size() < kDocumentsMin) return OkStatus();
    registry_.Dropping(victim->name);
    KV_RETURN_IF_ERROR(link_->control().Drop(victim->name));
    registry_.Dropped(victim->name);
    return OkStatus();
  }

  // Names of the other tenant, contexts by guessed number: all must lead nowhere.
  Status Trespass() {
    const std::vector<Document> foreign = Documents(foreign_);
    if (!foreign.empty()) {
      const std::string& name = foreign[random_() % foreign.size()].name;
      Refused("open", link_->control().Open(name).status());
      Refused("fork", link_->control().Fork(name, FreshName()).status());
      Refused("describe", link_->control().Describe(name).status());
      Refused("drop", link_->control().Drop(name));
    }
    const ContextId guess(1 + random_() % 200);
    Refused("seal", link_->control().Seal(guess));
    Refused("release", link_->control().Release(guess));
    KV_ASSIGN_OR_RETURN(const std::vector<wire::ContextInfo> mine, link_->control().List());
    for (const wire::ContextInfo& context : mine) {
      if (context.tenant != options_.tenant || !context.name.starts_with(options_.tenant + "-"))
        Fail("List shows a context of another tenant: " + context.name);
    }
    return OkStatus();
  }

  void Refused(const char* what, const Status& status) {
    if (status.ok()) Fail(std::string(what) + " of another tenant's context was allowed");
    if (!Explained(status)) Fail(std::string(what) + ": " + status.ToString());
  }

  // Also those whose publication was not answered: if one is there, it is there whole.
  static std::vector<Document> Documents(const Registry& registry) {
    std::vector<Document> all;
    for (const auto& [name, entry] : registry.Entries()) {
      if (!entry.dropping) all.push_back(entry.document);
    }
    return all;
  }

  std::optional<Document> Pick() {
    std::vector<Document> all = Documents(registry_);
    std::erase_if(all, [&](const Document& d) { return gone_.contains(d.name); });
    if (all.empty()) return std::nullopt;
    const Document& document = all[random_() % all.size()];
    picked_ = document.name;
    return document;
  }

  Status CheckInfo(const Document& document, const wire::ContextInfo& info) {
    if (info.tokens != document.tokens || info.model != kModel || !(info.shape == kShape)) {
      Fail("context " + document.name + " has " + std::to_string(info.tokens) + " tokens of " +
           info.model + ", written were " + std::to_string(document.tokens));
    }
    return OkStatus();
  }

  std::vector<float> Queries() {
    std::normal_distribution<float> normal(0, 0.4f);
    std::vector<float> q(size_t{kShape.query_heads} * kShape.head_dim);
    for (float& x : q) x = normal(random_);
    return q;
  }

  // Pages of every layer for random queries. next: position of the next append.
  Status CheckPages(const ContextHandle& handle, const Content& content, TokenPos next) {
    for (uint16_t layer = 0; layer < kShape.layers; ++layer) {
      const std::vector<float> q = Queries();
      CheckingSink sink(content, LayerId(layer));
      SelectParams params;
      params.layer = LayerId(layer);
      params.queries = q.data();
      params.max_pages = 1 + static_cast<uint32_t>(random_() % 24);
      params.read_cap = 1024;
      params.append_first = next;
      params.deadline = std::chrono::seconds(3);
      const auto outcome = link_->cache().Select(handle, params, sink, {});
      if (!outcome.ok()) return outcome.status();
      pages_ += sink.pages;
    }
    return OkStatus();
  }

  // What fixed questions to the document select: a hash over pages, versions, checksums and order.
  // Wherever its pages lie, and whatever server answers, it is the same while the context has the
  // same segments.
  Result<uint64_t> Answers(const ContextHandle& handle, const Document& document,
                           const Content& content, TokenPos next) {
    std::mt19937_64 questions(document.parts.back().seed + document.tokens);
    std::normal_distribution<float> normal(0, 0.4f);
    uint64_t hash = 0;
    for (uint32_t i = 0; i < 2 * kShape.layers; ++i) {
      std::vector<float> q(size_t{kShape.query_heads} * kShape.head_dim);
      for (float& x : q) x = normal(questions);
      CheckingSink sink(content, LayerId(i % kShape.layers));
      SelectParams params;
      params.layer = LayerId(i % kShape.layers);
      params.queries = q.data();
      params.max_pages = 8;
      params.read_cap = 1024;
      params.append_first = next;
      params.deadline = std::chrono::seconds(3);
      const auto outcome = link_->cache().Select(handle, params, sink, {});
      if (!outcome.ok()) return outcome.status();
      if (!outcome->complete) return Unavailable("a shard did not answer in time");
      pages_ += sink.pages;
      const uint64_t both[] = {hash, sink.Hash()};
      hash = Checksum64(std::as_bytes(std::span(both)));
    }
    return hash;
  }

  // Hash of the ids of a context's sealed segments, which a fork has in common with its parent.
  Result<uint64_t> Segments(const std::string& name) {
    KV_ASSIGN_OR_RETURN(const wire::ContextInfo context, link_->control().Describe(name));
    std::vector<uint64_t> ids;
    for (const wire::SegmentInfo& segment : context.segments) {
      if (segment.sealed) ids.push_back(segment.id.value);
    }
    return Checksum64(std::as_bytes(std::span(ids)));
  }

  Status CheckAnswers(const ContextHandle& handle, const Document& document, const Content& content,
                      TokenPos next) {
    if (document.answers == 0) return OkStatus();
    KV_ASSIGN_OR_RETURN(const uint64_t answers, Answers(handle, document, content, next));
    if (answers == document.answers) return OkStatus();
    // Asked after the answers: segments may be merged meanwhile, and never come back.
    KV_ASSIGN_OR_RETURN(const uint64_t segments, Segments(document.name));
    if (segments == document.segments)
      Fail("the same questions select other pages than when it was sealed: " + document.ToLine());
    return OkStatus();
  }

  // Decodes with a budget of everything, so that the output must be full attention; then seals and
  // publishes, or lets it go.
  Status GoOn(const wire::Grant& grant, const Document& document, const SinkWindow& window,
              bool exact) {
    Document longer = document.Extended(1 + static_cast<uint32_t>(random_() % 40), random_());
    const Content content(longer);
    const ContextHandle handle{grant.context.id, grant.epoch, kShape};
    IceCacheOptions options;
    const bool all_pages = !exact || random_() % 2 == 0;
    options.budget.tokens = all_pages ? 4096 : 64 + kSinkTokens + kWindowTokens;
    options.budget.sink_tokens = kSinkTokens;
    options.budget.window_tokens = kWindowTokens;
    options.read_cap = 1u << 16;
    AttentionIceCache attention(kShape, link_->cache(), *backend_, options);
    attention.Begin(handle, window, grant.context.segments);
    for (uint32_t t = document.tokens; t < longer.tokens; ++t) {
      for (uint16_t layer = 0; layer < kShape.layers; ++layer)
        KV_RETURN_IF_ERROR(Step(attention, content, LayerId(layer), t));
      KV_RETURN_IF_ERROR(link_->Pump());
    }
    // What was degraded may lack tokens at the server: not to be published.
    if (attention.stats().degraded_steps > 0 || random_() % 3 == 0)
      return link_->control().Release(handle.id);
    KV_RETURN_IF_ERROR(SendWindow(handle, content, longer));
    KV_RETURN_IF_ERROR(link_->control().Seal(handle.id));
    const TokenPos next(longer.tokens - kWindowTokens);
    KV_RETURN_IF_ERROR(CheckPages(handle, content, next));
    KV_ASSIGN_OR_RETURN(longer.segments, Segments(longer.name));
    KV_ASSIGN_OR_RETURN(longer.answers, Answers(handle, longer, content, next));
    longer.durable = random_() % 2 == 0;
    const uint64_t asked_ms = registry_.Publishing(longer);
    KV_RETURN_IF_ERROR(link_->control().Publish(handle.id, longer.durable));
    registry_.Published(longer, asked_ms);
    return link_->control().Release(handle.id);
  }

  Status Step(AttentionIceCache& attention, const Content& content, LayerId layer, uint32_t t) {
    const std::vector<float> q = Queries();
    std::vector<float> out(q.size());
    const uint64_t degraded = attention.stats().degraded_steps;
    KV_RETURN_IF_ERROR(attention.Attend(layer, TokenPos(t), 1, q.data(), content.k(layer, t),
                                        content.v(layer, t), out.data()));
    if (attention.stats().degraded_steps != degraded) return OkStatus();
    for (uint32_t h = 0; h < kShape.query_heads; ++h) {
      const std::vector<double> truth = content.Attend(layer, h, q.data(), t + 1);
      for (uint32_t d = 0; d < kShape.head_dim; ++d) {
        if (std::abs(truth[d] - double{out[h * kShape.head_dim + d]}) < 2e-3) continue;
        Fail("attention of token " + std::to_string(t) + ", layer " + std::to_string(layer.value) +
             ", head " + std::to_string(h) + " is off by " +
             std::to_string(truth[d] - double{out[h * kShape.head_dim + d]}));
      }
    }
    ++steps_;
    return OkStatus();
  }

  // The window becomes the tail of the sealed segment.
  Status SendWindow(const ContextHandle& handle, const Content& content, const Document& document) {
    const uint32_t first = document.tokens - kWindowTokens;
    for (uint16_t layer = 0; layer < kShape.layers; ++layer) {
      for (uint16_t shard = 0; shard < link_->cache().shard_count(); ++shard) {
        wire::PutRowsRequest request;
        request.slices = {handle.id, handle.epoch, LayerId(layer),
                          link_->cache().HeadsOf(LayerId(layer), ShardId(shard), kShape)};
        if (request.slices.heads.empty()) continue;
        request.first_position = first;
        request.token_count = kWindowTokens;
        OutMessage message;
        wire::Encode(request, &message);
        auto rows = std::make_shared<LayerRows>(content.rows(LayerId(layer)));
        const size_t from = first * kShape.row_bytes(), bytes = kWindowTokens * kShape.row_bytes();
        for (const KvHeadId head : request.slices.heads) {
          message.body.push_back(std::as_const(*rows).k(head).subspan(from, bytes));
          message.body.push_back(std::as_const(*rows).v(head).subspan(from, bytes));
        }
        message.pin = rows;
        const auto status = std::make_shared<std::optional<Status>>();
        link_->cache().Call(ShardId(shard), std::move(message), std::chrono::seconds(3),
                            [status](const Result<InMessage>& reply) { *status = reply.status(); });
        KV_RETURN_IF_ERROR(
            link_->cache().Wait([&] { return status->has_value(); }, std::chrono::seconds(5)));
        KV_RETURN_IF_ERROR(**status);
      }
    }
    return OkStatus();
  }

  const Options options_;
  std::mt19937_64 random_;
  Registry registry_, foreign_;
  std::unique_ptr<AttentionBackend> backend_;
  std::unique_ptr<ServerLink> link_;
  std::set<std::string> gone_;
  std::string picked_;
  uint64_t next_name_ = 0;
  uint64_t pages_ = 0, steps_ = 0;
};

int Main(int argc, char** argv) {
  ApplyUcxEnvironment();
  signal(SIGPIPE, SIG_IGN);
  signal(SIGTERM, [](int) { g_stop = 1; });
  signal(SIGALRM, [](int) {
    constexpr char kText[] = "CHAOS: an action hangs\n";
    (void)!write(STDERR_FILENO, kText, sizeof kText - 1);
    _exit(kBadExit);
  });
  std::fprintf(stderr, "%s\n", kWorkerReady);
  InitLogging(LogLevel::kWarn, LogFormat::kText, "chaos_worker");
  Options options;
  std::map<std::string, std::string> flags;
  for (int i = 1; i + 1 < argc; i += 2) flags[argv[i]] = argv[i + 1];
  options.server = flags["--server"];
  options.tenant = flags["--tenant"];
  options.registry = flags["--registry"];
  options.foreign = flags["--foreign"];
  options.damage = flags["--damage"];
  options.id = flags["--id"];
  options.seed = std::strtoull(flags["--seed"].c_str(), nullptr, 10);
  ChaosWorker(options).Run();
  return 0;
}

}  // namespace
}  // namespace icecache::chaos

int main(int argc, char** argv) { return icecache::chaos::Main(argc, argv); }
