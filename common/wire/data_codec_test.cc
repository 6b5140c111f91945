#include "common/wire/data_codec.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <memory>

#include "common/limits.h"
#include "common/wire/data_samples.h"
#include "common/wire/extent_codec.h"

namespace icecache::wire {
namespace {

using testing::HasSubstr;

void ExpectEqual(const SliceSet& a, const SliceSet& b) {
  EXPECT_EQ(a.context, b.context);
  EXPECT_EQ(a.epoch, b.epoch);
  EXPECT_EQ(a.layer, b.layer);
  EXPECT_EQ(a.heads, b.heads);
}
void ExpectEqual(const std::vector<ResidentPage>& a, const std::vector<ResidentPage>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_EQ(a[i].segment, b[i].segment);
    EXPECT_EQ(a[i].page, b[i].page);
    EXPECT_EQ(a[i].version, b[i].version);
    EXPECT_EQ(a[i].fill, b[i].fill);
  }
}
bool Same(std::span<const std::byte> a, std::span<const std::byte> b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size()) == 0);
}

TEST_F(DataCodec, AttachComesBackAsSent) {
  AttachRequest in{.protocol_version = 7, .ticket = random.Bytes(32)};
  OutMessage out;
  Encode(in, &out);
  auto read = DecodeAttachRequest(Received(out));
  ASSERT_TRUE(read.ok()) << read.status().ToString();
  EXPECT_EQ(read->protocol_version, 7);
  EXPECT_EQ(read->ticket, in.ticket);

  OutMessage reply;
  Encode(AttachReply{.protocol_version = 3, .shard = ShardId(5), .shard_count = 8}, &reply);
  auto back = DecodeAttachReply(Received(reply));
  ASSERT_TRUE(back.ok()) << back.status().ToString();
  EXPECT_EQ(back->protocol_version, 3);
  EXPECT_EQ(back->shard, ShardId(5));
  EXPECT_EQ(back->shard_count, 8);
}

TEST_F(DataCodec, PutRowsComesBackAsSent) {
  for (int round = 0; round < 50; ++round) {
    Sample sample;
    const PutRowsRequest in = RandomPutRows(random, &sample);
    const Received received(sample.out);
    EXPECT_EQ(PeekContext(received).value(), in.slices.context);
    auto read = DecodePutRowsRequest(received, kShape);
    ASSERT_TRUE(read.ok()) << read.status().ToString();
    ExpectEqual(read->slices, in.slices);
    EXPECT_EQ(read->first_position, in.first_position);
    EXPECT_EQ(read->token_count, in.token_count);
    const size_t block = in.token_count * kShape.row_bytes();
    const std::span<const std::byte> body(*sample.bytes);
    for (size_t i = 0; i < in.slices.heads.size(); ++i) {
      EXPECT_TRUE(Same(read->k_rows(i, kShape), body.subspan(2 * i * block, block)));
      EXPECT_TRUE(Same(read->v_rows(i, kShape), body.subspan((2 * i + 1) * block, block)));
    }
    OutMessage reply;
    Encode(PutRowsReply{in.first_position + in.token_count}, &reply);
    EXPECT_EQ(DecodePutRowsReply(Received(reply))->next_position,
              in.first_position + in.token_count);
  }
}

