// Truncated, flipped and hostile messages: decoding ends in a value whose sizes agree, or in a
// Status.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <string_view>
#include <utility>
#include <vector>

#include "common/limits.h"
#include "common/wire/data_samples.h"
#include "common/wire/extent_codec.h"
#include "common/wire/push_codec.h"
#include "common/wire/select_batch_codec.h"

namespace icecache::wire {
namespace {

using testing::HasSubstr;

struct Case {
  const char* name;
  Sample sample;
  std::function<Status(const InMessage&)> decode;  // OK: every span was read and every size agrees
};

// Decode, then read every span and compare every size.
Result<PutRowsRequest> CheckedPutRows(const InMessage& in) {
  auto read = DecodePutRowsRequest(in, kShape);
  for (size_t i = 0; read.ok() && i < read->slices.heads.size(); ++i) {
    EXPECT_LT(read->slices.heads[i].value, kShape.kv_heads);
    EXPECT_EQ(read->k_rows(i, kShape).size(), read->token_count * kShape.row_bytes());
    Touch(read->k_rows(i, kShape));
    Touch(read->v_rows(i, kShape));
  }
  return read;
}

Result<SelectRequest> CheckedSelect(const InMessage& in) {
  auto read = DecodeSelectRequest(in, kShape);
  if (!read.ok()) return read;
  EXPECT_EQ(read->queries.size(), read->heads.size() * kGroup * kShape.head_dim);
  for (size_t i = 0; i < read->heads.size(); ++i) {
    Touch(read->append_k(i, kShape));
    Touch(read->append_v(i, kShape));
    EXPECT_TRUE(i == 0 || read->heads[i - 1].head < read->heads[i].head);
    EXPECT_LE(read->heads[i].resident.size(), limits::kPagesPerSelectMax);
  }
  return read;
}

Result<SelectReply> CheckedSelectReply(const InMessage& in) {
  auto read = DecodeSelectReply(in, kShape);
  if (!read.ok()) return read;
  size_t used = 0;
  for (const HeadSelection& head : read->heads) {
    for (const PagePayload& p : head.pages) {
      EXPECT_LE(p.from, p.fill);
      EXPECT_LE(p.fill, limits::kPageTokens);
      const bool rows = p.place == PagePlace::kBody && p.coded_bytes == 0;
      EXPECT_EQ(p.k_rows.size(), rows ? (size_t{p.fill} - p.from) * kShape.row_bytes() : 0);
      EXPECT_EQ(p.coded.size(), p.place == PagePlace::kBody ? p.coded_bytes : 0);
      EXPECT_LT(p.coded.size(), 2 * p.fill * kShape.row_bytes());
      Touch(p.coded);
      Touch(p.k_rows);
      Touch(p.v_rows);
      Touch(p.positions);
      used += p.coded.size() + p.k_rows.size() + p.v_rows.size() + p.positions.size();
    }
  }
  EXPECT_EQ(used, in.body.size());
  return read;
}

std::vector<Case> Cases(Random& random) {
  std::vector<Case> cases;
  const auto add = [&](const char* name, Sample sample, auto decode) {
    cases.push_back({name, std::move(sample), [decode](const InMessage& in) -> Status {
                       auto read = decode(in);
                       return read.ok() ? OkStatus() : read.status();
                     }});
  };
  Sample put, select, reply, rows;
  RandomPutRows(random, &put);
  RandomSelect(random, &select);
  RandomSelectReply(random, &reply);
  add("PutRows", put, CheckedPutRows);
  add("Select", select, CheckedSelect);
  add("SelectReply", reply, CheckedSelectReply);
  Encode(FetchRowsReply{.first_position = 9, .count = 5}, &rows.out);
  AttachBody(random, 2 * 2 * 5 * kShape.row_bytes(), &rows);
  add("FetchRowsReply", rows,
      [](const InMessage& in) { return DecodeFetchRowsReply(in, kShape, 2); });
  // By name: g++ 12 takes members of these as temporaries for uninitialized, at -O3.
  BuildRequest laid_out{.slices = {ContextId(1), Epoch(2), LayerId(0), {KvHeadId(0), KvHeadId(1)}},
                        .token_count = 5};
  BuildRequest plain = laid_out;
  Sample built_here;
  Packing packing;
  packing.layout = {{2, 0, 1, 4, 3}, {0, 3, 5}};
  packing.super_begin = {0, 2};
  laid_out.layouts = {packing, packing};
  Encode(laid_out, &built_here.out);
  add("BuildHere", built_here, [](const InMessage& in) { return DecodeBuildRequest(in, kShape); });
  Sample build, fetch, pages, attach;
  const std::vector<float> energy(2 * kShape.head_dim, 1.0f);
  plain.query_energy = energy;
  Encode(plain, &build.out);
  add("Build", build, [](const InMessage& in) { return DecodeBuildRequest(in, kShape); });
  Encode(FetchRowsRequest{.slices = random.Slices()}, &fetch.out);
  add("FetchRows", fetch, [](const InMessage& in) { return DecodeFetchRowsRequest(in, kShape); });
  Encode(FetchPagesRequest{ContextId(1), Epoch(1), LayerId(1), KvHeadId(2), random.Resident(5)},
         &pages.out);
  add("FetchPages", pages, [](const InMessage& in) { return DecodeFetchPagesRequest(in, kShape); });
  Sample keys, key_list;
  Encode(ExtentKeysRequest{ContextId(1), Epoch(1), {3, 1, 4}}, &keys.out);
  add("ExtentKeys", keys, [](const InMessage& in) { return DecodeExtentKeysRequest(in); });
  Encode(ExtentKeysReply{{3, 4}, {random.Bytes(40), random.Bytes(512)}}, &key_list.out);
  add("ExtentKeysReply", key_list, [](const InMessage& in) { return DecodeExtentKeysReply(in); });
  Sample offer;
  Encode(OfferMemoryRequest{random.Bytes(16), random.Bytes(140)}, &offer.out);
  add("OfferMemory", offer, [](const InMessage& in) { return DecodeOfferMemoryRequest(in); });
  Encode(AttachRequest{.ticket = random.Bytes(16)}, &attach.out);
  add("Attach", attach, [](const InMessage& in) { return DecodeAttachRequest(in); });
  std::vector<OutMessage> selects = {select.out, select.out};
  Sample batch;
  batch.out = JoinSelects(selects);
  batch.bytes = select.bytes;
  add("SelectBatch", batch, [](const InMessage& in) -> Result<std::vector<InMessage>> {
    auto parts = SplitSelects(in);
    if (parts.ok()) {
      for (const InMessage& part : *parts) Touch(part.meta), Touch(part.body);
    }
    return parts;
  });
  return cases;
}

TEST_F(DataCodec, RefusesEveryTruncation) {
  for (const Case& c : Cases(random)) {
    const Received whole(c.sample.out);
    ASSERT_TRUE(c.decode(whole).ok()) << c.name << ": " << c.decode(whole).ToString();
    const size_t meta = whole.in().meta.size(), body = whole.in().body.size();
    for (size_t n = 0; n < meta; ++n) {
      ASSERT_FALSE(c.decode(whole.Truncated(n, body)).ok()) << c.name << " meta " << n;
      PeekContext(whole.Truncated(n, body)).ok();
    }
    const bool body_is_optional = std::string_view(c.name) == "Build";
    for (size_t n = body_is_optional ? 1 : 0; n < body; ++n) {
      ASSERT_FALSE(c.decode(whole.Truncated(meta, n)).ok()) << c.name << " body " << n;
    }
    auto longer = std::vector<std::byte>(whole.in().body.begin(), whole.in().body.end());
    longer.push_back(std::byte{0});
    EXPECT_FALSE(c.decode(Received(whole.in().kind, whole.in().meta, longer)).ok()) << c.name;
  }
}

TEST_F(DataCodec, SurvivesFlippedBytes) {
  const std::vector<Case> cases = Cases(random);
  int refused = 0;
  for (const Case& c : cases) {
    for (int round = 0; round < 2000; ++round) {
      Received damaged(c.sample.out);
      for (uint32_t flips = 1 + random.Below(3); flips > 0; --flips) {
        damaged.meta()[random.Below(static_cast<uint32_t>(damaged.meta().size()))] ^=
            static_cast<std::byte>(1u << random.Below(8));
      }
      refused += c.decode(damaged).ok() ? 0 : 1;  // OK is fine when an id or a number changed
      PeekContext(damaged).ok();
      EXPECT_FALSE(DecodeStatus(damaged).ok());
    }
  }
  EXPECT_GT(refused, 1000);  // the test has reached the checks
}

TEST_F(DataCodec, SurvivesNoise) {
  const std::vector<Case> cases = Cases(random);
  for (int round = 0; round < 3000; ++round) {
    const auto noise = random.Bytes(8 * random.Below(20));
    for (const Case& c : cases) {
      EXPECT_FALSE(c.decode(Received(c.sample.out.kind, noise, {})).ok() && noise.empty());
    }
    EXPECT_FALSE(DecodeStatus(Received(0, noise, {})).ok());
  }
}

TEST_F(DataCodec, ListsThatShareTheirContentCannotMultiplyWork) {
  // 6 heads whose resident lists are all the same 4000 pages: legal pointers, six times the work of
  // the bytes.
  SelectRequest in;
  in.heads.resize(kShape.kv_heads);
  for (uint16_t h = 0; h < kShape.kv_heads; ++h) in.heads[h].head = KvHeadId(h);
  in.heads[0].resident = random.Resident(4000);
  Sample sample;
  Encode(in, &sample.out);
  AttachBody(random, kShape.kv_heads * kGroup * kShape.head_dim * sizeof(float), &sample);
  std::fill(sample.bytes->begin(), sample.bytes->end(), std::byte{0});
  Received message(sample.out);
  ASSERT_TRUE(DecodeSelectRequest(message, kShape).ok());
  // The heads' structs are consecutive: kvHead and pointers to resident, lse and near, 4 words
  // each. Find the one list pointer of 4000 elements and aim the other heads' at the same place.
  auto words =
      std::span(reinterpret_cast<uint64_t*>(message.meta().data()), message.meta().size() / 8);
  size_t at = 0;
  for (size_t i = 1; i < words.size() && at == 0; ++i) {
    if ((words[i] & 3) == 1 && (words[i] >> 35) == 4000 * 3 && ((words[i] >> 32) & 7) == 7) at = i;
  }
  ASSERT_GT(at, 0u);
  for (uint64_t h = 1; h < kShape.kv_heads; ++h) {
    words[at + 4 * h] = words[at] - ((4 * h) << 2);
  }
  const auto read = DecodeSelectRequest(message, kShape);
  ASSERT_FALSE(read.ok());
  EXPECT_THAT(read.status().message(), HasSubstr("raversal limit"));
}

}  // namespace
}  // namespace icecache::wire
