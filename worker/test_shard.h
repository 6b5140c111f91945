// For tests: a shard of a cache server in the same process, behind the loopback transport. It keeps
// every row, pages them in sequence, selects by exact mass and computes the residual exactly, so
// that any difference to full attention is the worker's. Faults are injected by counters: so many
// of the next messages go wrong.
#pragma once

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/channel.h"
#include "common/checksum.h"
#include "common/transport.h"
#include "common/wire/data_codec.h"
#include "common/wire/select_batch_codec.h"
#include "kernels/attention_state.h"
#include "kernels/distance.h"

namespace icecache::test {

class TestShard {
 public:
  TestShard(Reactor& reactor, const std::shared_ptr<LoopbackNetwork>& network,
            const ModelShape& shape, uint32_t sinks, uint32_t window, uint16_t index,
            uint16_t count)
      : shape_(shape),
        sinks_(sinks),
        window_(window),
        index_(index),
        count_(count),
        transport_(MakeLoopbackTransport(reactor, network)) {
    const Result<std::string> listening = transport_->Listen(
        "shard" + std::to_string(index) + ":1", [this, &reactor](std::unique_ptr<Endpoint> e) {
          channel_ = std::make_unique<Channel>(reactor, std::move(e));
          channel_->SetHandler([this](const InMessage& m) { Handle(m); });
        });
    KV_CHECK(listening.ok());
    address = *listening;
  }

  std::string address;
  int corrupt_pages = 0;      // pages of selections
  int corrupt_refetches = 0;  // pages of FetchPages
  int silent_selects = 0;     // requests that are carried out and never answered
  int repeat_pages = 0;       // selections whose first page is named twice
  int extra_pages = 0;        // selections with more pages than asked for
  int wrong_positions = 0;    // pages with a right checksum and a position outside the index
  int refused = 0;            // requests answered with FAILED_PRECONDITION
  std::map<uint16_t, uint64_t> near_positions;  // in Selects, by layer
  int batches = 0;  // messages of several Selects
  int selects = 0, fetches = 0, pages_sent = 0, rows_sent = 0;
  void Die(bool for_good = false) { channel_->Close(), for_good ? transport_.reset() : void(); }

 private:
  struct Page { std::vector<uint32_t> rows; };  // positions
  struct Slice {
    uint32_t tokens = 0;
    uint32_t sinks = 0, tail = 0;
    std::vector<std::vector<std::byte>> k, v;  // by position
    std::vector<Page> pages;
    uint32_t indexed_end = 0;
  };
  using Body = std::vector<std::vector<std::byte>>;
  Slice& slice(ContextId context, LayerId layer, KvHeadId head) {
    return slices_[{context.value, layer.value, head.value}];
  }

  void Answer(uint64_t id, OutMessage reply, std::shared_ptr<Body> body = nullptr) {
    for (size_t i = 0; body && i < body->size(); ++i) reply.body.emplace_back((*body)[i]);
    reply.pin = std::move(body);
    channel_->Reply(id, std::move(reply));
  }

  void Handle(const InMessage& m) {
    if (m.kind == wire::kSelectBatch) {
      ++batches;
      const std::vector<InMessage> parts = wire::SplitSelects(m).value();
      for (const InMessage& select : parts) Handle(select);
      return;
    }
    if (refused > 0) {
      --refused;
      channel_->ReplyError(m.id, FailedPrecondition("stale epoch"));
      return;
    }
    OutMessage reply;
    if (m.kind == wire::kAttach) {
      wire::Encode(wire::AttachReply{wire::kProtocolVersion, ShardId(index_), count_}, &reply);
      Answer(m.id, std::move(reply));
    } else if (m.kind == wire::kPutRows) {
      Put(m);
    } else if (m.kind == wire::kBuild) {
      Build(m);
    } else if (m.kind == wire::kSelect) {
      Select(m);
    } else if (m.kind == wire::kFetchRows) {
      Rows(m);
    } else if (m.kind == wire::kFetchPages) {
      Pages(m);
    }
  }

  void Add(Slice& s, const std::byte* k, const std::byte* v, uint32_t position) {
    const size_t n = shape_.row_bytes();
    s.k.resize(std::max<size_t>(s.k.size(), position + 1));
    s.v.resize(s.k.size());
    s.k[position].assign(k, k + n);
    s.v[position].assign(v, v + n);
  }