TEST_F(DataCodec, BuildComesBackAsSentAndOwnsItsEnergy) {
  BuildRequest in;
  in.slices = random.Slices();
  in.token_count = 777;
  OutMessage out;
  auto pinned = std::make_shared<int>(1);
  out.pin = pinned;
  {
    const std::vector<float> energy = random.Floats(in.slices.heads.size() * kShape.head_dim);
    in.query_energy = energy;
    Encode(in, &out);
  }  // the message keeps a copy, and what was pinned before
  EXPECT_EQ(pinned.use_count(), 2);
  const Received received(out);
  EXPECT_EQ(PeekContext(received).value(), in.slices.context);
  auto read = DecodeBuildRequest(received, kShape);
  ASSERT_TRUE(read.ok()) << read.status().ToString();
  ExpectEqual(read->slices, in.slices);
  EXPECT_EQ(read->token_count, 777u);
  EXPECT_TRUE(
      Same(std::as_bytes(std::span<const float>(read->decoded_query_energy)), received.in().body));
  EXPECT_EQ(read->decoded_query_energy.size(), in.slices.heads.size() * kShape.head_dim);

  OutMessage bare;
  in.query_energy = {};
  Encode(in, &bare);
  EXPECT_TRUE(DecodeBuildRequest(Received(bare), kShape)->decoded_query_energy.empty());
  EXPECT_TRUE(DecodeBuildRequest(Received(bare), kShape)->layouts.empty());
  OutMessage reply;
  Encode(BuildReply{4321}, &reply);
  EXPECT_EQ(DecodeBuildReply(Received(reply))->pages, 4321u);
}

TEST_F(DataCodec, BuildsProposedLayoutsComeBackWithAndWithoutEnergy) {
  BuildRequest in;
  in.slices = random.Slices();
  in.token_count = 777;
  const std::vector<float> energy = random.Floats(in.slices.heads.size() * kShape.head_dim);
  for (size_t h = 0; h < in.slices.heads.size(); ++h) {  // of different sizes; one has no tokens
    const auto pages = static_cast<uint32_t>(h * 3);
    Packing packing;
    packing.layout.page_begin = packing.super_begin = {0};
    for (uint32_t p = 0; p < pages; ++p) {
      for (uint32_t i = 0; i <= p; ++i) packing.layout.tokens.push_back(1000 * p + i);
      packing.layout.page_begin.push_back(static_cast<uint32_t>(packing.layout.tokens.size()));
    }
    if (pages > 0) packing.super_begin = {0, 1, pages};
    in.layouts.push_back(packing);
  }
  for (const bool with_energy : {true, false}) {
    OutMessage out;
    in.query_energy = with_energy ? std::span<const float>(energy) : std::span<const float>();
    Encode(in, &out);
    const auto read = DecodeBuildRequest(Received(out), kShape);
    ASSERT_TRUE(read.ok()) << read.status().ToString();
    EXPECT_EQ(read->decoded_query_energy.size(), in.query_energy.size());
    ASSERT_EQ(read->layouts.size(), in.layouts.size());
    for (size_t h = 0; h < in.layouts.size(); ++h) {
      EXPECT_EQ(read->layouts[h].layout.tokens, in.layouts[h].layout.tokens);
      EXPECT_EQ(read->layouts[h].layout.page_begin, in.layouts[h].layout.page_begin);
      EXPECT_EQ(read->layouts[h].super_begin, in.layouts[h].super_begin);
    }
  }
  in.layouts.push_back({});  // of more heads than are named
  OutMessage out;
  Encode(in, &out);
  EXPECT_EQ(DecodeBuildRequest(Received(out), kShape).status().code(),
            StatusCode::kInvalidArgument);
}

