// Content packing: which tokens share a page, which pages a super.
//
//   parts    a slice over 128k tokens is first divided among coarse centroids, which bounds memory
//            and keeps the cost per token level
//   seeds    one small cluster per 24 tokens, grouped in supers bottom-up, so that no super border
//            cuts a seed's cluster; tokens try the seeds of their nearest supers, first half of
//            them and few supers, at last all and many
//   pages    clusters over a page are bisected with cuts at multiples of a page; what is left of
//            each is merged nearest first within its super
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "kernels/packing_points.h"
#include "kernels/quantized.h"

namespace icecache::packing {

namespace {

constexpr uint32_t kPartTokens = 131072;
constexpr uint32_t kPartCells =
    32;  // coarse centroids per part; few ones have more borders through clusters
constexpr uint32_t kPartCellsMax = 160;
constexpr uint32_t kPartSample = 64;  // tokens per coarse centroid to train it on
constexpr uint32_t kSeedTokens = 24;
constexpr uint32_t kSuperSeeds = 24;
constexpr uint32_t kSuperSeedsMax = 32;
// Supers a token tries, pass by pass. Early passes only need to move seeds roughly into place. From
// {3, 3} to this: coverage of the top 16 on `weak` .55 / .60 / .66 -> .66 / .77 / .74.
constexpr uint32_t kProbedSupers[] = {4, 6, 10};
constexpr uint32_t kSuperTokensMin = 256;  // smaller supers join others
constexpr uint32_t kSuperTokensMax = 48 * kPageRows;
constexpr uint32_t kSequentialSuperPages = 32;
constexpr uint32_t kFullEnough = 14;  // a page's worth: not mixed with strangers to fill up

// Seeds of one part and the supers that group them.
struct Seeds {
  ScratchVector<float> means;  // [count, dim]
  Points points;               // the same
  std::vector<uint32_t> super_of;
  ScratchVector<float> supers;  // [super_count, dim]

