#include "cacheserver/select/pqcache.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "cacheserver/select/arrival_policy.h"
#include "cacheserver/select/budget_choice.h"
#include "kernels/distance.h"
#include "kernels/nearest.h"

namespace icecache {
namespace {

constexpr uint32_t kParts = 2, kCodes = 64, kPasses = 10;
constexpr uint32_t kTrainTokens = 256 * kCodes;
constexpr float kLargest = 1e15f;  // squares of sub-vectors stay finite

class PqCache final : public ArrivalPolicy {
 public:
  explicit PqCache(const PolicyOptions& options)
      : ArrivalPolicy(PolicyKind::kPqCache, options, {.token = kParts}),
        part_(options.head_dim / kParts),
        width_((part_ + 15) / 16 * 16) {}

  void Select(const SelectRequest& request, const PagedKv& kv, Selection* out) const override;

 private:
  // Half `part` of each row, padded to a width that kernels take: x[count, width_].
  void Load(const TokenRows& rows, uint32_t part, std::vector<float>* x) const {
    std::vector<float> row(rows.head_dim);
    x->assign(size_t{rows.count} * width_, 0.0f);
    for (uint32_t t = 0; t < rows.count; ++t) {
      ToF32(rows.k + t * rows.row_bytes(), rows.dtype, rows.head_dim, row.data());
      for (uint32_t j = 0; j < part_; ++j)
        (*x)[size_t{t} * width_ + j] = std::clamp(row[part * part_ + j], -kLargest, kLargest);
    }
  }
  const float* codebook(uint32_t part) const {
    return shared().data() + size_t{part} * kCodes * width_;
  }

  void Learn(const TokenRows& rows, const BuildHints& hints) override;
  void Encode(const TokenRows& rows, const BuildHints& hints, uint8_t* cells) override;
  std::string Wrong() const override {
    if (!shared().empty() && shared().size() != size_t{kParts} * kCodes * width_)
      return "the codebooks have another size";
    if (tokens() > 0 && shared().empty()) return "there are codes and no codebooks";
    for (size_t i = 0; i < size_t{slots()} * kParts; ++i)
      if (records<uint8_t>()[i] >= kCodes) return "a code is out of range";
    return {};
  }

  const uint32_t part_, width_;
};

void PqCache::Learn(const TokenRows& rows, const BuildHints&) {
  shared().assign(size_t{kParts} * kCodes * width_, 0.0f);
  std::vector<float> x;
  std::vector<uint32_t> ids, nearest;
  // Tokens spread evenly over the build.
  const uint32_t train = std::min(rows.count, kTrainTokens);
  for (uint32_t i = 0; i < train; ++i)
    ids.push_back(static_cast<uint32_t>(uint64_t{i} * rows.count / train));
  nearest.resize(train);
  for (uint32_t part = 0; part < kParts; ++part) {
    Load(rows, part, &x);
    float* codes = shared().data() + size_t{part} * kCodes * width_;
    for (uint32_t c = 0; c < kCodes; ++c)
      std::copy_n(x.data() + size_t{ids[uint64_t{c} * train / kCodes]} * width_, width_,
                  codes + size_t{c} * width_);
    const RowTable table{x.data(), width_, ids.data()};
    CentroidPanels panels;
    std::vector<float> sums(size_t{kCodes} * width_);
    for (uint32_t pass = 0; pass < kPasses; ++pass) {
      panels.Assign(codes, kCodes, width_);
      Nearest(panels, table, train, nearest.data(), nullptr);
      std::fill(sums.begin(), sums.end(), 0.0f);
      AddRowsByIndex(table, train, width_, nearest.data(), sums.data());
      std::vector<uint32_t> sizes(kCodes, 0);
      for (const uint32_t c : nearest) ++sizes[c];
      for (uint32_t c = 0; c < kCodes; ++c) {
        if (sizes[c] == 0) continue;
        for (uint32_t j = 0; j < width_; ++j)
          codes[size_t{c} * width_ + j] =
              sums[size_t{c} * width_ + j] / static_cast<float>(sizes[c]);
      }
    }
  }
}

void PqCache::Encode(const TokenRows& rows, const BuildHints& hints, uint8_t* cells) {
  if (shared().empty()) Learn(rows, hints);  // the first token of an empty slice
  std::vector<float> x;
  std::vector<uint32_t> nearest(rows.count);
  for (uint32_t part = 0; part < kParts; ++part) {
    Load(rows, part, &x);
    CentroidPanels panels;
    panels.Assign(codebook(part), kCodes, width_);
    Nearest(panels, {x.data(), width_, nullptr}, rows.count, nearest.data(), nullptr);
    for (uint32_t t = 0; t < rows.count; ++t)
      cells[t * kParts + part] = static_cast<uint8_t>(nearest[t]);
  }
}

void PqCache::Select(const SelectRequest& request, const PagedKv& kv, Selection* out) const {
  thread_local std::vector<float> queries, table, logits, rank;
  if (!Start(request, kv, out)) return;
  const uint32_t group = request.group;
  table.resize(size_t{kParts} * group * kCodes);
  for (uint32_t part = 0; part < kParts; ++part) {
    queries.assign(size_t{group} * width_, 0.0f);
    for (uint32_t h = 0; h < group; ++h)
      std::copy_n(request.queries + size_t{h} * options().head_dim + part * part_, part_,
                  queries.data() + size_t{h} * width_);
    DotRows(queries.data(), group, reinterpret_cast<const std::byte*>(codebook(part)), DType::kF32,
            kCodes, width_, table.data() + size_t{part} * group * kCodes, kCodes);
  }
  logits.assign(size_t{group} * slots(), kEmptyMax);
  for (uint32_t h = 0; h < group; ++h) {
    const float* first = table.data() + size_t{h} * kCodes;
    const float* second = first + size_t{group} * kCodes;
    float* x = logits.data() + size_t{h} * slots();
    const uint8_t* codes = records<uint8_t>();
    for (uint32_t p = 0; p < page_count(); ++p) {
      for (uint32_t r = 0; r < fill(p); ++r) {
        const uint32_t slot = p * limits::kPageTokens + r;
        x[slot] = SaturatedLogit(first[codes[2 * slot]] + second[codes[2 * slot + 1]]);
      }
    }
  }
  RankUnits(request, request.rank, logits, &rank);
  ChooseTokens(rank, {}, request, kv, out);
}

}  // namespace

std::unique_ptr<SelectionPolicy> MakePqCache(const PolicyOptions& options) {
  return std::make_unique<PqCache>(options);
}

}  // namespace icecache
