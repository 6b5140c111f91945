// The file between a model and the benchmarks: exact, readable slice by slice, and refused when it
// is damaged in any way.
#include "worker/trace_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <cstring>
#include <filesystem>
#include <limits>

namespace icecache {
namespace {

using ::testing::HasSubstr;

class TraceFile : public ::testing::Test {
 protected:
  const TraceExtent extent_{{3, 2, 4, 16, DType::kF16}, 20, 8};
  const std::string path_ = testing::TempDir() + "/trace_file_test.ickv";

  ~TraceFile() override { std::remove(path_.c_str()); }

  // Row bytes that differ in every slice, token and half.
  std::vector<std::byte> Rows(uint32_t slice, uint32_t first, uint32_t count, int half) const {
    std::vector<std::byte> rows(count * extent_.shape.row_bytes());
    for (size_t i = 0; i < rows.size() / 2; ++i) {
      const uint16_t x = F32ToF16(static_cast<float>(slice + half * 10) +
                                  0.01f * static_cast<float>(first * 16 + i));
      std::memcpy(rows.data() + 2 * i, &x, 2);
    }
    return rows;
  }
  std::vector<float> Queries(uint32_t slice, uint32_t first, uint32_t count) const {
    std::vector<float> queries(count * 2 * 16);
    for (size_t i = 0; i < queries.size(); ++i)
      queries[i] = static_cast<float>(slice * 10000 + first * 32 + i);
    return queries;
  }
  // In two blocks, as a prompt and what was written after it.
  Status Write(bool finish = true) const {
    KV_ASSIGN_OR_RETURN(TraceWriter writer, TraceWriter::Create(path_, extent_));
    for (uint16_t slice = 0; slice < 6; ++slice) {
      for (const auto& [first, count] : {std::pair{0u, 15u}, std::pair{15u, 5u}}) {
        const auto k = Rows(slice, first, count, 0), v = Rows(slice, first, count, 1);
        const TokenRows rows{DType::kF16, 16, count, k.data(), v.data()};
        const LayerId layer(slice / 2);
        const KvHeadId head(slice % 2);
        KV_RETURN_IF_ERROR(writer.WriteRows(layer, head, TokenPos(first), rows));
        KV_RETURN_IF_ERROR(
            writer.WriteQueries(layer, head, TokenPos(first), Queries(slice, first, count)));
      }
    }
    return finish ? writer.Finish() : OkStatus();
  }
  void Overwrite(size_t offset, uint32_t value) const {
    std::FILE* file = std::fopen(path_.c_str(), "r+b");
    ASSERT_NE(file, nullptr);
    std::fseek(file, static_cast<long>(offset), SEEK_SET);
    std::fwrite(&value, sizeof(value), 1, file);
    std::fclose(file);
  }
};

TEST_F(TraceFile, SlicesReadBackAlone) {
  ASSERT_TRUE(Write().ok());
  auto reader = TraceReader::Open(path_);
  ASSERT_TRUE(reader.ok()) << reader.status().ToString();
  EXPECT_EQ(reader->extent().shape, extent_.shape);
  for (const uint16_t slice : {5, 0, 3}) {
    const auto read = reader->Read(LayerId(slice / 2), KvHeadId(slice % 2));
    ASSERT_TRUE(read.ok()) << read.status().ToString();
    EXPECT_EQ(read->k, Rows(slice, 0, 20, 0));
    EXPECT_EQ(read->v, Rows(slice, 0, 20, 1));
    EXPECT_EQ(read->queries, Queries(slice, 12, 8)) << "the last eight positions";
  }
  EXPECT_EQ(reader->Read(LayerId(3), KvHeadId(0)).status().code(), StatusCode::kOutOfRange);
  EXPECT_EQ(reader->Read(LayerId(0), KvHeadId(2)).status().code(), StatusCode::kOutOfRange);
}

TEST_F(TraceFile, InterruptedDumpIsNoTrace) {
  ASSERT_TRUE(Write(false).ok());
  const Status status = TraceReader::Open(path_).status();
  EXPECT_EQ(status.code(), StatusCode::kDataLoss);
  EXPECT_THAT(status.message(), HasSubstr("not finished"));
}

TEST_F(TraceFile, EveryWordOfTheHeaderIsChecked) {
  for (size_t word = 0; word < 16; ++word) {
    for (const uint32_t value : {0xffffffffu, 3u << 20, 7u}) {
      ASSERT_TRUE(Write().ok());
      Overwrite(4 * word, value);
      const Status status = TraceReader::Open(path_).status();
      // Word 1 is the version, and these are newer ones.
      EXPECT_EQ(status.code(), word == 1 ? StatusCode::kFailedPrecondition : StatusCode::kDataLoss)
          << "word " << word << " = " << value;
      EXPECT_THAT(status.message(), HasSubstr(path_));
    }
  }
}

TEST_F(TraceFile, WrongSizeIsRefused) {
  ASSERT_TRUE(Write().ok());
  const auto bytes = std::filesystem::file_size(path_);
  for (const auto size : {bytes - 1, bytes + 1, uintmax_t{64}, uintmax_t{63}, uintmax_t{0}}) {
    std::filesystem::resize_file(path_, size);
    EXPECT_EQ(TraceReader::Open(path_).status().code(), StatusCode::kDataLoss) << size;
  }
}

TEST_F(TraceFile, NumbersThatAreNoneAreRefused) {
  ASSERT_TRUE(Write().ok());
  Overwrite(64 + 40, 0x7e007e00);  // two half-precision NaNs in the first slice
  auto reader = TraceReader::Open(path_);
  ASSERT_TRUE(reader.ok());
  EXPECT_EQ(reader->Read(LayerId(0), KvHeadId(0)).status().code(), StatusCode::kDataLoss);
  EXPECT_TRUE(reader->Read(LayerId(0), KvHeadId(1)).ok()) << "only that slice";
}

TEST_F(TraceFile, WriterRefusesWhatCannotBe) {
  TraceExtent extent = extent_;
  extent.query_count = 21;
  EXPECT_EQ(TraceWriter::Create(path_, extent).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(TraceWriter::Create(testing::TempDir() + "/no/such/folder", extent_).status().code(),
            StatusCode::kUnavailable);
}

}  // namespace
}  // namespace icecache