  uint32_t dim() const { return points.dim; }
  uint32_t count() const { return points.count(); }
  uint32_t super_count() const { return static_cast<uint32_t>(supers.size() / dim()); }
  const float* mean(size_t seed) const { return means.data() + seed * dim(); }
};

// Divides seeds among supers anew. K-means leaves some groups large, and large ones attract most
// probes, so they are cut: the cost of a probe is bounded by kSuperSeedsMax.
void Regroup(Seeds* seeds, Rng& rng) {
  const uint32_t dim = seeds->dim();
  const uint32_t supers = std::max(1u, seeds->count() / kSuperSeeds);
  BytePanels panels;
  panels.Assign(TrainCentroids(seeds->points, supers, rng).data(), supers, dim);
  seeds->super_of.resize(seeds->count());
  Nearest(panels, seeds->points.table(), seeds->count(), seeds->super_of.data(), nullptr);
  Bisector bisector(seeds->points);
  seeds->supers.clear();
  const auto add = [&](std::span<uint32_t> group, const auto& self) -> void {
    if (group.size() > kSuperSeedsMax) {
      const uint32_t left = bisector.Divide(group, kBlockRows);
      self(group.first(left), self);
      self(group.subspan(left), self);
      return;
    }
    ScratchVector<float>& x = seeds->supers;
    const size_t at = x.size();
    x.resize(at + dim, 0.0f);
    for (uint32_t seed : group) {
      seeds->super_of[seed] = static_cast<uint32_t>(at / dim);
      for (uint32_t j = 0; j < dim; ++j) {
        x[at + j] += seeds->mean(seed)[j] / static_cast<float>(group.size());
      }
    }
  };
  Groups groups = Group(seeds->super_of, supers);
  for (size_t g = 0; g < groups.size(); ++g) {
    if (!groups[g].empty()) add(groups[g], add);
  }
}

// For each super the rows that have it among their nearest.
Result<Groups> ProbedBy(std::span<const uint32_t> rows, const Seeds& seeds, uint32_t probes,
                        PointAssigner& assigner) {
  probes = std::min(probes, seeds.super_count());
  ScratchVector<uint32_t> nearest(rows.size() * probes);
  const AssignTask task{rows, seeds.supers.data(), seeds.super_count(), probes, nearest.data()};
  KV_RETURN_IF_ERROR(assigner.Assign({&task, 1}));
  return Group(nearest, seeds.super_count(), rows, probes);
}

// seed_of[row] = the nearest seed of the row's `probes` nearest supers, for the rows given.
Status AssignSeeds(const Points& points, std::span<const uint32_t> rows, const Seeds& seeds,
                   uint32_t probes, PointAssigner& assigner, ScratchVector<uint32_t>* seed_of) {
  KV_ASSIGN_OR_RETURN(const Groups probed, ProbedBy(rows, seeds, probes, assigner));
  const Groups members = Group(seeds.super_of, seeds.super_count());
  // All supers' tasks at once; room first, since tasks point into it.
  ScratchVector<float> centroids, score(probed.members.size());
  ScratchVector<uint32_t> nearest(probed.members.size());
  centroids.reserve(seeds.means.size());
  std::vector<AssignTask> tasks;
  std::vector<size_t> super_of_task;
  for (size_t s = 0; s < members.size(); ++s) {
    if (members[s].empty() || probed[s].empty()) continue;
    tasks.push_back({probed[s], centroids.data() + centroids.size(),
                     static_cast<uint32_t>(members[s].size()), 1, nearest.data() + probed.begin[s],
                     score.data() + probed.begin[s]});
    super_of_task.push_back(s);
    for (const uint32_t seed : members[s]) {
      centroids.insert(centroids.end(), seeds.mean(seed), seeds.mean(seed) + points.dim);
    }
  }
  KV_RETURN_IF_ERROR(assigner.Assign(tasks));
  ScratchVector<float> best(points.count(), std::numeric_limits<float>::lowest());
  for (size_t t = 0; t < tasks.size(); ++t) {
    const std::span<const uint32_t> of_super = members[super_of_task[t]];
    for (size_t i = 0; i < tasks[t].rows.size();
         ++i) {  // no branch: one in five would be guessed wrong
      const uint32_t row = tasks[t].rows[i], seed = of_super[tasks[t].best[i]];
      const bool better = tasks[t].score[i] > best[row];
      best[row] = better ? tasks[t].score[i] : best[row];
      (*seed_of)[row] = better ? seed : (*seed_of)[row];
    }
  }
  return OkStatus();
}

// Moves every seed to the mean of its rows; one without rows stays.
void MoveSeeds(const Points& points, std::span<const uint32_t> rows,
               const ScratchVector<uint32_t>& seed_of, Seeds* seeds) {
  const uint32_t dim = points.dim;
  std::vector<uint32_t> sizes(seeds->count(), 0);
  ScratchVector<uint32_t> into(rows.size());
  ScratchVector<float> sums(seeds->means.size(), 0.0f);
  for (size_t i = 0; i < rows.size(); ++i) into[i] = seed_of[rows[i]];
  for (uint32_t seed : into) ++sizes[seed];
  AddPointsByIndex(points.table(rows.data()), rows.size(), into.data(), sums.data());
  for (uint32_t s = 0; s < seeds->count(); ++s) {
    if (sizes[s] == 0) continue;
    const float share = 1.0f / static_cast<float>(sizes[s]);
    for (uint32_t j = 0; j < dim; ++j) {
      seeds->means[size_t{s} * dim + j] = sums[size_t{s} * dim + j] * share;
    }
  }
  seeds->points.Encode(seeds->means);
}

// Clusters of a part: the rows of each seed.
Result<Groups> Cluster(const Points& points, PointAssigner& assigner, Rng& rng, Seeds* seeds) {
  const uint32_t n = points.count();
  const uint32_t count = std::max(1u, n / kSeedTokens);
  seeds->means.resize(size_t{count} * points.dim);
  ScratchVector<uint32_t> all(n), half((n + 1) / 2), seed_of(n, 0u);
  std::iota(all.begin(), all.end(), 0u);
  for (uint32_t i = 0; i < half.size(); ++i) half[i] = 2 * i;
  for (uint32_t i = 0; i < count; ++i) {
    const size_t low = size_t{i} * n / count;
    const size_t high = std::max(low + 1, size_t{i + 1} * n / count);
    points.Decode(low + rng() % (high - low), seeds->means.data() + size_t{i} * points.dim);
  }
  seeds->points.dim = points.dim;
  seeds->points.Encode(seeds->means);
  KV_RETURN_IF_ERROR(assigner.Load(points.table(), n));
  for (const uint32_t probes : kProbedSupers) {
    const ScratchVector<uint32_t>& rows = probes == kProbedSupers[0] ? half : all;
    Regroup(seeds, rng);
    KV_RETURN_IF_ERROR(AssignSeeds(points, rows, *seeds, probes, assigner, &seed_of));
    MoveSeeds(points, rows, seed_of, seeds);
  }
  return Group(seed_of, count);
}

// Groups of seeds, each of at most kSuperTokensMax tokens, that will be supers.
class SuperPlanner {
 public:
  SuperPlanner(const Seeds& seeds, const Groups& clusters)
      : seeds_(seeds), clusters_(clusters), bisector_(seeds.points) {}