  void Put(const InMessage& m) {
    const wire::PutRowsRequest r = wire::DecodePutRowsRequest(m, shape_).value();
    for (size_t i = 0; i < r.slices.heads.size(); ++i) {
      Slice& s = slice(r.slices.context, r.slices.layer, r.slices.heads[i]);
      for (uint32_t t = 0; t < r.token_count; ++t) {
        Add(s, r.k_rows(i, shape_).data() + t * shape_.row_bytes(),
            r.v_rows(i, shape_).data() + t * shape_.row_bytes(), r.first_position + t);
      }
    }
    OutMessage reply;
    wire::Encode(wire::PutRowsReply{r.first_position + r.token_count}, &reply);
    Answer(m.id, std::move(reply));
  }

  void Build(const InMessage& m);
  void Index(Slice& s) {
    if (s.pages.empty() || s.pages.back().rows.size() == limits::kPageTokens)
      s.pages.emplace_back();
    s.pages.back().rows.push_back(s.indexed_end++);
  }

  // log of the sum over the page's tokens of exp(logit), largest over the group.
  float LogMass(const Slice& s, const std::vector<uint32_t>& rows, const float* q,
                const AttentionStateRef* into) const {
    std::vector<float> k(shape_.head_dim), v(shape_.head_dim);
    AttentionStates states(shape_.group(), shape_.head_dim);
    for (const uint32_t position : rows) {
      ToF32(s.k[position].data(), shape_.dtype, k.size(), k.data());
      ToF32(s.v[position].data(), shape_.dtype, v.size(), v.data());
      for (uint32_t g = 0; g < shape_.group(); ++g) {
        float logit = 0;
        for (uint32_t d = 0; d < shape_.head_dim; ++d) logit += q[g * shape_.head_dim + d] * k[d];
        MergeTerm(logit, 1, v.data(), into ? *into : states.ref(), g);
      }
    }
    float best = kEmptyMax;
    for (uint32_t g = 0; g < shape_.group(); ++g) best = std::max(best, LogSumExp(states.ref(), g));
    return best;
  }

  wire::PagePayload PutPage(const Slice& s, uint32_t page, uint8_t from, bool corrupt, Body* body) {
    const std::vector<uint32_t>& rows = s.pages[page].rows;
    std::vector<std::byte> k, v, p;
    for (const uint32_t position : rows) {
      k.insert(k.end(), s.k[position].begin(), s.k[position].end());
      v.insert(v.end(), s.v[position].begin(), s.v[position].end());
      const uint32_t told = wrong_positions > 0 ? position + 1000000 : position;
      const auto* bytes = reinterpret_cast<const std::byte*>(&told);
      p.insert(p.end(), bytes, bytes + sizeof(told));
    }
    wire::PagePayload payload{SegmentId(7), PageId(page), 1, static_cast<uint8_t>(rows.size()),
                              from};
    payload.checksum = PageChecksum({7, page, 1}, k, v, p);
    if (from == payload.fill) return payload;
    if (wrong_positions > 0) --wrong_positions;
    ++pages_sent;
    rows_sent += payload.fill - from;
    k.erase(k.begin(), k.begin() + static_cast<ptrdiff_t>(from * shape_.row_bytes()));
    v.erase(v.begin(), v.begin() + static_cast<ptrdiff_t>(from * shape_.row_bytes()));
    p.erase(p.begin(), p.begin() + static_cast<ptrdiff_t>(from * sizeof(uint32_t)));
    if (corrupt) v[v.size() / 2] ^= std::byte{0x40};
    for (auto* part : {&k, &v, &p}) body->push_back(std::move(*part));
    return payload;
  }

  void Select(const InMessage& m);
  void Rows(const InMessage& m);
  void Pages(const InMessage& m);

  const ModelShape shape_;
  const uint32_t sinks_, window_;
  const uint16_t index_, count_;
  std::unique_ptr<Transport> transport_;
  std::unique_ptr<Channel> channel_;
  std::map<std::tuple<uint64_t, uint16_t, uint16_t>, Slice> slices_;
};

}  // namespace icecache::test

#include "worker/test_shard_requests.h"  // IWYU pragma: export
