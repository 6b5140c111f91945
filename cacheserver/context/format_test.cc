// Formats on disk: every kind of record says what it is and in which format, and one of a newer
// server is refused with its name, both numbers and the remedy; a damaged one is DATA_LOSS. What a
// whole server says: tests/integration/recovery_test.cc.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>

#include "cacheserver/context/manifest.h"
#include "cacheserver/context/test_sealed_slice.h"
#include "cacheserver/store/blob.h"

namespace icecache {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

struct Kind {
  const char* name;
  std::string blob;
  std::function<Status(std::string_view)> read;
  const char* newest = "up to 1";  // format that is read
};

std::vector<Kind> Kinds() {
  static PagePool pool(16u << 20);
  const auto slice = MakeSealedSlice(pool, 100);
  ContextManifest manifest{.tenant = "alice",
                           .name = "doc",
                           .shape = {.layers = 1, .kv_heads = 1, .query_heads = 1, .head_dim = 32},
                           .model = "m"};
  manifest.segments.push_back({SegmentId(9), "alice", 0, 84, 100});
  return {
      {"record of a durable context", EncodeManifest(manifest),
       [](std::string_view blob) { return DecodeManifest(blob).status(); }, "up to 2"},
      {"record of a segment", EncodeSegmentRecord(SegmentId(9)),
       [](std::string_view blob) { return CheckSegmentRecord(blob, SegmentId(9)); }},
      {"record of the last start", EncodeStartRecord(7),
       [](std::string_view blob) { return DecodeStartRecord(blob).status(); }},
      {"stored rows of a slice", slice->SaveRows(),
       [](std::string_view blob) {
         return HeadSlice::Restore(pool, SealedSliceOptions(), blob).status();
       }},
      {"stored index of a slice", slice->SaveIndex(),
       [](std::string_view blob) {
         return HeadSlice::ParseIndex(SealedSliceOptions(), blob).status();
       }},
  };
}

TEST(Formats, ANewerOneIsRefusedWithItsNameBothNumbersAndTheRemedy) {
  for (Kind& kind : Kinds()) {
    SCOPED_TRACE(kind.name);
    EXPECT_EQ(kind.read(kind.blob).ToString(), "OK");
    const uint16_t newer = 7;
    std::memcpy(kind.blob.data() + 4, &newer, sizeof newer);
    const Status status = kind.read(kind.blob);
    EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition) << status.ToString();
    EXPECT_THAT(status.message(), AllOf(HasSubstr(kind.name), HasSubstr("format 7"),
                                        HasSubstr(kind.newest), HasSubstr("use a newer server")));
  }
}

TEST(Formats, AnythingElseThatIsNotWhatWasWrittenIsDataLoss) {
  for (const Kind& kind : Kinds()) {
    SCOPED_TRACE(kind.name);
    for (size_t at = 0; at < kind.blob.size(); at += 1 + kind.blob.size() / 97) {
      if (at == 4 || at == 5) continue;  // the version
      std::string damaged = kind.blob;
      damaged[at] = static_cast<char>(damaged[at] ^ 0x10);
      const Status status = kind.read(damaged);
      EXPECT_EQ(status.code(), StatusCode::kDataLoss) << "byte " << at << ": " << status.ToString();
      EXPECT_THAT(status.message(), HasSubstr(kind.name));
    }
    EXPECT_EQ(kind.read(std::string_view(kind.blob).substr(0, kind.blob.size() - 1)).code(),
              StatusCode::kDataLoss);
    EXPECT_EQ(kind.read("").code(), StatusCode::kDataLoss);
  }
}

}  // namespace
}  // namespace icecache