  std::vector<std::vector<uint32_t>> Run() {
    Groups groups = Group(seeds_.super_of, seeds_.super_count());
    for (size_t g = 0; g < groups.size(); ++g) {
      const auto empty =
          std::ranges::remove_if(groups[g], [&](uint32_t seed) { return clusters_[seed].empty(); });
      const auto kept = groups[g].first(groups[g].size() - empty.size());
      if (!kept.empty()) Split(kept);
    }
    JoinSmall();
    return std::move(groups_);
  }

 private:
  uint32_t Tokens(std::span<const uint32_t> group) const {
    uint32_t tokens = 0;
    for (uint32_t seed : group) tokens += static_cast<uint32_t>(clusters_[seed].size());
    return tokens;
  }

  void Split(std::span<uint32_t> group) {
    if (Tokens(group) <= kSuperTokensMax || group.size() == 1) {
      groups_.emplace_back(group.begin(), group.end());
      return;
    }
    const uint32_t left = bisector_.Divide(group, 0);
    Split(group.first(left));
    Split(group.subspan(left));
  }

  // Each small group joins the nearest that has room for it.
  void JoinSmall() {
    const uint32_t dim = seeds_.dim();
    std::vector<std::vector<float>> centre(groups_.size(), std::vector<float>(dim, 0.0f));
    for (size_t g = 0; g < groups_.size(); ++g) {
      for (uint32_t seed : groups_[g]) {
        for (uint32_t j = 0; j < dim; ++j) {
          centre[g][j] += seeds_.mean(seed)[j] / static_cast<float>(groups_[g].size());
        }
      }
    }
    for (size_t g = 0; g < groups_.size(); ++g) {
      const uint32_t tokens = Tokens(groups_[g]);
      if (tokens >= kSuperTokensMin) continue;
      size_t best = g;
      float least = std::numeric_limits<float>::max();
      for (size_t other = 0; other < groups_.size(); ++other) {
        if (other == g || groups_[other].empty() ||
            Tokens(groups_[other]) + tokens > kSuperTokensMax)
          continue;
        float distance = 0;
        for (uint32_t j = 0; j < dim; ++j) {
          distance += (centre[g][j] - centre[other][j]) * (centre[g][j] - centre[other][j]);
        }
        if (distance < least) {
          least = distance;
          best = other;
        }
      }
      if (best == g) continue;
      groups_[best].insert(groups_[best].end(), groups_[g].begin(), groups_[g].end());
      groups_[g].clear();
    }
    std::erase_if(groups_, [](const auto& group) { return group.empty(); });
  }

  const Seeds& seeds_;
  const Groups& clusters_;
  Bisector bisector_;
  std::vector<std::vector<uint32_t>> groups_;
};

// Cuts the clusters of one super into pages.
class Pager {
 public:
  Pager(const Points& points, Packing* out) : points_(points), bisector_(points), out_(out) {}

  // Of the clusters those of `seeds`, whose rows are reordered.
  void Run(Groups& clusters, std::span<const uint32_t> seeds) {
    out_->super_begin.push_back(static_cast<uint32_t>(out_->layout.page_begin.size()));
    rest_.clear();
    for (const uint32_t seed : seeds) Cut(clusters[seed]);
    while (!rest_.empty()) MergeOne();
  }

 private:
  struct Rest {
    std::vector<uint32_t> rows;
    std::vector<float> sum;  // of the rows
  };

  void Emit(std::span<const uint32_t> rows) {
    out_->layout.page_begin.push_back(static_cast<uint32_t>(out_->layout.tokens.size()));
    for (uint32_t row : rows) out_->layout.tokens.push_back(points_.ids[row]);
  }