TEST_F(DataCodec, SelectComesBackAsSent) {
  for (int round = 0; round < 50; ++round) {
    Sample sample;
    const SelectRequest in = RandomSelect(random, &sample);
    const Received received(sample.out);
    EXPECT_EQ(PeekContext(received).value(), in.context);
    auto read = DecodeSelectRequest(received, kShape);
    ASSERT_TRUE(read.ok()) << read.status().ToString();
    EXPECT_EQ(read->context, in.context);
    EXPECT_EQ(read->epoch, in.epoch);
    EXPECT_EQ(read->layer, in.layer);
    ASSERT_EQ(read->heads.size(), in.heads.size());
    for (size_t i = 0; i < in.heads.size(); ++i) {
      EXPECT_EQ(read->heads[i].head, in.heads[i].head);
      ExpectEqual(read->heads[i].resident, in.heads[i].resident);
      EXPECT_EQ(read->heads[i].local_lse, in.heads[i].local_lse);
      EXPECT_EQ(read->heads[i].near, in.heads[i].near);
    }
    EXPECT_EQ(read->max_pages, in.max_pages);
    EXPECT_EQ(read->read_cap, in.read_cap);
    EXPECT_EQ(read->min_mass, in.min_mass);
    EXPECT_EQ(read->rank, in.rank);
    EXPECT_EQ(read->flags, in.flags);
    EXPECT_EQ(read->append_first, in.append_first);
    EXPECT_EQ(read->append_count, in.append_count);
    EXPECT_EQ(read->queries, in.queries);
    const size_t block = in.append_count * kShape.row_bytes();
    const auto append =
        std::span<const std::byte>(*sample.bytes).subspan(in.queries.size() * sizeof(float));
    for (size_t i = 0; i < in.heads.size(); ++i) {
      EXPECT_TRUE(Same(read->append_k(i, kShape), append.subspan(2 * i * block, block)));
      EXPECT_TRUE(Same(read->append_v(i, kShape), append.subspan((2 * i + 1) * block, block)));
    }
  }
}

TEST_F(DataCodec, SelectReplyHandsOutEachPagesRows) {
  for (int round = 0; round < 50; ++round) {
    Sample sample;
    const SelectReply in = RandomSelectReply(random, &sample);
    if (round % 2 == 1) sample.out.kind = kFetchPages;
    const Received received(sample.out);
    auto read = DecodeSelectReply(received, kShape);
    ASSERT_TRUE(read.ok()) << read.status().ToString();
    ASSERT_EQ(read->heads.size(), in.heads.size());
    std::span<const std::byte> rest(*sample.bytes);
    const auto take = [&](size_t n) {
      const auto part = rest.first(n);
      rest = rest.subspan(n);
      return part;
    };
    for (size_t i = 0; i < in.heads.size(); ++i) {
      const HeadSelection &a = read->heads[i], &b = in.heads[i];
      EXPECT_EQ(a.head, b.head);
      EXPECT_EQ(a.residual, b.residual);
      EXPECT_EQ(a.covered_mass, b.covered_mass);
      EXPECT_EQ(a.tokens_read, b.tokens_read);
      ASSERT_EQ(a.pages.size(), b.pages.size());
      for (size_t j = 0; j < b.pages.size(); ++j) {
        const PagePayload &p = a.pages[j], &q = b.pages[j];
        EXPECT_EQ(p.segment, q.segment);
        EXPECT_EQ(p.page, q.page);
        EXPECT_EQ(p.version, q.version);
        EXPECT_EQ(p.fill, q.fill);
        EXPECT_EQ(p.from, q.from);
        EXPECT_EQ(p.log_mass, q.log_mass);
        EXPECT_EQ(p.checksum, q.checksum);
        EXPECT_EQ(p.coded_bytes, q.coded_bytes);
        EXPECT_EQ(p.coded_checksum, q.coded_checksum);
        const size_t rows = size_t{q.fill} - q.from;
        const size_t plain = q.coded_bytes > 0 ? 0 : rows * kShape.row_bytes();
        EXPECT_TRUE(Same(p.coded, take(q.coded_bytes)));
        EXPECT_TRUE(Same(p.k_rows, take(plain)));
        EXPECT_TRUE(Same(p.v_rows, take(plain)));
        EXPECT_TRUE(Same(p.positions, take(rows * sizeof(uint32_t))));
      }
    }
    EXPECT_TRUE(rest.empty());
    EXPECT_EQ(read->select_ns, in.select_ns);
    EXPECT_EQ(read->gather_ns, in.gather_ns);
    EXPECT_EQ(read->next_position, in.next_position);
  }
}

