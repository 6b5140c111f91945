#include "common/message_header.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/limits.h"

namespace icecache {
namespace {

MessageHeader Sound() {
  MessageHeader header{};
  header.magic = kMessageMagic;
  header.meta_bytes = 13;
  header.body_bytes = 100;
  return header;
}

TEST(MessageHeader, SoundHeadersPass) {
  EXPECT_TRUE(CheckMessageHeader(Sound(), 116).ok());
  MessageHeader hello{};
  hello.magic = kMessageMagic;
  hello.control = kControlHello;
  EXPECT_TRUE(CheckMessageHeader(hello, 0).ok());
}

TEST(MessageHeader, EveryDefectIsDataLossAndNamed) {
  const auto expect = [](void (*damage)(MessageHeader&), uint64_t data_bytes, const char* named) {
    MessageHeader header = Sound();
    damage(header);
    const Status status = CheckMessageHeader(header, data_bytes);
    EXPECT_EQ(status.code(), StatusCode::kDataLoss) << named;
    EXPECT_THAT(status.message(), testing::HasSubstr(named));
  };
  expect([](MessageHeader& h) { h.magic ^= 1; }, 116, "magic");
  expect([](MessageHeader& h) { h.control = 2; }, 116, "magic");
  expect([](MessageHeader& h) { h.control = kControlHello; }, 116, "hello");
  expect([](MessageHeader& h) { h.meta_bytes = limits::kDataMetaBytesMax + 1; }, 116, "meta of");
  expect([](MessageHeader& h) { h.body_bytes = limits::kDataBodyBytesMax + 1; }, 116, "body of");
  expect([](MessageHeader& h) { h.body_bytes = ~0u; }, 116, "body of");
  expect([](MessageHeader&) {}, 115, "115 bytes of data, its header says 116");
  expect([](MessageHeader&) {}, 0, "0 bytes of data");
}

}  // namespace
}  // namespace icecache
