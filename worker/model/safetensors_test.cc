// What a weights file may do wrong, one test per way, and that the error says which.
#include "worker/model/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "tests/models/tiny_model.h"

namespace icecache {
namespace {

using ::testing::HasSubstr;

std::string File(const std::string& header, size_t data_bytes) {
  const uint64_t length = header.size();
  return std::string(reinterpret_cast<const char*>(&length), 8) + header +
         std::string(data_bytes, '\x3c');
}

class Safetensors : public ::testing::Test {
 protected:
  Status OpenBytes(const std::string& bytes) {
    WriteText(path_, bytes);
    const auto file = SafetensorsFile::Open(path_);
    return file.ok() ? OkStatus() : file.status();
  }
  void ExpectCorrupt(const std::string& bytes, const std::string& reason) {
    const Status status = OpenBytes(bytes);
    EXPECT_EQ(status.code(), StatusCode::kDataLoss) << status.ToString();
    EXPECT_THAT(status.message(), HasSubstr(path_));
    EXPECT_THAT(status.message(), HasSubstr(reason));
  }

  TempDirectory directory_;
  const std::string path_ = directory_ / "model.safetensors";
};

constexpr char kGood[] =
    R"({"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"BF16","shape":[],"data_offsets":[24,26]}})";

TEST_F(Safetensors, ReadsWhatTheFormatDescribes) {
  EXPECT_TRUE(OpenBytes(File(kGood, 26)).ok());
  const auto weights = WeightFiles::Open(directory_.path());
  ASSERT_TRUE(weights.ok()) << weights.status().ToString();
  const auto a = (*weights)->Find("a", {2, 3});
  ASSERT_TRUE(a.ok());
  EXPECT_EQ(a->dtype, DType::kF32);
  EXPECT_EQ(a->data[23], std::byte{0x3c});
  EXPECT_EQ((*weights)->Find("b", {})->dtype, DType::kBF16);
  EXPECT_EQ((*weights)->Find("c", {1}).status().code(), StatusCode::kNotFound);
  EXPECT_TRUE((*weights)->Has("a"));
  EXPECT_FALSE((*weights)->Has("c"));
}

TEST_F(Safetensors, TruncatedLengthField) { ExpectCorrupt("abc", "found 3 bytes"); }
TEST_F(Safetensors, EmptyFile) { ExpectCorrupt("", "found 0 bytes"); }
TEST_F(Safetensors, TruncatedHeader) {
  ExpectCorrupt(File(kGood, 26).substr(0, 60),
                "header of " + std::to_string(std::strlen(kGood)) + " bytes, expected at most 52");
}
TEST_F(Safetensors, AbsurdHeaderLength) {
  ExpectCorrupt(std::string(8, '\xff') + kGood, "header of 18446744073709551615 bytes");
}
TEST_F(Safetensors, HeaderIsNoJson) { ExpectCorrupt(File("{\"a\": [1,", 0), "no JSON object"); }
TEST_F(Safetensors, HeaderIsNoObject) { ExpectCorrupt(File("[1, 2]", 0), "no JSON object"); }
TEST_F(Safetensors, TruncatedData) {
  ExpectCorrupt(File(kGood, 20), "tensor 'a': bytes 0..24, expected them within the file's 20");
}
TEST_F(Safetensors, BytesAfterTheLastTensor) {
  ExpectCorrupt(File(kGood, 30), "end at byte 26 of the data, the file at 30");
}
TEST_F(Safetensors, OffsetsOutOfOrder) {
  ExpectCorrupt(File(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}})", 4),
                "tensor 'a': bytes 4..0");
}
TEST_F(Safetensors, SizeThatContradictsTheShape) {
  ExpectCorrupt(File(R"({"a":{"dtype":"F16","shape":[3,3],"data_offsets":[0,16]}})", 16),
                "shape [3, 3] of F16 needs 18 bytes, found 16");
}
TEST_F(Safetensors, ShapeProductThatOverflows) {
  ExpectCorrupt(
      File(R"({"a":{"dtype":"F32","shape":[4294967296,4294967296,2],"data_offsets":[0,16]}})", 16),
      "needs more than 2^64 bytes");
}
TEST_F(Safetensors, OverlappingTensors) {
  ExpectCorrupt(
      File(
          R"({"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[8],"data_offsets":[4,12]}})",
          12),
      "tensor 'b': begins at byte 4, inside the tensor before it");
}
TEST_F(Safetensors, GapBetweenTensors) {
  ExpectCorrupt(
      File(
          R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[8,12]}})",
          12),
      "after a gap; expected 4");
}
TEST_F(Safetensors, UnknownDtype) {
  ExpectCorrupt(File(R"({"a":{"dtype":"F3","shape":[1],"data_offsets":[0,4]}})", 4),
                "unknown dtype 'F3'");
}
TEST_F(Safetensors, NegativeOffset) {
  ExpectCorrupt(File(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}})", 4),
                "'data_offsets' is no pair");
}
TEST_F(Safetensors, MissingKeysAndWrongTypes) {
  ExpectCorrupt(File(R"({"a":{"shape":[1],"data_offsets":[0,4]}})", 4), "no string 'dtype'");
  ExpectCorrupt(File(R"({"a":{"dtype":"F32","shape":"1","data_offsets":[0,4]}})", 4),
                "'shape' is no array");
  ExpectCorrupt(File(R"({"a":{"dtype":"F32","shape":[1]}})", 4), "'data_offsets' is no pair");
  ExpectCorrupt(File(R"({"a":7})", 4), "expected an object, found number");
}