  void Cut(std::span<uint32_t> rows) {
    if (rows.size() > kPageRows) {
      const uint32_t left = bisector_.Divide(rows, kPageRows);
      Cut(rows.first(left));
      Cut(rows.subspan(left));
    } else if (rows.size() >= kFullEnough) {
      Emit(rows);
    } else {
      rest_.push_back(MakeRest({rows.begin(), rows.end()}));
    }
  }

  Rest MakeRest(std::vector<uint32_t> rows) const {
    Rest rest{std::move(rows), std::vector<float>(points_.dim, 0.0f)};
    AddPointsByIndex(points_.table(rest.rows.data()), rest.rows.size(), nullptr, rest.sum.data());
    return rest;
  }

  float Distance(const Rest& a, const Rest& b) const {
    const float x = 1.0f / static_cast<float>(a.rows.size()),
                y = 1.0f / static_cast<float>(b.rows.size());
    float lanes[16] = {};
    for (uint32_t j = 0; j < points_.dim; j += 16) {
      for (uint32_t i = 0; i < 16; ++i) {
        const float d = a.sum[j + i] * x - b.sum[j + i] * y;
        lanes[i] += d * d;
      }
    }
    return std::accumulate(lanes, lanes + 16, 0.0f);
  }

  // The largest rest takes in the nearest until it makes a page; the last one taken may be cut.
  void MergeOne() {
    const auto largest = std::max_element(
        rest_.begin(), rest_.end(),
        [](const Rest& a, const Rest& b) { return a.rows.size() < b.rows.size(); });
    Rest page = std::move(*largest);
    rest_.erase(largest);
    while (page.rows.size() < kFullEnough && !rest_.empty()) {
      size_t best = 0;
      float least = std::numeric_limits<float>::max();
      for (size_t i = 0; i < rest_.size(); ++i) {
        const float distance = Distance(page, rest_[i]);
        if (distance >= least) continue;
        least = distance;
        best = i;
      }
      Take(best, &page);
    }
    Emit(page.rows);
  }

  void Take(size_t index, Rest* page) {
    Rest& from = rest_[index];
    const size_t room = kPageRows - page->rows.size();
    if (from.rows.size() > room) {  // the rows most along the line to the page
      std::vector<float> line(points_.dim), along(from.rows.size());
      for (uint32_t j = 0; j < points_.dim; ++j) {
        line[j] = page->sum[j] / static_cast<float>(page->rows.size()) -
                  from.sum[j] / static_cast<float>(from.rows.size());
      }
      ProjectPoints(line.data(), points_.table(from.rows.data()), from.rows.size(), along.data());
      std::vector<std::pair<float, uint32_t>> order;
      for (size_t i = 0; i < along.size(); ++i) order.emplace_back(-along[i], from.rows[i]);
      std::sort(order.begin(), order.end());
      std::vector<uint32_t> taken, kept;
      for (size_t i = 0; i < order.size(); ++i)
        (i < room ? taken : kept).push_back(order[i].second);
      from = MakeRest(std::move(kept));
      page->rows.insert(page->rows.end(), taken.begin(), taken.end());
      return;  // full
    }
    page->rows.insert(page->rows.end(), from.rows.begin(), from.rows.end());
    for (uint32_t j = 0; j < points_.dim; ++j) page->sum[j] += from.sum[j];
    rest_.erase(rest_.begin() + static_cast<ptrdiff_t>(index));
  }

