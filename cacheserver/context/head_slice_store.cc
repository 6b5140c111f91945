// The stored form of a sealed HeadSlice. Two blobs besides its pages: its plain rows, which whoever
// opens the context wants at once, and its index, which the first selection wants.
#include <cstring>
#include <string>

#include "cacheserver/context/head_slice.h"
#include "cacheserver/store/blob.h"
#include "kernels/distance.h"

namespace icecache {
namespace {

constexpr BlobFormat kRowsFormat{0x53524349, 1, "stored rows of a slice"};    // "ICRS"
constexpr BlobFormat kIndexFormat{0x53494349, 1, "stored index of a slice"};  // "ICIS"

void PutView(BlobWriter& out, const RowsView& rows) {
  const size_t bytes = rows.rows.count * rows.rows.row_bytes();
  out.PutBytes({rows.rows.k, bytes});
  out.PutBytes({rows.rows.v, bytes});
}

template <typename T>
void PutList(BlobWriter& out, const std::vector<T>& values) {
  out.PutBytes(std::as_bytes(std::span(values)));
}

template <typename T>
std::vector<T> GetList(BlobReader& in, size_t count) {
  const std::span<const std::byte> bytes = in.GetBytes();
  if (bytes.size() != count * sizeof(T)) {
    in.Fail("a list has " + std::to_string(bytes.size()) + " bytes, expected " +
            std::to_string(count * sizeof(T)));
    return std::vector<T>(count);
  }
  std::vector<T> values(count);
  if (count > 0) std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

}  // namespace

std::string HeadSlice::SaveRows() const {
  KV_CHECK(sealed_);
  BlobWriter out(kRowsFormat);
  out.Put(static_cast<uint8_t>(options_.dtype));
  out.Put(options_.head_dim);
  out.Put(options_.first_position);
  out.Put(sink_count());
  out.Put(next_append_);
  out.Put(end());
  out.Put(next_version_);
  out.Put(static_cast<uint8_t>(built_count_.has_value()));
  out.Put(built_count_.value_or(0));
  PutView(out, sinks());
  PutView(out, tail());
  return out.Finish();
}

std::string HeadSlice::SaveIndex() const {
  KV_CHECK(sealed_ && index_loaded_);
  BlobWriter out(kIndexFormat);
  const uint32_t count = table_->page_count();
  std::vector<uint32_t> versions(count);
  std::vector<uint8_t> fills(count);
  std::vector<uint64_t> checksums(count);
  for (uint32_t p = 0; p < count; ++p) {
    const PageTable::PageName name = table_->name(PageId(p));
    versions[p] = name.version;
    fills[p] = static_cast<uint8_t>(name.fill);
    checksums[p] = name.checksum;
  }
  out.Put(count);
  PutList(out, versions);
  PutList(out, fills);
  PutList(out, checksums);
  std::string image;
  if (policy_) policy_->Save(&image);
  out.PutText(image);
  return out.Finish();
}

Result<std::unique_ptr<HeadSlice>> HeadSlice::Restore(PagePool& pool, const SliceOptions& options,
                                                      std::string_view rows) {
  BlobReader in(kRowsFormat, rows);
  const auto dtype = static_cast<DType>(in.Get<uint8_t>());
  const auto head_dim = in.Get<uint32_t>();
  const auto first = in.Get<uint32_t>();
  const auto sink_count = in.Get<uint32_t>();
  const auto next_append = in.Get<uint32_t>();
  const auto end = in.Get<uint32_t>();
  const auto next_version = in.Get<uint32_t>();
  const bool built = in.Get<uint8_t>() != 0;
  const auto built_count = in.Get<uint32_t>();
  const auto sinks_k = in.GetBytes(), sinks_v = in.GetBytes();
  const auto tail_k = in.GetBytes(), tail_v = in.GetBytes();
  KV_RETURN_IF_ERROR(in.Finish());
  if (dtype != options.dtype || head_dim != options.head_dim || first != options.first_position) {
    in.Fail("it is of another segment or model");
  } else if (sink_count > limits::kSinkTokensMax || first + sink_count > next_append ||
             next_append > end || end > limits::kContextTokensMax ||
             end - next_append > limits::kWindowTokensMax) {
    in.Fail("its positions are out of order");
  }
  KV_RETURN_IF_ERROR(in.status());
  auto slice = std::make_unique<HeadSlice>(pool, options);
  const auto take = [&](uint32_t count, std::span<const std::byte> k, std::span<const std::byte> v,
                        std::shared_ptr<RowBuffer>* out) -> Status {
    const size_t bytes = size_t{count} * head_dim * DTypeBytes(dtype);
    if (k.size() != bytes || v.size() != bytes) {
      return DataLoss("stored rows of a slice: rows are missing");
    }
    const size_t elements = size_t{count} * head_dim;
    if (!AllFinite(k.data(), dtype, elements) || !AllFinite(v.data(), dtype, elements))
      return DataLoss("stored rows of a slice: a number is NaN or infinite");
    if (count == 0) return OkStatus();
    *out = slice->NewRows();
    KV_RETURN_IF_ERROR((*out)->Reserve(count, true));
    return (*out)->Write(0, {dtype, head_dim, count, k.data(), v.data()});
  };
  KV_RETURN_IF_ERROR(take(sink_count, sinks_k, sinks_v, &slice->sinks_));
  KV_RETURN_IF_ERROR(take(end - next_append, tail_k, tail_v, &slice->tail_));
  slice->tail_first_ = slice->next_append_ = next_append;
  slice->next_version_ = next_version;
  // Sinks come from a build; cuts did not say so before.
  if (built || sink_count > 0) slice->built_count_ = built_count;
  slice->sealed_ = true;
  slice->index_loaded_ = next_append == first + sink_count;
  return slice;
}

Result<SliceIndex> HeadSlice::ParseIndex(const SliceOptions& options, std::string_view blob) {
  BlobReader in(kIndexFormat, blob);
  SliceIndex index;
  const auto count = in.Get<uint32_t>();
  if (count > limits::kContextTokensMax) in.Fail("it has more pages than a context has tokens");
  if (!in.status().ok()) return in.status();
  const std::vector<uint32_t> versions = GetList<uint32_t>(in, count);
  const std::vector<uint8_t> fills = GetList<uint8_t>(in, count);
  const std::vector<uint64_t> checksums = GetList<uint64_t>(in, count);
  const std::span<const std::byte> image = in.GetBytes();
  KV_RETURN_IF_ERROR(in.Finish());
  for (uint32_t p = 0; p < count; ++p) {
    if (fills[p] == 0 || fills[p] > limits::kPageTokens) {
      return DataLoss("stored index of a slice: page " + std::to_string(p) + " holds " +
                      std::to_string(fills[p]) + " rows");
    }
    index.pages.push_back({versions[p], fills[p], checksums[p]});
  }
  index.policy = MakePolicy(options.policy, {options.dtype, options.head_dim, options.seed});
  KV_RETURN_IF_ERROR(
      index.policy->Restore({reinterpret_cast<const char*>(image.data()), image.size()}));
  // The policy must know the pages by the same fills: it reads as many rows of each.
  std::vector<PageView> cold;
  for (const uint8_t fill : fills) cold.push_back({nullptr, nullptr, fill});
  if (const Status fits =
          index.policy->Validate({options.dtype, options.head_dim, count, cold.data()});
      !fits.ok())
    return DataLoss("stored index of a slice: " + fits.message());
  return index;
}

Status HeadSlice::AdoptIndex(SliceIndex index) {
  if (index_loaded_) return OkStatus();  // it came twice
  uint64_t tokens = 0;
  for (const PageTable::PageName& page : index.pages) {
    tokens += page.fill;
    if (page.version >= next_version_) return DataLoss("stored index: a page's version is too new");
  }
  double policy_pages = -1;
  index.policy->VisitCounters([&](std::string_view name, double value) {
    if (name == "pages") policy_pages = value;
  });
  if (tokens != indexed_count() || policy_pages != static_cast<double>(index.pages.size())) {
    return DataLoss("stored index of a slice: " + std::to_string(index.pages.size()) +
                    " pages with " + std::to_string(tokens) + " tokens, the slice has " +
                    std::to_string(indexed_count()) + " tokens");
  }
  table_->RestoreCold(index.pages);
  policy_ = std::move(index.policy);
  index_loaded_ = true;
  return OkStatus();
}

}  // namespace icecache
