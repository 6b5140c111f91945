// SelectionPolicy: the seam between a head slice and the structure that decides which pages matter.
//
// One policy object indexes the tokens of one HeadSlice: all tokens of one (segment, layer, kv head)
// except sinks and the unindexed tail. The owner of the pages (cacheserver/context/head_slice) keeps K and V;
// the policy keeps summaries and says how tokens are laid out into pages.
//
// Lifecycle:
//   1. Make...Policy()        empty, no pages
//   2. Build(rows)            once, on any thread; answers with the layout that the owner must store
//   3. Insert(row)*           owner's thread; answers with the edit that the owner must apply
//   4. const from then on     a sealed slice is shared by all readers
//   Select at any time after 1; const and safe from many threads at once (scratch is thread-local).
//
// Invariants (tests/conformance/selection_policy_suite.h): every token is in exactly one page; no page is empty or
// over kPageTokens; never more pages than asked for; a sealed slice answers the same query the same
// way for ever; equal input and seed give equal results at any thread count; Save and Restore are exact.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "common/ids.h"
#include "common/page_layout.h"
#include "common/status.h"
#include "kernels/attention_state.h"
#include "kernels/paged_kv.h"

namespace icecache {

// What the owner does after Insert, in this order:
//   move: rows of `from` whose bit is set in mask move, keeping their order, to the end of `to`, a new
//         page when it is the old page_count; the rest, which are some, close up;
//   then the new token becomes the last row of `page` (a new page when page == page_count).
struct RowMove {
  PageId from;
  uint16_t mask = 0;
  PageId to;
  bool operator==(const RowMove&) const = default;
};
struct InsertPlan {
  PageId page;
  std::optional<RowMove> move{};
};

// By what a page's score is aggregated over the query heads of the group.
enum class GroupRank : uint8_t {
  kMassSum = 0,   // sum of per-head softmax mass: best output error
  kMassMax = 1,   // largest per-head softmax mass: no head is starved
  kMaxToken = 2,  // best single token: best coverage of the exact top-k
};

struct SelectRequest {
  const float* queries = nullptr;   // [group, head_dim], scaled: logit = q . k
  uint32_t group = 0;               // 1..kGroupMax
  uint32_t max_pages = 0;           // pages to return at most
  uint32_t read_cap = 0;            // tokens that may be read exactly beyond the returned pages; 0 = strict
  float min_mass = 0;               // > 0: return only as many pages as reach this share of the mass
  GroupRank rank = GroupRank::kMassSum;
  const float* local_lse = nullptr; // optional [group]: log-sum-exp of the tokens that the worker holds
  bool residual = true;             // false: leave `residual` empty: pages only, which is another
                                    // answer of policies that choose tokens (budget_choice.h)
  // Where to look: pages that are likely to matter, in any order; empty: everywhere. A policy may
  // know pages far from all of these by coarser summaries only, in ranking and in the residual; the
  // pages named are ranked as without this. A hint: ids out of range are ignored.
  std::span<const PageId> near{};
  // Pages whose SelectedPage::log_mass is below have no chance: other segments hold better ones. A
  // policy may leave such pages in the residual without looking closer. A hint.
  float floor = -std::numeric_limits<float>::infinity();
};

struct SelectedPage {
  PageId page;
  float log_mass = 0;  // log of sum over its tokens of exp(logit), largest over the group; ranks pages of
                       // different segments against each other
};

struct Selection {
  std::vector<SelectedPage> pages;  // best first, no repeats, at most max_pages
  AttentionStates residual;         // [group]: everything indexed that is in no returned page
  float covered_mass = 0;           // estimated share of the indexed mass that `pages` hold, mean over the group
  uint32_t tokens_read = 0;         // rows of K read exactly (returned pages included)
  // Pages whose rows the ranking read or, where they are not in memory, would have read; in any
  // order. The owner brings what was missing and asks again: with all of them in memory the answer
  // is that of a slice that is wholly in memory.
  std::vector<PageId> read;
};

// Build options that come from outside the rows.
struct BuildHints {
  // Mean square of the query heads' elements, [head_dim], over recent queries of this slice's group;
  // empty when unknown. Lets a policy weigh the dimensions that queries actually use.
  std::span<const float> query_energy;
  // The group's queries at the last positions before the build, oldest first, [count, query_group,
  // head_dim], scaled as in SelectRequest; empty when unknown. For policies that rank tokens by
  // the attention they were seen to get (docs/adr/0006): all others ignore it.
  std::span<const float> queries;
  uint32_t query_group = 0;
  uint64_t seed = 0;
  // A layout by content that somebody else has made of these rows (kernels/packing.h); passes
  // CheckPacking. A candidate like one's own, for policies that choose among layouts by purity; all
  // others ignore it.
  const Packing* proposed = nullptr;
};

class SelectionPolicy {
 public:
  virtual ~SelectionPolicy() = default;