TEST_F(DataCodec, FetchesComeBackAsSent) {
  FetchRowsRequest rows{.slices = random.Slices(), .part = RowsPart::kTail};
  OutMessage out;
  Encode(rows, &out);
  EXPECT_EQ(PeekContext(Received(out)).value(), rows.slices.context);
  auto read = DecodeFetchRowsRequest(Received(out), kShape);
  ASSERT_TRUE(read.ok()) << read.status().ToString();
  ExpectEqual(read->slices, rows.slices);
  EXPECT_EQ(read->part, RowsPart::kTail);

  Sample sample;
  Encode(FetchRowsReply{.first_position = 9, .count = 5, .checksum = 0xabcdef}, &sample.out);
  AttachBody(random, 3 * 2 * 5 * kShape.row_bytes(), &sample);
  const Received received(sample.out);
  auto reply = DecodeFetchRowsReply(received, kShape, 3);
  ASSERT_TRUE(reply.ok()) << reply.status().ToString();
  EXPECT_EQ(reply->first_position, 9u);
  EXPECT_EQ(reply->count, 5u);
  EXPECT_EQ(reply->checksum, 0xabcdefu);
  EXPECT_TRUE(Same(reply->body, *sample.bytes));
  EXPECT_FALSE(DecodeFetchRowsReply(received, kShape, 2).ok());

  FetchPagesRequest pages{ContextId(random.U64()), Epoch(3), LayerId(1), KvHeadId(4),
                          random.Resident(9)};
  OutMessage ask;
  Encode(pages, &ask);
  EXPECT_EQ(PeekContext(Received(ask)).value(), pages.context);
  auto asked = DecodeFetchPagesRequest(Received(ask), kShape);
  ASSERT_TRUE(asked.ok()) << asked.status().ToString();
  EXPECT_EQ(asked->context, pages.context);
  EXPECT_EQ(asked->epoch, pages.epoch);
  EXPECT_EQ(asked->layer, pages.layer);
  EXPECT_EQ(asked->head, pages.head);
  ExpectEqual(asked->pages, pages.pages);
}

TEST_F(DataCodec, ExtentKeysComeBackAsSent) {
  const ExtentKeysRequest request{ContextId(random.U64()), Epoch(3), {9, 1, ~uint64_t{0}}};
  OutMessage ask, tell;
  Encode(request, &ask);
  EXPECT_EQ(PeekContext(Received(ask)).value(), request.context);
  const auto asked = DecodeExtentKeysRequest(Received(ask));
  ASSERT_TRUE(asked.ok()) << asked.status().ToString();
  EXPECT_EQ(asked->context, request.context);
  EXPECT_EQ(asked->epoch, request.epoch);
  EXPECT_EQ(asked->serials, request.serials);
  const ExtentKeysReply reply{{9, 1}, {random.Bytes(33), random.Bytes(512)}};
  Encode(reply, &tell);
  const auto told = DecodeExtentKeysReply(Received(tell));
  ASSERT_TRUE(told.ok()) << told.status().ToString();
  EXPECT_EQ(told->serials, reply.serials);
  EXPECT_EQ(told->keys, reply.keys);
}

TEST_F(DataCodec, StatusComesBackAsSentAndLongOnesAreCut) {
  for (uint8_t code = 1; code <= 14; ++code) {
    OutMessage out;
    EncodeStatus(Status(static_cast<StatusCode>(code), "why it failed"), &out);
    const Status read = DecodeStatus(Received(out));
    EXPECT_EQ(read.code(), static_cast<StatusCode>(code));
    EXPECT_EQ(read.message(), "why it failed");
  }
  OutMessage out;
  EncodeStatus(NotFound(std::string(100000, 'x')), &out);
  EXPECT_EQ(DecodeStatus(Received(out)).message().size(), limits::kStatusTextBytesMax);
}

// ---- each check, by name ----

