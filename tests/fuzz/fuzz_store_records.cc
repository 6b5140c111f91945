// What the cold store keeps: records of contexts and starts, rows and indexes of slices. What a decoder
// accepts is inside the limits, and is written as it was read.
#include <cmath>

#include "cacheserver/context/head_slice.h"
#include "cacheserver/context/manifest.h"
#include "common/limits.h"
#include "kernels/distance.h"
#include "tests/fuzz/fuzz_target.h"
#include "tests/fuzz/sealed.h"

namespace icecache::fuzz {
namespace {

constexpr size_t kLengthAt = 8;  // of a blob's header

template <typename Check>
std::function<void(const std::string&)> AsIsAndSealed(Check check) {
  return [check](const std::string& input) {
    check(input);
    check(Sealed(input, kLengthAt));
  };
}

SliceOptions Options() {
  SliceOptions options;
  options.segment = SegmentId(9);
  options.tenant = TenantId(1);
  options.head_dim = 32;
  return options;
}

void CheckContext(const std::string& blob) {
  const auto manifest = DecodeManifest(blob);
  if (!manifest.ok()) return;
  if (manifest->segments.empty() || manifest->segments.size() > limits::kSegmentsPerContextMax)
    Broken("a chain has segments, and not too many");
  const std::string again = EncodeManifest(*manifest);
  const auto twice = DecodeManifest(again);
  if (!twice.ok() || EncodeManifest(*twice) != again) Broken("a record is written as it was read");
}

void CheckStart(const std::string& blob) {
  const auto first_id = DecodeStartRecord(blob);
  if (first_id.ok() && EncodeStartRecord(*first_id) != blob)
    Broken("a record is written as it was read");
}

void CheckRows(const std::string& blob) {
  PagePool pool(16u << 20);
  const auto slice = HeadSlice::Restore(pool, Options(), blob);
  if (!slice.ok()) return;
  if ((*slice)->end() > limits::kContextTokensMax) Broken("positions are inside the limits");
  const auto again = HeadSlice::Restore(pool, Options(), (*slice)->SaveRows());
  if (!again.ok()) Broken("rows that were read can be written and read");
}

// A sealed slice of 300 tokens.
std::unique_ptr<HeadSlice> MakeSlice(PagePool& pool) {
  auto slice = std::make_unique<HeadSlice>(pool, Options());
  std::vector<float> values(300 * 32);
  for (size_t i = 0; i < values.size(); ++i) values[i] = std::sin(static_cast<float>(i * i % 1013));
  std::vector<std::byte> rows(values.size() * 2);
  FromF32(values.data(), values.size(), DType::kF16, rows.data());
  bool ok = slice->PutRows(0, {DType::kF16, 32, 300, rows.data(), rows.data()}).ok();
  auto job = slice->PrepareBuild(300, 4, 16, {});
  ok = ok && job.ok() && *job != nullptr;
  if (!ok) Broken("a slice can be filled");
  (*job)->Run();
  if (!slice->Install(std::move(*job)).ok() || !slice->Seal().ok()) Broken("a slice can be sealed");
  return slice;
}

struct SliceBlobs {
  std::string rows, index;
};
SliceBlobs MakeBlobs() {
  PagePool pool(16u << 20);
  const auto slice = MakeSlice(pool);
  return {slice->SaveRows(), slice->SaveIndex()};
}

void CheckIndex(const SliceBlobs& blobs, const std::string& blob) {
  auto index = HeadSlice::ParseIndex(Options(), blob);
  if (!index.ok()) return;
  PagePool pool(16u << 20);
  auto slice = HeadSlice::Restore(pool, Options(), blobs.rows);
  if (!slice.ok()) Broken("the seed's rows are good");
  if (!(*slice)->AdoptIndex(std::move(*index)).ok()) return;
  if ((*slice)->page_count() > 300) Broken("no more pages than tokens");
}

std::string ContextSeed() {
  ContextManifest manifest{.tenant = "alice",
                           .name = "doc",
                           .shape = {.layers = 2, .kv_heads = 2, .query_heads = 4, .head_dim = 32},
                           .model = "recall",
                           .sink_tokens = 4,
                           .window_tokens = 16};
  manifest.segments.push_back({SegmentId(9), "alice", 0, 284, 300});
  manifest.segments.push_back({SegmentId(11), "alice", 284, 400, 416});
  return EncodeManifest(manifest);
}

}  // namespace

std::vector<Target> Targets() {
  const SliceBlobs blobs = MakeBlobs();
  return {
      {"context", {ContextSeed()}, AsIsAndSealed(CheckContext)},
      {"start", {EncodeStartRecord(12345)}, AsIsAndSealed(CheckStart)},
      {"rows", {blobs.rows}, AsIsAndSealed(CheckRows)},
      {"index", {blobs.index},
       AsIsAndSealed([blobs](const std::string& blob) { CheckIndex(blobs, blob); })},
  };
}

}  // namespace icecache::fuzz
