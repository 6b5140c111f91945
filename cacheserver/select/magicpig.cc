#include "cacheserver/select/magicpig.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <random>

#include "cacheserver/select/arrival_policy.h"
#include "cacheserver/select/budget_choice.h"
#include "kernels/distance.h"

namespace icecache {
namespace {

constexpr uint32_t kTables = 150, kBits = 10, kBlock = 64;
constexpr uint32_t kNever = kTables + 1;

class MagicPig final : public ArrivalPolicy {
 public:
  explicit MagicPig(const PolicyOptions& options)
      : ArrivalPolicy(PolicyKind::kMagicPig, options, {.token = kTables * sizeof(uint16_t)}),
        projections_(size_t{kTables} * kBits * options.head_dim) {
    std::mt19937_64 rng(options.seed);
    std::normal_distribution<float> normal;
    for (float& x : projections_) x = normal(rng);
  }

  void Select(const SelectRequest& request, const PagedKv& kv, Selection* out) const override;
  void VisitCounters(const CounterVisitor& visit) const override {
    ArrivalPolicy::VisitCounters([&](std::string_view name, double value) {
      visit(name,
            name == "index_bytes" ? value + 4.0 * static_cast<double>(projections_.size()) : value);
    });
  }

 private:
  struct Scratch {
    std::vector<float> rank, weight;
    std::vector<uint16_t> codes;
    std::vector<uint8_t> second;  // [group][slots]: table of the second collision, from 1
    std::vector<uint32_t> slots;
    TokenReader reader;
  };

  void Learn(const TokenRows& rows, const BuildHints&) override {
    shared().assign(rows.head_dim, 0.0f);
    std::vector<double> sum(rows.head_dim, 0.0);
    std::vector<float> row(rows.head_dim);
    for (uint32_t t = 0; t < rows.count; ++t) {
      ToF32(rows.k + t * rows.row_bytes(), rows.dtype, rows.head_dim, row.data());
      for (uint32_t j = 0; j < rows.head_dim; ++j) sum[j] += row[j];
    }
    for (uint32_t j = 0; j < rows.head_dim; ++j)
      shared()[j] = static_cast<float>(sum[j] / rows.count);
  }
  void Encode(const TokenRows& rows, const BuildHints&, uint8_t* cells) override {
    if (shared().empty()) shared().assign(rows.head_dim, 0.0f);
    const uint32_t dim = rows.head_dim;
    std::vector<float> x(size_t{kBlock} * dim);
    for (uint32_t first = 0; first < rows.count; first += kBlock) {
      const uint32_t n = std::min(kBlock, rows.count - first);
      ToF32(rows.k + first * rows.row_bytes(), rows.dtype, size_t{n} * dim, x.data());
      for (size_t i = 0; i < size_t{n} * dim; ++i) x[i] -= shared()[i % dim];
      Hash(x.data(), n, reinterpret_cast<uint16_t*>(cells) + size_t{first} * kTables);
    }
  }
  std::string Wrong() const override {
    if (!shared().empty() && shared().size() != options().head_dim)
      return "the mean key has another size";
    if (tokens() > 0 && shared().empty()) return "there are codes and no mean key";
    return {};
  }

  // codes[count][kTables] of rows x[count, dim], count <= kBlock.
  void Hash(const float* x, uint32_t count, uint16_t* codes) const {
    std::fill(codes, codes + size_t{count} * kTables, uint16_t{0});
    float dots[kBits * kBlock];
    for (uint32_t l = 0; l < kTables; ++l) {
      DotRows(projections_.data() + size_t{l} * kBits * options().head_dim, kBits,
              reinterpret_cast<const std::byte*>(x), DType::kF32, count, options().head_dim, dots,
              kBlock);
      for (uint32_t b = 0; b < kBits; ++b)
        for (uint32_t t = 0; t < count; ++t)
          codes[size_t{t} * kTables + l] |= static_cast<uint16_t>((dots[b * kBlock + t] > 0) << b);
    }
  }

  static uint8_t SecondCollision(const uint16_t* token, const uint16_t* query) {
    uint32_t found = 0;
    for (uint32_t l = 0; l < kTables; ++l)
      if (token[l] == query[l] && ++found == 2) return static_cast<uint8_t>(l + 1);
    return kNever;
  }
  uint32_t Collide(const SelectRequest& request, const PagedKv& kv, Scratch* s) const;
  void Correct(const SelectRequest& request, const PagedKv& kv, uint32_t tables, Scratch* s) const;