TEST_F(Safetensors, IntegerTensorIsReadableButNoWeight) {
  ASSERT_TRUE(OpenBytes(File(R"({"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}})", 8)).ok());
  const auto weights = WeightFiles::Open(directory_.path());
  ASSERT_TRUE(weights.ok());
  EXPECT_THAT((*weights)->Find("a", {1}).status().message(),
              HasSubstr("found dtype I64, expected F32, F16 or BF16"));
}

// Whatever bytes are flipped or cut, opening ends with a Status and every accepted tensor can be
// read.
TEST_F(Safetensors, DamagedFilesNeverCrash) {
  const uint64_t seed = std::random_device{}();
  RecordProperty("seed", std::to_string(seed));
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  const std::string good = File(kGood, 26);
  uint32_t refused = 0;
  for (int round = 0; round < 400; ++round) {
    std::string bytes = good;
    for (uint64_t flips = random() % 4; flips > 0; --flips) {
      bytes[random() % (bytes.size() - 26)] = static_cast<char>(random());
    }
    if (random() % 2 == 0) bytes.resize(random() % bytes.size());
    WriteText(path_, bytes);
    const auto file = SafetensorsFile::Open(path_);
    refused += !file.ok();
    if (!file.ok()) continue;
    for (const auto& [name, entry] : (*file)->entries()) {
      unsigned sum = 0;
      for (uint64_t i = 0; i < entry.end - entry.begin; ++i)
        sum += std::to_integer<unsigned>((*file)->data(entry)[i]);
      EXPECT_EQ(sum, 0x3cu * (entry.end - entry.begin)) << name;
    }
  }
  EXPECT_GT(refused, 200u);
}

class ShardedWeights : public ::testing::Test {
 protected:
  void SetUp() override {
    TinySpec spec;
    spec.shards = 3;
    WriteTinyModel(MakeTinyModel(spec), directory_.path());
  }
  std::string IndexError(const std::string& index) {
    WriteText(directory_ / "model.safetensors.index.json", index);
    const auto weights = WeightFiles::Open(directory_.path());
    return weights.ok() ? "" : weights.status().message();
  }
  TempDirectory directory_;
};

TEST_F(ShardedWeights, FindsEveryTensorInItsFile) {
  const auto weights = WeightFiles::Open(directory_.path());
  ASSERT_TRUE(weights.ok()) << weights.status().ToString();
  for (const auto& [name, tensor] : MakeTinyModel({}).tensors) {
    EXPECT_TRUE((*weights)->Find(name, tensor.shape).ok()) << name;
  }
}
TEST_F(ShardedWeights, IndexWithoutMap) { EXPECT_THAT(IndexError("{}"), HasSubstr("weight_map")); }
TEST_F(ShardedWeights, IndexIsNoJson) {
  EXPECT_THAT(IndexError("{\"weight"), HasSubstr("weight_map"));
}
TEST_F(ShardedWeights, ShardMissing) {
  EXPECT_THAT(IndexError(R"({"weight_map": {"x": "shard-9.safetensors"}})"),
              HasSubstr("shard-9.safetensors: cannot open"));
}
TEST_F(ShardedWeights, TensorNotWhereTheIndexSays) {
  EXPECT_THAT(IndexError(R"({"weight_map": {"x": "shard-1.safetensors"}})"),
              HasSubstr("'x' is said to be in shard-1.safetensors"));
}
TEST_F(ShardedWeights, IndexCannotLeaveTheDirectory) {
  EXPECT_THAT(IndexError(R"({"weight_map": {"x": "../../etc/passwd"}})"),
              HasSubstr("expected a plain file name"));
  EXPECT_THAT(IndexError(R"({"weight_map": {"x": 7}})"), HasSubstr("expected a plain file name"));
}

}  // namespace
}  // namespace icecache
