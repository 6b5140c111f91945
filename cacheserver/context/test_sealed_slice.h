// For tests and fuzz programs: a sealed slice of rows that are a function of nothing, for what is
// stored of one.
#pragma once

#include <cmath>
#include <memory>
#include <vector>

#include "cacheserver/context/head_slice.h"
#include "kernels/distance.h"

namespace icecache {

inline constexpr uint32_t kSealedSliceDim = 32, kSealedSliceSinks = 4, kSealedSliceWindow = 16;

inline SliceOptions SealedSliceOptions() {
  SliceOptions options;
  options.segment = SegmentId(9);
  options.tenant = TenantId(1);
  options.head_dim = kSealedSliceDim;
  return options;
}

inline std::unique_ptr<HeadSlice> MakeSealedSlice(PagePool& pool, uint32_t tokens) {
  auto slice = std::make_unique<HeadSlice>(pool, SealedSliceOptions());
  std::vector<float> values(size_t{tokens} * kSealedSliceDim);
  for (size_t i = 0; i < values.size(); ++i) values[i] = std::sin(static_cast<float>(i * i % 1013));
  std::vector<std::byte> rows(values.size() * DTypeBytes(DType::kF16));
  FromF32(values.data(), values.size(), DType::kF16, rows.data());
  KV_CHECK(
      slice->PutRows(0, {DType::kF16, kSealedSliceDim, tokens, rows.data(), rows.data()}).ok());
  auto job = slice->PrepareBuild(tokens, kSealedSliceSinks, kSealedSliceWindow, {}).value();
  job->Run();
  KV_CHECK(slice->Install(std::move(job)).ok());
  KV_CHECK(slice->Seal().ok());
  return slice;
}

}  // namespace icecache