  std::vector<float> projections_;  // [tables][bits][dim], from the seed
};

// Fills second, rank and weight; returns the number of tables whose sample keeps to the budget.
uint32_t MagicPig::Collide(const SelectRequest& request, const PagedKv& kv, Scratch* s) const {
  s->codes.resize(size_t{limits::kGroupMax} * kTables);
  Hash(request.queries, request.group, s->codes.data());
  s->second.assign(size_t{request.group} * slots(), kNever);
  s->rank.assign(slots(), -1.0f);
  s->weight.assign(slots(), 0.0f);
  std::vector<uint32_t> first_at(kTables + 2, 0);
  for (uint32_t p = 0; p < page_count(); ++p) {
    for (uint32_t r = 0; r < fill(p); ++r) {
      const uint32_t slot = p * limits::kPageTokens + r;
      uint8_t first = kNever;
      for (uint32_t h = 0; h < request.group; ++h) {
        const uint8_t at = SecondCollision(records<uint16_t>() + size_t{slot} * kTables,
                                           s->codes.data() + size_t{h} * kTables);
        s->second[size_t{h} * slots() + slot] = at;
        first = std::min(first, at);
      }
      if (first == kNever) continue;
      s->weight[slot] = 1.0f / static_cast<float>(first);
      s->rank[slot] = s->weight[slot];
      if (kv.pages[p].k != nullptr) ++first_at[first];
    }
  }
  uint32_t tables = 0, sampled = 0;
  while (tables < kTables &&
         sampled + first_at[tables + 1] <= request.max_pages * limits::kPageTokens)
    sampled += first_at[++tables];
  return tables;
}

// Logits -= log of each token's chance to be sampled; what a head did not sample leaves its sum.
void MagicPig::Correct(const SelectRequest& request, const PagedKv& kv, uint32_t tables,
                       Scratch* s) const {
  const uint32_t dim = options().head_dim;
  std::vector<float> row(dim);
  std::vector<double> norm(request.group), offset(request.group);
  for (uint32_t h = 0; h < request.group; ++h) {
    const float* q = request.queries + size_t{h} * dim;
    for (uint32_t j = 0; j < dim; ++j) {
      norm[h] += double{q[j]} * q[j];
      offset[h] += double{q[j]} * shared()[j];
    }
  }
  for (size_t i = 0; i < s->slots.size(); ++i) {
    const uint32_t slot = s->slots[i];
    ToF32(kv.pages[slot / limits::kPageTokens].k + (slot % limits::kPageTokens) * kv.row_bytes(),
          kv.dtype, dim, row.data());
    double length = 0;
    for (uint32_t j = 0; j < dim; ++j)
      length += (double{row[j]} - shared()[j]) * (double{row[j]} - shared()[j]);
    for (uint32_t h = 0; h < request.group; ++h) {
      float& logit = s->reader.logits(h)[i];
      if (s->second[size_t{h} * slots() + slot] > tables) {
        logit = kEmptyMax;
        continue;
      }
      const double scale = std::sqrt(length) * std::sqrt(norm[h]);
      const double cosine = scale > 0 ? (double{logit} - offset[h]) / scale : 0.0;
      const double angle = std::acos(std::clamp(cosine, -1.0, 1.0)) / std::numbers::pi;
      const double p = std::pow(1 - angle, kBits), miss = 1 - p;
      const double u = 1 - std::pow(miss, tables) - tables * p * std::pow(miss, tables - 1.0);
      logit -= static_cast<float>(std::log(std::clamp(u, 1e-6, 1.0)));
    }
  }
}

void MagicPig::Select(const SelectRequest& request, const PagedKv& kv, Selection* out) const {
  thread_local Scratch s;
  if (!Start(request, kv, out)) return;
  const uint32_t tables = Collide(request, kv, &s);
  if (!request.residual) return ChooseTokens(s.rank, s.weight, request, kv, out);
  s.slots.clear();
  double total = 0, sum = 0;
  for (uint32_t slot = 0; slot < slots(); ++slot) {
    total += s.weight[slot];
    if (s.rank[slot] < 0 || kv.pages[slot / limits::kPageTokens].k == nullptr) continue;
    if (s.rank[slot] < 1.0f / (static_cast<float>(tables) + 0.5f)) continue;
    s.slots.push_back(slot);
    sum += s.weight[slot];
  }
  s.reader.Read(request, kv, s.slots);
  Correct(request, kv, tables, &s);
  s.reader.AttendTo(kv, out->residual.ref());
  out->tokens_read = static_cast<uint32_t>(s.slots.size());
  out->covered_mass = total > 0 ? static_cast<float>(std::min(1.0, sum / total)) : 0.0f;
}

}  // namespace

std::unique_ptr<SelectionPolicy> MakeMagicPig(const PolicyOptions& options) {
  return std::make_unique<MagicPig>(options);
}

}  // namespace icecache