template <typename Change>
Status PutRowsWith(Change change) {
  PutRowsRequest in;
  in.slices = {ContextId(1), Epoch(1), LayerId(0), {KvHeadId(0), KvHeadId(3)}};
  in.token_count = 2;
  change(&in);
  Sample sample;
  Encode(in, &sample.out);
  Random random(1);
  AttachBody(random, in.slices.heads.size() * 2 * in.token_count * kShape.row_bytes(), &sample);
  const auto read = DecodePutRowsRequest(Received(sample.out), kShape);
  return read.ok() ? OkStatus() : read.status();
}

TEST(DataCodecChecks, PutRows) {
  EXPECT_TRUE(PutRowsWith([](PutRowsRequest*) {}).ok());
  using P = PutRowsRequest;
  EXPECT_THAT(PutRowsWith([](P* p) { p->slices.layer = LayerId(4); }).message(),
              HasSubstr("PutRowsRequest.layer = 4, expected 0..3"));
  EXPECT_THAT(PutRowsWith([](P* p) { p->slices.heads[1] = KvHeadId(6); }).message(),
              HasSubstr("kvHead = 6, expected 0..5"));
  EXPECT_THAT(PutRowsWith([](P* p) { p->slices.heads[1] = KvHeadId(0); }).message(),
              HasSubstr("kvHead = 0, expected more than 0"));
  EXPECT_THAT(PutRowsWith([](P* p) { p->slices.heads.clear(); }).message(),
              HasSubstr("kvHeads.size = 0, expected 1..6"));
  EXPECT_THAT(PutRowsWith([](P* p) { p->token_count = 0; }).message(), HasSubstr("tokenCount = 0"));
  EXPECT_THAT(PutRowsWith([](P* p) { p->token_count = limits::kPutRowsTokensMax + 1; }).message(),
              HasSubstr("tokenCount = 1025"));
  EXPECT_THAT(PutRowsWith([](P* p) { p->first_position = ~0u; }).message(),
              HasSubstr("firstPosition + tokenCount = 4294967297"));
}

template <typename Change>
Status SelectWith(Change change) {
  SelectRequest in;
  in.heads.resize(1);
  in.queries.assign(kGroup * kShape.head_dim, 1.0f);
  change(&in);
  OutMessage out;
  Encode(in, &out);
  out.body.push_back(std::as_bytes(std::span<const float>(in.queries)));
  const std::vector<std::byte> append(in.append_count * 2 * kShape.row_bytes());
  out.body.push_back(append);
  const auto read = DecodeSelectRequest(Received(out), kShape);
  return read.ok() ? OkStatus() : read.status();
}

TEST(DataCodecChecks, Select) {
  EXPECT_TRUE(SelectWith([](SelectRequest*) {}).ok());
  using S = SelectRequest;
  const auto expect = [](const Status& status, const char* text) {
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_THAT(status.message(), HasSubstr(text));
  };
  expect(SelectWith([](S* s) { s->max_pages = limits::kPagesPerSelectMax + 1; }),
         "maxPages = 4097");
  expect(SelectWith([](S* s) { s->read_cap = limits::kReadCapMax + 1; }), "readCap = 65537");
  expect(SelectWith([](S* s) { s->min_mass = 1.5f; }), "minMass = 1.5");
  expect(SelectWith([](S* s) { s->min_mass = NAN; }), "minMass = nan");
  expect(SelectWith([](S* s) { s->rank = 3; }), "rank = 3");
  expect(SelectWith([](S* s) { s->flags = 32; }), "flags = 32");
  expect(SelectWith([](S* s) { s->heads[0].near.resize(limits::kNearPositionsMax + 1); }),
         "near.size = 4097");
  expect(SelectWith([](S* s) { s->flags = kSelectMapped | kSelectAttend; }), "flags = 6");
  expect(SelectWith([](S* s) { s->append_count = limits::kPendingTokensMax + 1; }),
         "appendCount = 65");
  expect(SelectWith([](S* s) { s->append_first = ~0u; }), "appendFirst + appendCount");
  expect(SelectWith([](S* s) { s->heads.clear(); }), "heads.size = 0");
  expect(SelectWith([](S* s) { s->heads[0].resident.resize(limits::kPagesPerSelectMax + 1); }),
         "pages.size = 4097");
  expect(SelectWith([](S* s) {
           s->heads[0].resident.resize(1, {.fill = 1});
           s->heads[0].resident[0].fill = 17;
         }),
         "page.fill = 17");
  expect(SelectWith([](S* s) { s->heads[0].local_lse = {1.0f}; }), "localLse.size = 1");
  expect(SelectWith([](S* s) { s->heads[0].local_lse = {1.0f, NAN}; }), "localLse = nan");
  expect(SelectWith([](S* s) { s->queries[3] = INFINITY; }), "queries[3] = inf");
  expect(SelectWith([](S* s) { s->queries.pop_back(); }), "body = 124 bytes, expected 128");
}

