// For tests of the server: a worker that uses it over sockets and UCX as real ones do. Truth:
// attention in float64 over the rows that were sent.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cacheserver/context/test_rows.h"
#include "cacheserver/test_client.h"
#include "cacheserver/test_server.h"
#include "cacheserver/test_upload.h"
#include "common/checksum.h"

namespace icecache {

// A worker: control connection, one data connection per shard, and its rows.
class Worker {
 public:
  Worker(const std::string& address, uint64_t seed, const std::string& tenant = "",
         const std::string& secret = "")
      : control_(address) {
    const Result<wire::HelloReply> hello = control_.Hello(tenant, secret);
    KV_CHECK(hello.ok());
    transport_ = std::move(MakeUcxTransport(reactor_, {})).value();
    for (const std::string& shard : hello->shards) {
      data_.push_back(std::make_unique<DataClient>(reactor_, *transport_, shard));
    }
    for (uint32_t i = 0; i < kShape.layers * kShape.kv_heads; ++i)
      rows_.emplace_back(seed + i * 1000003, kShape.dtype, kShape.head_dim);
  }
  ControlClient& control() { return control_; }
  Reactor& reactor() { return reactor_; }
  TestRows& rows(uint16_t layer, uint16_t head) { return rows_[layer * kShape.kv_heads + head]; }
  DataClient& shard_of(uint16_t layer, uint16_t head) {
    return *data_[ShardOf(LayerId(layer), KvHeadId(head), kShape, kShards).value];
  }
  DataClient& shard(size_t i) { return *data_[i]; }

