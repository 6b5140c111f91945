// For tests: a worker made of the worker's own library in this process, with a small context of
// random rows at a real server. It checks every page that it gets.
#pragma once

#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "common/checksum.h"
#include "worker/layer_upload.h"
#include "worker/served_context.h"
#include "worker/server_link.h"

namespace icecache::test {

inline constexpr Duration kPatience = std::chrono::seconds(20);  // where no deadline is tested

class LinkedWorker final : public SelectionSink {
 public:
  static constexpr ModelShape kShape{
      .layers = 1, .kv_heads = 2, .query_heads = 4, .head_dim = 64, .dtype = DType::kF16};
  static constexpr uint32_t kTokens = 400, kPages = 4;

  // May be tried again.
  Status Open(ServerLinkOptions options) {
    options.cache.request_deadline = kPatience;
    KV_ASSIGN_OR_RETURN(link_, ServerLink::Connect(options));
    static int contexts = 0;
    wire::Create create;
    create.name = "context" + std::to_string(++contexts);
    create.shape = kShape;
    create.model = "none";
    create.policy = "sequential";
    KV_ASSIGN_OR_RETURN(const wire::Grant grant, link_->control().Create(create));
    context_ = {grant.context.id, grant.epoch, kShape};
    name_ = create.name;
    KV_RETURN_IF_ERROR(link_->cache().Attach(grant));
    MakeRows();
    LayerUpload upload(link_->cache(), context_);
    upload.Start(LayerId(0), rows_, {});
    return upload.WaitAll();
  }
  // Seals the context that it made and publishes it, `shared` with other tenants, for Join.
  Status Publish(bool shared = false) {
    KV_RETURN_IF_ERROR(link_->control().Seal(context_.id));
    return link_->control().Publish(context_.id, false, shared);
  }
  // Forks what another worker has published (of the same rows); owner: its tenant, or empty.
  Result<wire::Grant> Join(ServerLinkOptions options, const std::string& parent,
                           const std::string& owner = "") {
    options.cache.request_deadline = kPatience;
    KV_ASSIGN_OR_RETURN(link_, ServerLink::Connect(options));
    wire::Fork fork{.parent = parent, .name = FreshContextName("fork"), .owner = owner};
    KV_ASSIGN_OR_RETURN(wire::Grant grant, link_->control().Fork(fork));
    context_ = {grant.context.id, grant.epoch, kShape};
    KV_RETURN_IF_ERROR(link_->cache().Attach(grant));
    MakeRows();
    return grant;
  }

  // Asks for kPages of every head, with patience. The queries stay the worker's.
  SelectParams Params() const {
    SelectParams params;
    params.queries = queries_.data();
    params.max_pages = kPages;
    params.append_first = TokenPos(kTokens);
    params.deadline = kPatience;
    return params;
  }
  // OK: every page of every head came, and is what was sent.
  Status Select(Duration deadline, const std::function<void()>& meanwhile = {}) {
    right_pages_ = 0;
    SelectParams params = Params();
    params.deadline = deadline;
    KV_ASSIGN_OR_RETURN(const SelectOutcome outcome,
                        link_->cache().Select(context_, params, *this, meanwhile));
    if (!outcome.complete) return DeadlineExceeded("incomplete");
    if (right_pages_ == kPages * kShape.kv_heads) return OkStatus();
    return DataLoss(std::to_string(right_pages_) + " pages are right");
  }
  // Turns the loop until the data connections are all in this state.
  bool WaitReady(bool ready) {
    const auto all = [&] {
      return link_->cache().link(ShardId(0)).ready() == ready &&
             link_->cache().link(ShardId(1)).ready() == ready;
    };
    return link_->cache().Wait(all, kPatience).ok();
  }
  ServerLink& link() { return *link_; }
  const ContextHandle& context() const { return context_; }
  const std::string& name() const { return name_; }  // of the context that Open made
  const LayerRows& rows() const { return *rows_; }   // what was uploaded

  void FillHead(wire::SelectHead*) override {}
  void OnSelection(const wire::HeadSelection& selection,
                   std::vector<wire::ResidentPage>* refetch) override {
    for (const wire::PagePayload& page : selection.pages) {
      if (Right(selection.head, page)) {
        ++right_pages_;
      } else {
        refetch->push_back({page.segment, page.page, page.version, page.fill});
      }
    }
  }
  void OnRefetched(KvHeadId head, const wire::PagePayload& page) override {
    right_pages_ += Right(head, page);
  }
  Status OnReplyTaken() override { return OkStatus(); }
  Status Settle(std::vector<HeadPages>*) override { return OkStatus(); }

 private:
  // The same in every worker.
  void MakeRows() {
    rows_ = std::make_shared<LayerRows>(kShape, TokenPos(0), kTokens);
    std::mt19937_64 random(7);
    for (uint16_t h = 0; h < kShape.kv_heads; ++h) {
      for (const std::span<std::byte> part : {rows_->k(KvHeadId(h)), rows_->v(KvHeadId(h))}) {
        for (size_t i = 0; i < part.size(); i += 8) {
          // Numbers of f16 between 2^-3 and 2, of either sign.
          const uint64_t four = (random() & 0x8fff8fff8fff8fffull) | 0x3000300030003000ull;
          std::memcpy(part.data() + i, &four, sizeof(four));
        }
      }
    }
  }
  bool Right(KvHeadId head, const wire::PagePayload& page) const {
    const size_t row = kShape.row_bytes();
    if (page.positions.size() != page.fill * sizeof(uint32_t) ||
        page.checksum != PageChecksum({page.segment.value, page.page.value, page.version},
                                      page.k_rows, page.v_rows, page.positions)) {
      return false;
    }
    for (uint32_t t = 0; t < page.fill; ++t) {
      uint32_t position = 0;
      std::memcpy(&position, page.positions.data() + t * sizeof position, sizeof position);
      const size_t at = position * row;
      if (std::memcmp(page.k_rows.data() + t * row, rows_->k(head).data() + at, row) != 0 ||
          std::memcmp(page.v_rows.data() + t * row, rows_->v(head).data() + at, row) != 0) {
        return false;
      }
    }
    return true;
  }

  std::unique_ptr<ServerLink> link_;
  ContextHandle context_;
  std::string name_;
  std::shared_ptr<LayerRows> rows_;
  std::vector<float> queries_ = std::vector<float>(size_t{kShape.query_heads} * kShape.head_dim);
  uint32_t right_pages_ = 0;
};

}  // namespace icecache::test