  // INVALID_ARGUMENT when a value is NaN or infinite. REQUIRES: empty policy. rows.count == 0 is fine.
  virtual Result<PageLayout> Build(const TokenRows& rows, const BuildHints& hints) = 0;

  // Adds one token (row.count == 1). `pages` shows the pages before the edit, all in memory or the touched
  // one at least. INVALID_ARGUMENT on non-finite values, and then nothing has changed.
  virtual Result<InsertPlan> Insert(const TokenRows& row, const PagedKv& pages) = 0;

  // Fills *out (reusing its memory). Reads K and V only of pages that are in memory.
  virtual void Select(const SelectRequest& request, const PagedKv& pages, Selection* out) const = 0;

  // Forgets the rows whose bit in keep[token row of page] is 0: used to drop a suffix of positions.
  // For each page, mask of rows to keep; a page left empty disappears and later ids close up in order.
  virtual Status Retain(std::span<const uint16_t> keep_masks, const PagedKv& pages) = 0;

  // Appends a self-contained image of the structure: equal objects give equal bytes.
  virtual void Save(std::string* image) const = 0;
  // Replaces *this. DATA_LOSS naming what is wrong when the image is truncated, corrupt or newer.
  virtual Status Restore(std::string_view image) = 0;

  // Checks every invariant against the stored pages; slow. INTERNAL naming the first broken one.
  virtual Status Validate(const PagedKv& pages) const = 0;

  // Reports named numbers: "pages", "tokens", "index_bytes", and what else the policy knows.
  using CounterVisitor = std::function<void(std::string_view name, double value)>;
  virtual void VisitCounters(const CounterVisitor& visit) const = 0;
};

// Parameters common to all policies. dtype and head_dim describe the rows it will be given.
struct PolicyOptions {
  DType dtype = DType::kF16;
  uint32_t head_dim = 0;
  uint64_t seed = 1;
};

// The policies of this build, by the names used in flags, on the wire and on disk.
// A number is never used again for another policy.
enum class PolicyKind : uint8_t {
  kClusterTree = 0,
  kDciTree = 1,
  kExact = 2,
  kSequential = 3,
  kExactToken = 4,
  kExactPage = 5,
  kMass = 6,
  kStreamingLlm = 7,
  kH2o = 8,
  kSnapKv = 9,
  kQuest = 10,
  kArkVale = 11,
  kPqCache = 12,
  kMagicPig = 13,
  kOmniKv = 14,
  kInfLlm = 15,
  kShadowKv = 16,
  kRetroInfer = 17,
  kClusterKv = 18,
  kSqueezed = 19,
  kLandmark = 20,
  kTwilight = 21,
  kRandomPages = 22,
  kSequentialPages = 23,
  kTreeNoResidual = 24,
  kTreeNoRerank = 25,
};
std::span<const PolicyKind> AllPolicyKinds();                     // in the order of their numbers
std::string_view PolicyKindName(PolicyKind kind);                 // "cluster_tree"
uint32_t PolicyHeadDimMin(PolicyKind kind);                       // 32 for trees of clusters, else 16
std::string PolicyKindNames();                                    // "cluster_tree, dci_tree, ..."
Result<PolicyKind> ParsePolicyKind(std::string_view name);        // error lists the names
std::unique_ptr<SelectionPolicy> MakePolicy(PolicyKind kind, const PolicyOptions& options);

}  // namespace icecache