TEST(DataCodecChecks, SelectReplyRefusesImpossiblePagesAndStates) {
  const auto decode = [](const PagePayload& page, std::vector<float> residual) {
    SelectReply in;
    in.heads.resize(1);
    in.heads[0].pages = {page};
    in.heads[0].residual = std::move(residual);
    OutMessage out;
    Encode(in, &out);
    return DecodeSelectReply(Received(out), kShape).status().message();
  };
  EXPECT_THAT(decode({.fill = 0}, {}), HasSubstr("page.fill = 0, expected 1..16"));
  EXPECT_THAT(decode({.fill = 17, .from = 17}, {}), HasSubstr("page.fill = 17"));
  EXPECT_THAT(decode({.fill = 4, .from = 5}, {}), HasSubstr("page.from = 5, expected 0..4"));
  EXPECT_THAT(decode({.fill = 4, .from = 4, .log_mass = NAN}, {}), HasSubstr("logMass"));
  EXPECT_THAT(decode({.fill = 4, .from = 3}, {}),
              HasSubstr("body = 0 bytes, expected at least 32"));
  EXPECT_THAT(decode({.fill = 4, .from = 1, .coded_bytes = 9}, {}), HasSubstr("page.from = 1"));
  EXPECT_THAT(decode({.fill = 4, .coded_bytes = 256}, {}), HasSubstr("page.codedBytes = 256"));
  EXPECT_THAT(decode({.fill = 4, .coded_bytes = 255}, {}), HasSubstr("expected at least 255"));
  const PagePayload held{.fill = 4, .from = 4};
  EXPECT_THAT(decode(held, {1, 2}), HasSubstr("residual.size = 8"));
  std::vector<float> states(kGroup * (kShape.head_dim + 2), 0.0f);
  states[0] = -INFINITY;
  EXPECT_EQ(decode(held, states), "");
  states[1] = NAN;
  EXPECT_THAT(decode(held, states), HasSubstr("residual.max = nan"));
  states[1] = 0;
  states[2] = -1;
  EXPECT_THAT(decode(held, states), HasSubstr("residual.denom = -1"));
  states[2] = 1;
  states.back() = INFINITY;
  EXPECT_THAT(decode(held, states), HasSubstr("residual.out[31] = inf"));
}

TEST(DataCodecChecks, KindsAreNotMixedUp) {
  OutMessage out;
  Encode(PutRowsReply{1}, &out);
  EXPECT_TRUE(DecodePutRowsReply(Received(out)).ok());
  EXPECT_THAT(DecodeBuildReply(Received(out)).status().message(),
              HasSubstr("BuildReply.kind = 2, expected 3"));
  out.kind = 99;
  EXPECT_EQ(PeekContext(Received(out)).status().code(), StatusCode::kUnimplemented);
  EXPECT_EQ(DecodeStatus(Received(kSelect, {}, {})).code(), StatusCode::kInternal);
}

}  // namespace
}  // namespace icecache::wire