  Status Attach(const wire::Grant& grant) {
    grant_ = grant;
    for (const auto& data : data_) KV_RETURN_IF_ERROR(data->Attach(grant.ticket));
    return OkStatus();
  }
  Status Create(const std::string& name, const std::string& policy) {
    KV_ASSIGN_OR_RETURN(const wire::Grant grant,
                        control_.Call<wire::Grant>(wire::Create{.name = name,
                                                                .shape = kShape,
                                                                .model = "tiny",
                                                                .sink_tokens = kSinks,
                                                                .window_tokens = kWindow,
                                                                .policy = policy}));
    return Attach(grant);
  }
  Status Fork(const std::string& parent, const std::string& name) {
    return Fork(wire::Fork{.parent = parent, .name = name});
  }
  Status Fork(const wire::Fork& fork) {
    KV_ASSIGN_OR_RETURN(const wire::Grant grant, control_.Call<wire::Grant>(fork));
    return Attach(grant);
  }
  wire::SliceSet Slices(uint16_t layer, uint16_t head) const {
    return {.context = grant_.context.id,
            .epoch = grant_.epoch,
            .layer = LayerId(layer),
            .heads = {KvHeadId(head)}};
  }
  Status PutRows(uint16_t layer, uint16_t head, uint32_t first, uint32_t count) {
    KV_ASSIGN_OR_RETURN(const OwnedMessage reply,
                        shard_of(layer, head).Call(RowsMessage(layer, head, first, count)));
    KV_ASSIGN_OR_RETURN(const wire::PutRowsReply done, wire::DecodePutRowsReply(reply.view()));
    EXPECT_EQ(done.next_position, first + count);
    return OkStatus();
  }
  Result<uint32_t> Build(uint16_t layer, uint16_t head, uint32_t tokens) {
    OutMessage out;
    wire::Encode(wire::BuildRequest{.slices = Slices(layer, head), .token_count = tokens}, &out);
    KV_ASSIGN_OR_RETURN(const OwnedMessage reply, shard_of(layer, head).Call(std::move(out)));
    KV_ASSIGN_OR_RETURN(const wire::BuildReply built, wire::DecodeBuildReply(reply.view()));
    return built.pages;
  }
  Status Prefill(uint32_t tokens) {
    for (uint16_t layer = 0; layer < kShape.layers; ++layer) {
      for (uint16_t head = 0; head < kShape.kv_heads; ++head) {
        (void)rows(layer, head).Rows(0, tokens);  // made: they do not move any more
        Upload upload(reactor_, shard_of(layer, head).channel());
        for (uint32_t at = 0; at < tokens; at += 256) {
          upload.Send(RowsMessage(layer, head, at, std::min(256u, tokens - at)));
        }
        const Result<uint32_t> pages = Build(layer, head, tokens);
        KV_RETURN_IF_ERROR(upload.Wait());
        KV_RETURN_IF_ERROR(pages.status());
        EXPECT_GE(*pages, (tokens - kSinks - kWindow + 15) / 16);
      }
    }
    return OkStatus();
  }
  struct Selected {
    OwnedMessage message;
    wire::SelectReply reply;  // spans into message
  };
  Result<Selected> Select(uint16_t layer, uint16_t head, const std::vector<float>& queries,
                          uint32_t max_pages, uint32_t append_first, uint32_t append_count,
                          const std::vector<wire::ResidentPage>& resident = {}) {
    wire::SelectRequest request;
    request.context = grant_.context.id;
    request.epoch = grant_.epoch;
    request.layer = LayerId(layer);
    request.heads = {{.head = KvHeadId(head), .resident = resident}};
    request.max_pages = max_pages;
    request.read_cap = 1u << 16;
    request.append_first = append_first;
    request.append_count = append_count;
    OutMessage out;
    wire::Encode(request, &out);
    out.body.push_back(std::as_bytes(std::span(queries)));
    TestRows& rows = this->rows(layer, head);
    if (append_count > 0) {
      out.body.push_back(rows.K(append_first, append_count));
      out.body.push_back(rows.V(append_first, append_count));
    }
    Selected selected;
    KV_ASSIGN_OR_RETURN(selected.message, shard_of(layer, head).Call(std::move(out)));
    KV_ASSIGN_OR_RETURN(selected.reply, wire::DecodeSelectReply(selected.message.view(), kShape));
    return selected;
  }
  Result<OwnedMessage> FetchRows(uint16_t layer, uint16_t head, wire::RowsPart part) {
    OutMessage out;
    wire::Encode(wire::FetchRowsRequest{.slices = Slices(layer, head), .part = part}, &out);
    return shard_of(layer, head).Call(std::move(out));
  }
  // One decode step as a worker does it: sinks, window, the server's pages and residual, against
  // the truth over [0, tokens); `indexed` rows are at the server, the last `appended` of them come
  // with this request.
  void CheckStep(uint16_t layer, uint16_t head, uint32_t tokens, uint32_t indexed,
                 uint32_t appended, uint32_t max_pages, uint64_t seed) {
    SCOPED_TRACE("layer " + std::to_string(layer) + " head " + std::to_string(head) + " tokens " +
                 std::to_string(tokens) + " pages " + std::to_string(max_pages));
    TestRows& rows = this->rows(layer, head);
    const std::vector<float> queries = rows.Queries(seed, kShape.group(), tokens);
    Result<Selected> selected =
        Select(layer, head, queries, max_pages, indexed - appended, appended);
    ASSERT_TRUE(selected.ok()) << selected.status().ToString();
    EXPECT_EQ(selected->reply.next_position, indexed);
    ASSERT_EQ(selected->reply.heads.size(), 1u);
    const wire::HeadSelection& chosen = selected->reply.heads[0];
    EXPECT_LE(chosen.pages.size(), max_pages);

    AttentionStates states(kShape.group(), kShape.head_dim);
    auto reference = MakeReferenceAttention();
    reference->AttendRows(queries.data(), rows.Rows(0, kSinks), states.ref());
    const TokenRows window = rows.Rows(indexed, tokens - indexed);
    reference->AttendRows(queries.data(), window, states.ref());
    for (const wire::PagePayload& page : chosen.pages) {
      ASSERT_EQ(page.from, 0);
      EXPECT_EQ(page.checksum, PageChecksum({page.segment.value, page.page.value, page.version},
                                            page.k_rows, page.v_rows, page.positions));
      reference->AttendRows(
          queries.data(),
          {kShape.dtype, kShape.head_dim, page.fill, page.k_rows.data(), page.v_rows.data()},
          states.ref());
    }
    AttentionStates residual(kShape.group(), kShape.head_dim);
    ASSERT_EQ(chosen.residual.size(), residual.flat().size());
    std::copy(chosen.residual.begin(), chosen.residual.end(), residual.flat().begin());
    MergeStates(residual.ref(), states.ref());
    ExpectAttention(states, rows.FullAttention(queries, kShape.group(), tokens));
  }
  const wire::Grant& grant() const { return grant_; }
  void set_grant(const wire::Grant& grant) { grant_ = grant; }

 private:
  OutMessage RowsMessage(uint16_t layer, uint16_t head, uint32_t first, uint32_t count) {
    OutMessage out;
    wire::Encode(
        wire::PutRowsRequest{
            .slices = Slices(layer, head), .first_position = first, .token_count = count},
        &out);
    TestRows& rows = this->rows(layer, head);
    out.body = {rows.K(first, count), rows.V(first, count)};
    return out;
  }

  std::unique_ptr<Clock> clock_ = MakeSteadyClock();
  Reactor reactor_{*clock_, Duration::zero()};
  ControlClient control_;
  std::unique_ptr<Transport> transport_;
  std::vector<std::unique_ptr<DataClient>> data_;
  std::vector<TestRows> rows_;
  wire::Grant grant_;
};

}  // namespace icecache