  const Points& points_;
  Bisector bisector_;
  Packing* out_;
  std::vector<Rest> rest_;
};

Status PackPart(std::span<const uint32_t> ids, Projection& projection, PointAssigner& assigner,
                Rng& rng, Packing* out) {
  Points points;
  points.ids.assign(ids.begin(), ids.end());
  projection.Load(&points);
  Seeds seeds;
  KV_ASSIGN_OR_RETURN(Groups clusters, Cluster(points, assigner, rng, &seeds));
  Pager pager(points, out);
  for (const std::vector<uint32_t>& group : SuperPlanner(seeds, clusters).Run()) {
    pager.Run(clusters, group);
  }
  return OkStatus();
}

// Nearest coarse centroid of every token, a block of rows at a time.
std::vector<uint32_t> AssignCoarse(const float* coarse, uint32_t cells, uint32_t count,
                                   Projection& projection) {
  constexpr uint32_t kBlock = 480;
  BytePanels panels;
  panels.Assign(coarse, cells, projection.dim());
  std::vector<uint32_t> nearest(count);
  Points block;
  for (uint32_t first = 0; first < count; first += kBlock) {
    const uint32_t n = std::min(kBlock, count - first);
    block.ids.resize(n);
    std::iota(block.ids.begin(), block.ids.end(), first);
    projection.Load(&block);
    Nearest(panels, block.table(), n, nearest.data() + first, nullptr);
  }
  return nearest;
}

// Divides the tokens in parts of at most kPartTokens if it can. Parts are groups of coarse
// centroids: borders between more and smaller cells cut fewer clusters.
Groups Parts(uint32_t count, Projection& projection, Rng& rng) {
  std::vector<uint32_t> part_of(count, 0);
  const uint32_t parts = (count + kPartTokens - 1) / kPartTokens;
  if (parts <= 1) return Group(part_of, 1);
  const uint32_t cells = std::min(kPartCells * parts, kPartCellsMax);
  Points train, coarse;
  for (uint32_t i = 0; i < cells * kPartSample; ++i) {
    train.ids.push_back(static_cast<uint32_t>(uint64_t{i} * count / (cells * kPartSample)));
  }
  projection.Load(&train);
  const ScratchVector<float> centroids = TrainCentroids(train, cells, rng);
  coarse.dim = train.dim;
  coarse.Encode(centroids);
  const std::vector<uint32_t> cell_of = AssignCoarse(centroids.data(), cells, count, projection);
  std::vector<uint32_t> sizes(cells, 0), order(cells), part_of_cell(cells, 0);
  for (uint32_t cell : cell_of) ++sizes[cell];
  std::iota(order.begin(), order.end(), 0u);
  Bisector bisector(coarse);
  uint32_t made = 0;
  const auto split = [&](std::span<uint32_t> group, const auto& self) -> void {
    uint64_t tokens = 0;
    for (uint32_t cell : group) tokens += sizes[cell];
    if (tokens > kPartTokens && group.size() > 1) {
      const uint32_t left = bisector.Divide(group, 0);
      self(group.first(left), self);
      self(group.subspan(left), self);
      return;
    }
    for (uint32_t cell : group) part_of_cell[cell] = made;
    ++made;
  };
  split(order, split);
  for (uint32_t i = 0; i < count; ++i) part_of[i] = part_of_cell[cell_of[i]];
  return Group(part_of, made);
}

}  // namespace

Packing PackSequential(uint32_t count) {
  Packing packing;
  packing.layout.tokens.resize(count);
  std::iota(packing.layout.tokens.begin(), packing.layout.tokens.end(), 0u);
  const uint32_t pages = (count + kPageRows - 1) / kPageRows;
  for (uint32_t p = 0; p < pages; ++p) packing.layout.page_begin.push_back(p * kPageRows);
  packing.layout.page_begin.push_back(count);
  for (uint32_t p = 0; p < pages; p += kSequentialSuperPages) packing.super_begin.push_back(p);
  packing.super_begin.push_back(pages);
  return packing;
}

Result<Packing> PackContent(const TokenRows& rows, const Basis& basis, float value_share,
                            uint64_t seed, PointAssigner& assigner) {
  Packing packing;
  Rng rng(seed);
  packing.layout.tokens.reserve(rows.count);
  Projection projection(rows, basis, value_share, rng);
  const Groups parts = Parts(rows.count, projection, rng);
  for (size_t p = 0; p < parts.size(); ++p) {
    if (parts[p].empty()) continue;
    KV_RETURN_IF_ERROR(PackPart(parts[p], projection, assigner, rng, &packing));
  }
  packing.super_begin.push_back(static_cast<uint32_t>(packing.layout.page_begin.size()));
  packing.layout.page_begin.push_back(rows.count);
  return packing;
}

Result<Packing> Propose(const TokenRows& rows, std::span<const float> query_energy,
                        uint64_t slice_seed, PointAssigner& assigner) {
  if (rows.count == 0) return Packing();
  Basis basis = BasisOf(rows, query_energy);
  LearnPages(rows, PackSequential(rows.count), SketchUse::kAuto, &basis);
  return PackContent(rows, basis, basis.sketched() ? kValueShare : 0.0f,
                     BuildSeed(slice_seed, slice_seed), assigner);
}

}  // namespace icecache::packing
