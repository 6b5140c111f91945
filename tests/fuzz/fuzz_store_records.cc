// What the cold store keeps: records of contexts and starts, rows and indexes of slices. What a
// decoder accepts is inside the limits, and is written as it was read.
#include <functional>
#include <span>
#include <vector>

#include "cacheserver/context/manifest.h"
#include "cacheserver/context/test_sealed_slice.h"
#include "common/limits.h"
#include "kernels/attention.h"
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

constexpr uint32_t kTokens = 300;

void CheckRows(const std::string& blob) {
  PagePool pool(16u << 20);
  const auto slice = HeadSlice::Restore(pool, SealedSliceOptions(), blob);
  if (!slice.ok()) return;
  if ((*slice)->end() > limits::kContextTokensMax) Broken("positions are inside the limits");
  if (!(*slice)->Validate().ok()) Broken("rows that were read make a slice");
  const auto again = HeadSlice::Restore(pool, SealedSliceOptions(), (*slice)->SaveRows());
  if (!again.ok()) Broken("rows that were read can be written and read");
}

struct StoredSlice {
  std::string rows, index;
  std::vector<std::string> pages;
};
StoredSlice Store() {
  PagePool pool(16u << 20);
  const auto slice = MakeSealedSlice(pool, kTokens);
  StoredSlice stored{slice->SaveRows(), slice->SaveIndex(), {}};
  for (uint32_t p = 0; p < slice->page_count(); ++p) {
    stored.pages.emplace_back();
    slice->table().AppendStored(PageId(p), &stored.pages.back());
  }
  return stored;
}

// Brings the pages that the index names by their checksums; true: all of them.
bool LoadPages(HeadSlice& slice, const StoredSlice& stored) {
  bool all = slice.page_count() == stored.pages.size();
  for (uint32_t p = 0; p < slice.page_count() && p < stored.pages.size(); ++p) {
    if (!slice.table().BeginLoad(PageId(p)).ok()) Broken("there is memory for the pages");
    const bool good =
        slice.table().FillLoading(PageId(p), std::as_bytes(std::span(stored.pages[p]))).ok();
    slice.table().EndLoad(PageId(p), good);
    all = all && good;
  }
  return all;
}

void Ask(const HeadSlice& slice) {
  const std::vector<float> query(kSealedSliceDim, 0.25f);
  const auto attention = MakeReferenceAttention();
  Selection selection;
  slice.Select({.queries = query.data(), .group = 1, .max_pages = 4, .read_cap = 64}, *attention,
               &selection);
  if (selection.pages.size() > 4) Broken("never more pages than asked for");
}

void CheckIndex(const StoredSlice& stored, const std::string& blob) {
  auto index = HeadSlice::ParseIndex(SealedSliceOptions(), blob);
  if (!index.ok()) return;
  PagePool pool(16u << 20);
  auto slice = HeadSlice::Restore(pool, SealedSliceOptions(), stored.rows);
  if (!slice.ok()) Broken("the seed's rows are good");
  if (!(*slice)->AdoptIndex(std::move(*index)).ok()) return;
  if ((*slice)->page_count() > kTokens) Broken("no more pages than tokens");
  Ask(**slice);
  const bool whole = LoadPages(**slice, stored);
  Ask(**slice);
  if (!HeadSlice::ParseIndex(SealedSliceOptions(), (*slice)->SaveIndex()).ok())
    Broken("an index that was read can be written and read");
  if (!whole) return;
  const auto cut = HeadSlice::Cut(**slice, SealedSliceOptions(), kTokens / 2, {});
  if (!cut.ok()) Broken("a slice whose pages are there can be cut");
  Ask(**cut);
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
  const StoredSlice stored = Store();
  return {
      {"context", {ContextSeed()}, AsIsAndSealed(CheckContext)},
      {"start", {EncodeStartRecord(12345)}, AsIsAndSealed(CheckStart)},
      {"rows", {stored.rows}, AsIsAndSealed(CheckRows)},
      {"index", {stored.index}, AsIsAndSealed([stored](const std::string& blob) {
         CheckIndex(stored, blob);
       })},
  };
}

}  // namespace icecache::fuzz
