// What belongs to pages that are pushed: the offer of memory, regions in requests, places in
// replies.
#include "common/wire/push_codec.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/wire/data_samples.h"

namespace icecache::wire {
namespace {

using ::testing::HasSubstr;

TEST_F(DataCodec, OfferMemoryComesBackAsSent) {
  const OfferMemoryRequest request{random.Bytes(16), random.Bytes(limits::kMemoryHandleBytesMax)};
  OutMessage ask, tell;
  Encode(request, &ask);
  const auto asked = DecodeOfferMemoryRequest(Received(ask));
  ASSERT_TRUE(asked.ok()) << asked.status().ToString();
  EXPECT_EQ(asked->ticket, request.ticket);
  EXPECT_EQ(asked->handle, request.handle);
  Encode(OfferMemoryReply{}, &tell);
  EXPECT_TRUE(DecodeOfferMemoryReply(Received(tell)).ok());
  EXPECT_FALSE(DecodeOfferMemoryReply(Received(kAttach, tell.meta, {})).ok());
}

TEST_F(DataCodec, OfferMemoryChecksSizes) {
  const auto decode = [](size_t ticket, size_t handle) {
    OutMessage out;
    Encode(OfferMemoryRequest{std::vector<std::byte>(ticket), std::vector<std::byte>(handle)},
           &out);
    return DecodeOfferMemoryRequest(Received(out)).status().message();
  };
  EXPECT_THAT(decode(0, 9), HasSubstr("ticket.size = 0"));
  EXPECT_THAT(decode(limits::kTicketBytesMax + 1, 9), HasSubstr("ticket.size = 257"));
  EXPECT_THAT(decode(9, 0), HasSubstr("handle.size = 0"));
  EXPECT_THAT(decode(9, limits::kMemoryHandleBytesMax + 1), HasSubstr("handle.size = 257"));
}

TEST_F(DataCodec, AttachReplySaysWhetherPagesArePushed) {
  for (const bool pushes : {false, true}) {
    OutMessage out;
    Encode(AttachReply{.shard_count = 1, .extents = {}, .pushes = pushes}, &out);
    EXPECT_EQ(DecodeAttachReply(Received(out)).value().pushes, pushes);
  }
}

TEST_F(DataCodec, RegionsComeBackAsSentAndEndWithTheMemory) {
  Sample sample;
  SelectRequest in = RandomSelect(random, &sample);
  const auto decode = [&](uint32_t offset, uint32_t bytes) {
    in.push_offset = offset;
    in.push_bytes = bytes;
    Encode(in, &sample.out);
    return DecodeSelectRequest(Received(sample.out), kShape);
  };
  const auto read = decode(limits::kPushBytes - 4096, 4096);
  ASSERT_TRUE(read.ok()) << read.status().ToString();
  EXPECT_EQ(read->push_offset, limits::kPushBytes - 4096);
  EXPECT_EQ(read->push_bytes, 4096u);
  EXPECT_THAT(decode(limits::kPushBytes - 4095, 4096).status().message(), HasSubstr("pushOffset"));
  EXPECT_THAT(decode(0, limits::kPushRegionBytesMax + 1).status().message(),
              HasSubstr("pushBytes"));
  EXPECT_THAT(decode(~0u, 16).status().message(), HasSubstr("pushOffset"));
}

// Only positions are in the body of a page that was pushed.
TEST_F(DataCodec, PushedPagesAreNamedByOffset) {
  PagePayload pushed{.fill = 16, .from = 3, .place = PagePlace::kPushed, .offset = 1234};
  PagePayload whole{.fill = 2};
  const auto decode = [&](size_t body_bytes) {
    SelectReply reply;
    reply.heads.push_back({KvHeadId(0), {pushed, whole}, {}});
    OutMessage out;
    Encode(reply, &out);
    const std::vector<std::byte> body = random.Bytes(body_bytes);
    out.body.push_back(body);
    const Received received(out);
    const auto read = DecodeSelectReply(received, kShape);
    if (!read.ok()) return read.status();
    const PagePayload &p = read->heads[0].pages[0], &q = read->heads[0].pages[1];
    EXPECT_EQ(p.place, PagePlace::kPushed);
    EXPECT_EQ(p.offset, 1234u);
    EXPECT_TRUE(p.k_rows.empty() && p.v_rows.empty());
    EXPECT_EQ(p.positions.size(), 13 * sizeof(uint32_t));
    EXPECT_EQ(q.k_rows.size(), 2 * kShape.row_bytes());
    return OkStatus();
  };
  const size_t body = 13 * 4 + 2 * (2 * kShape.row_bytes() + 4);
  EXPECT_EQ(decode(body).ToString(), "OK");
  EXPECT_THAT(decode(body - 1).message(), HasSubstr("body"));
  EXPECT_THAT(decode(body + 1).message(), HasSubstr("body"));
  pushed.offset = static_cast<uint32_t>(limits::kPushBytes - 26 * kShape.row_bytes() + 1);
  EXPECT_THAT(decode(body).message(), HasSubstr("page.offset"));
}

}  // namespace
}  // namespace icecache::wire
