// ClusterTree: the default SelectionPolicy. Two levels of summaries over pages that hold tokens
// alike.
//
//   super (about 32 pages)   count, mean key, mean value, spread
//     page (up to 16 tokens) count, mean key, mean value, spread, and where it pays a token sketch
//       token                K and V themselves, owned by the head slice
//
// Keys are seen in coordinates centred and scaled per dimension over the slice; summaries are int8.
// The mass of a node for a query is estimated as count * exp(q . mean + f(s)), s^2 the variance of
// its tokens' logits and f(s) = s^2 / 2 / (1 + 0.2 s) (notes: the undamped Gaussian term diverges
// on mixed pages). A sketch holds each token's deviation from its page's mean, in all of up to 64
// dimensions or in the 32 in which logits vary most inside pages.
//
// Costs: about 39 bytes a key with sketch and 22 without at head_dim 128; build a few us per key; a
// query reads 128 bytes per page, with the sketch 256 more of pages that may hold a heavy token,
// then 256 per token re-ranked. Bad at: keys whose logits vary in many dimensions at once (broad
// spectra), where pages are impure and only exact reads help; slices under a few pages, where a
// plain scan is as fast. Thread and lifecycle: as SelectionPolicy says. Details: docs/index.md.
#pragma once

#include <memory>

#include "cacheserver/select/selection_policy.h"
#include "kernels/packing.h"

namespace icecache {

// For ablation and tests; the defaults were chosen by `icecache-bench select` (docs/index.md).
struct ClusterTreeOptions {
  // How tokens are laid out in pages. kAuto builds by keys, and by values too where tokens are
  // sketched, and takes sequential pages instead when they are about as pure, because neighbours
  // also have values alike. In a head that is sketched whole values decide more than keys.
  enum class Layout : uint8_t {
    kAuto = 0,
    kContent = 1,
    kSequential = 2,
    kContentValue = 3,
    kRandom = 4,  // an ablation: no layout at all
  };
  using Sketch = packing::SketchUse;

  Layout layout = Layout::kAuto;
  Sketch sketch = Sketch::kAuto;
  // Pages re-ranked beyond those returned: as many as may hold something of weight, within bounds.
  uint32_t rerank_pages_min = 10;
  uint32_t rerank_pages_max = 52;
  uint32_t rerank_pages_sketch = 4;  // when the tokens were sketched
  uint32_t scan_pages = 2560;  // pages scanned, more with sketch; a larger slice goes by supers
  // With SelectRequest::near: pages scanned besides the supers that hold those named.
  uint32_t near_scan_pages = 512;
  uint32_t sketch_pages = 4096;   // pages whose sketches one query reads at most
  float token_threshold = 8e-4f;  // estimated weight above which a single token is read exactly
  float insert_slack =
      0.5f;  // mean page variances an inserted token may go beyond its nearest page
};

std::unique_ptr<SelectionPolicy> MakeClusterTree(const PolicyOptions& options,
                                                 const ClusterTreeOptions& tree_options = {});

}  // namespace icecache
