// What is recorded is what the model computes, whether it reads or writes.
#include "worker/serve/dump_trace.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "worker/trace_file.h"

namespace icecache {
namespace {

struct Dumped {
  TraceExtent extent;
  std::vector<TraceSlice> slices;
};

Dumped Dump(uint32_t prompt_tokens, uint32_t new_tokens, uint32_t queries) {
  const char* source = std::getenv("ICECACHE_SOURCE_DIR");
  DumpTraceOptions options;
  options.worker.model = std::string(source == nullptr ? "." : source) + "/tests/models/recall";
  options.worker.threads = 1;
  options.prompt = "everyone is permitted to copy and distribute verbatim copies of this license";
  options.prompt_tokens = prompt_tokens;
  options.new_tokens = new_tokens;
  options.queries = queries;
  options.out = testing::TempDir() + "/dump_trace_test.ickv";
  const Status status = RunDumpTrace(options);
  EXPECT_TRUE(status.ok()) << status.ToString();
  Dumped dumped;
  auto reader = TraceReader::Open(options.out);
  EXPECT_TRUE(reader.ok()) << reader.status().ToString();
  if (!reader.ok()) return dumped;
  dumped.extent = reader->extent();
  for (uint16_t l = 0; l < dumped.extent.shape.layers; ++l) {
    for (uint16_t h = 0; h < dumped.extent.shape.kv_heads; ++h) {
      auto slice = reader->Read(LayerId(l), KvHeadId(h));
      EXPECT_TRUE(slice.ok()) << slice.status().ToString();
      if (slice.ok()) dumped.slices.push_back(std::move(slice).value());
    }
  }
  std::remove(options.out.c_str());
  return dumped;
}

// Largest difference of two rows of halves, relative to the largest value of the first.
float RowDifference(const std::byte* a, const std::byte* b, uint32_t count) {
  float difference = 0, largest = 1e-6f;
  for (uint32_t i = 0; i < count; ++i) {
    uint16_t x, y;
    std::memcpy(&x, a + 2 * i, 2);
    std::memcpy(&y, b + 2 * i, 2);
    difference = std::max(difference, std::fabs(F16ToF32(x) - F16ToF32(y)));
    largest = std::max(largest, std::fabs(F16ToF32(x)));
  }
  return difference / largest;
}

// Written tokens follow a prompt of 40: their rows must lie where rows of positions 40 .. 59 belong
// and what comes before must equal what the prompt alone gives.
TEST(DumpTrace, WhatIsWrittenFollowsWhatWasRead) {
  const Dumped prompt = Dump(40, 0, 16), longer = Dump(40, 21, 36);
  ASSERT_EQ(prompt.extent.tokens, 40u);
  ASSERT_EQ(longer.extent.tokens, 60u) << "the last token written is never fed";
  ASSERT_EQ(longer.slices.size(), 8u);
  const size_t row = longer.extent.shape.row_bytes();
  const size_t q_row = size_t{longer.extent.shape.group()} * longer.extent.shape.head_dim;
  for (size_t s = 0; s < 8; ++s) {
    for (uint32_t t = 0; t < 40; ++t) {
      EXPECT_LT(RowDifference(prompt.slices[s].k.data() + t * row,
                              longer.slices[s].k.data() + t * row, 64),
                1e-3f);
    }
    for (size_t i = 0; i < 16 * q_row; ++i)  // positions 24 .. 39 of both
      ASSERT_NEAR(prompt.slices[s].queries[i], longer.slices[s].queries[i], 1e-3f);
    for (uint32_t t = 40; t < 60; ++t) {
      const std::byte* k = longer.slices[s].k.data() + t * row;
      EXPECT_TRUE(std::any_of(k, k + row, [](std::byte b) { return b != std::byte{0}; }));
    }
    const float* written = longer.slices[s].queries.data() + 16 * q_row;
    EXPECT_TRUE(
        std::any_of(written + 19 * q_row, written + 20 * q_row, [](float x) { return x != 0; }));
  }
}

// The same tokens, read in one go: text that repeats itself is its own continuation.
TEST(DumpTrace, LongerTextBeginsAlike) {
  const Dumped few = Dump(50, 0, 50), many = Dump(80, 0, 80);
  const size_t row = few.extent.shape.row_bytes();
  for (size_t s = 0; s < 8; ++s)
    for (uint32_t t = 0; t < 50; ++t)
      EXPECT_LT(
          RowDifference(few.slices[s].v.data() + t * row, many.slices[s].v.data() + t * row, 64),
          1e-3f);
}

TEST(DumpTrace, AsksForExactlyOneText) {
  DumpTraceOptions options;
  const char* source = std::getenv("ICECACHE_SOURCE_DIR");
  options.worker.model = std::string(source == nullptr ? "." : source) + "/tests/models/recall";
  options.out = testing::TempDir() + "/dump_trace_test.ickv";
  EXPECT_EQ(RunDumpTrace(options).code(), StatusCode::kInvalidArgument);
  options.prompt = "a";
  options.prompt_file = "b";
  EXPECT_EQ(RunDumpTrace(options).code(), StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace icecache
