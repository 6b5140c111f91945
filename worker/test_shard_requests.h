// Requests of TestShard: build, selection, sinks and tail, pages by name.
#pragma once

#include "worker/test_shard.h"

namespace icecache::test {

inline void TestShard::Build(const InMessage& m) {
  const wire::BuildRequest r = wire::DecodeBuildRequest(m, shape_).value();
  for (const KvHeadId head : r.slices.heads) {
    Slice& s = slice(r.slices.context, r.slices.layer, head);
    KV_CHECK(s.k.size() == r.token_count);
    s.tokens = r.token_count;
    s.sinks = std::min(sinks_, s.tokens);
    s.tail = std::min(window_, s.tokens - s.sinks);
    s.indexed_end = s.sinks;
    while (s.indexed_end < s.tokens - s.tail) Index(s);
  }
  OutMessage reply;
  wire::Encode(wire::BuildReply{1}, &reply);
  Answer(m.id, std::move(reply));
}

inline void TestShard::Select(const InMessage& m) {
  ++selects;
  const wire::SelectRequest r = wire::DecodeSelectRequest(m, shape_).value();
  wire::SelectReply reply;
  const auto body = std::make_shared<Body>();
  for (size_t i = 0; i < r.heads.size(); ++i) {
    Slice& s = slice(r.context, r.layer, r.heads[i].head);
    near_positions[r.layer.value] += r.heads[i].near.size();
    const float* const q = r.queries.data() + i * shape_.group() * shape_.head_dim;
    for (uint32_t t = 0; t < r.append_count; ++t) {
      const uint32_t position = r.append_first + t;
      if (position < s.indexed_end) continue;  // a repeated request
      KV_CHECK(position <= s.k.size());
      Add(s, r.append_k(i, shape_).data() + t * shape_.row_bytes(),
          r.append_v(i, shape_).data() + t * shape_.row_bytes(), position);
    }
    const uint32_t pending_end = r.append_count == 0
                                     ? s.indexed_end
                                     : std::max(s.indexed_end, r.append_first + r.append_count);
    std::vector<std::pair<float, uint32_t>> ranked;
    for (uint32_t p = 0; p < s.pages.size(); ++p) {
      ranked.emplace_back(LogMass(s, s.pages[p].rows, q, nullptr), p);
    }
    std::sort(ranked.begin(), ranked.end(), std::greater<>());
    size_t taken = std::min<size_t>(r.max_pages, ranked.size());
    if (extra_pages > 0 && ranked.size() > r.max_pages) taken = r.max_pages + 1;
    wire::HeadSelection& selection = reply.heads.emplace_back();
    selection.head = r.heads[i].head;
    AttentionStates residual(shape_.group(), shape_.head_dim);
    const AttentionStateRef rest = residual.ref();
    for (size_t p = 0; p < ranked.size(); ++p) {
      const std::vector<uint32_t>& rows = s.pages[ranked[p].second].rows;
      if (p >= taken) {
        (void)LogMass(s, rows, q, &rest);
        continue;
      }
      uint8_t from = 0;
      for (const wire::ResidentPage& held : r.heads[i].resident) {
        if (held.page.value == ranked[p].second && held.version == 1) from = held.fill;
      }
      const bool corrupt = from < rows.size() && corrupt_pages > 0 && corrupt_pages-- > 0;
      selection.pages.push_back(PutPage(s, ranked[p].second, from, corrupt, body.get()));
      if (repeat_pages > 0 && from == rows.size() && p + 1 < taken) {
        --repeat_pages;
        --taken;  // in place of another page
        selection.pages.push_back(selection.pages.back());
      }
    }
    if (extra_pages > 0) --extra_pages;
    std::vector<uint32_t> pending;
    for (uint32_t p = s.indexed_end; p < pending_end; ++p) pending.push_back(p);
    (void)LogMass(s, pending, q, &rest);
    if ((r.flags & wire::kSelectNoResidual) == 0) {
      selection.residual.assign(residual.flat().begin(), residual.flat().end());
    }
    while (s.indexed_end < pending_end) Index(s);
    reply.next_position = s.indexed_end;
  }
  if (silent_selects > 0) {
    --silent_selects;
    return;
  }
  OutMessage out;
  wire::Encode(reply, &out);
  Answer(m.id, std::move(out), body);
}

inline void TestShard::Rows(const InMessage& m) {
  const wire::FetchRowsRequest r = wire::DecodeFetchRowsRequest(m, shape_).value();
  const auto body = std::make_shared<Body>();
  wire::FetchRowsReply reply;
  std::vector<std::byte> all;
  for (const KvHeadId head : r.slices.heads) {
    const Slice& s = slice(r.slices.context, r.slices.layer, head);
    reply.first_position = r.part == wire::RowsPart::kSinks ? 0 : s.tokens - s.tail;
    reply.count = r.part == wire::RowsPart::kSinks ? s.sinks : s.tail;
    for (const auto* rows : {&s.k, &s.v}) {
      for (uint32_t t = 0; t < reply.count; ++t) {
        const auto& row = (*rows)[reply.first_position + t];
        all.insert(all.end(), row.begin(), row.end());
      }
    }
  }
  reply.checksum = Checksum64(all);
  if (corrupt_pages > 0) {
    --corrupt_pages;
    all.back() ^= std::byte{1};
  }
  body->push_back(std::move(all));
  OutMessage out;
  wire::Encode(reply, &out);
  Answer(m.id, std::move(out), body);
}

inline void TestShard::Pages(const InMessage& m) {
  ++fetches;
  const wire::FetchPagesRequest r = wire::DecodeFetchPagesRequest(m, shape_).value();
  const auto body = std::make_shared<Body>();
  wire::SelectReply reply;
  wire::HeadSelection& selection = reply.heads.emplace_back();
  selection.head = r.head;
  for (const wire::ResidentPage& page : r.pages) {
    const bool corrupt = corrupt_refetches > 0 && corrupt_refetches-- > 0;
    selection.pages.push_back(
        PutPage(slice(r.context, r.layer, r.head), page.page.value, 0, corrupt, body.get()));
  }
  OutMessage out;
  wire::Encode(reply, &out);
  out.kind = wire::kFetchPages;
  Answer(m.id, std::move(out), body);
}

}  // namespace icecache::test
