// Save, Restore, Validate.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <string>

#include "cacheserver/select/cluster_tree_internal.h"
#include "cacheserver/select/image.h"

namespace icecache::cluster_tree {

namespace {

void PutRows(ImageWriter& out, const ChunkedRows& rows) {
  std::vector<uint8_t> flat(rows.row_count() * rows.row_bytes());
  for (size_t i = 0; i < rows.row_count(); ++i) {
    std::memcpy(flat.data() + i * rows.row_bytes(), rows.row(i), rows.row_bytes());
  }
  out.PutAll(flat);
}

void FillRows(const std::vector<uint8_t>& flat, ChunkedRows* rows) {
  rows->Resize(flat.size() / rows->row_bytes());
  for (size_t i = 0; i < rows->row_count(); ++i) {
    std::memcpy(rows->row(i), flat.data() + i * rows->row_bytes(), rows->row_bytes());
  }
}

void GetRows(ImageReader& in, ChunkedRows* rows, size_t expected_rows) {
  const std::vector<uint8_t> flat = in.GetAll<uint8_t>();
  if (flat.size() != expected_rows * rows->row_bytes())
    return in.Fail("a table of summaries has the wrong size");
  FillRows(flat, rows);
}

void PutNodes(ImageWriter& out, const NodeTable& nodes) {
  out.Put(nodes.block_count());
  PutRows(out, nodes.keys);
  for (const auto* values : {&nodes.scale, &nodes.log_count, &nodes.spread, &nodes.square})
    out.PutAll(*values);
}

// Numbers of a slot are bounded by coordinates, which saturate (kCoordinateMax): beyond that they
// are forged, and a search that multiplies them would leave the floats.
struct Bounds {
  explicit Bounds(uint32_t head_dim)
      : scale(kSlack * 2 * kCoordinateMax / 127),
        sketch_scale(kSlack * 2 * kCoordinateMax / (1 << kSketchBits)),
        square(kSlack * static_cast<float>(head_dim) * kCoordinateMax * kCoordinateMax),
        spread(std::sqrt(square)) {}
  static constexpr float kSlack = 1.05f;  // for rounding
  float scale;                            // of int8 rows of coordinates
  float sketch_scale;                     // of differences of two
  float square;                           // sum_j weight_j z_j^2; weights sum to head_dim
  float spread;
};

// NaN is in no range.
bool InRange(const std::vector<float>& values, float low, float high) {
  return std::all_of(values.begin(), values.end(), [=](float x) { return x >= low && x <= high; });
}

void GetNodes(ImageReader& in, uint32_t head_dim, NodeTable* nodes) {
  const auto blocks = in.Get<uint32_t>();
  if (blocks > limits::kContextTokensMax) return in.Fail("it has too many nodes");
  GetRows(in, &nodes->keys, blocks);
  for (auto* values : {&nodes->scale, &nodes->log_count, &nodes->spread, &nodes->square}) {
    *values = in.GetAll<float>();
    if (values->size() != size_t{blocks} * kBlockRows)
      in.Fail("a column of nodes has the wrong length");
  }
  const Bounds most(head_dim);
  if (!InRange(nodes->scale, 0, most.scale) || !InRange(nodes->spread, 0, most.spread) ||
      !InRange(nodes->square, 0, most.square))
    in.Fail("a number of a node is out of range");
}

void PutBasis(ImageWriter& out, const Basis& basis) {
  out.Put(basis.tokens);
  for (const auto* v : {&basis.energy, &basis.mean, &basis.scale, &basis.weight, &basis.value_mean,
                        &basis.page_variance}) {
    out.PutAll(*v);
  }
  out.PutAll(basis.sketch_dims);
  out.Put(basis.page_spread);
}

void GetBasis(ImageReader& in, uint32_t head_dim, Basis* basis) {
  constexpr float kMax = std::numeric_limits<float>::max();
  const Bounds most(head_dim);
  const auto get = [&](std::vector<float>* values, float low, float high) {
    *values = in.GetAll<float>();
    if (!values->empty() && values->size() != head_dim)
      in.Fail("a vector of the basis has the wrong length");
    if (!InRange(*values, low, high)) in.Fail("a number of the basis is out of range");
  };
  basis->tokens = in.Get<uint64_t>();
  get(&basis->energy, 0, kMax);
  get(&basis->mean, -kMax, kMax);
  get(&basis->scale, std::numeric_limits<float>::min(), kMax);
  get(&basis->weight, 0, Bounds::kSlack * static_cast<float>(head_dim));
  get(&basis->value_mean, -kMax, kMax);
  get(&basis->page_variance, 0, Bounds::kSlack * kCoordinateMax * kCoordinateMax);
  for (float scale : basis->scale) basis->inverse.push_back(1.0f / scale);
  basis->sketch_dims = in.GetAll<uint32_t>();
  basis->page_spread = in.Get<float>();
  if (!InRange({basis->page_spread}, 0, most.square))
    in.Fail("the unit of spreads is out of range");
  for (const auto* v : {&basis->scale, &basis->weight, &basis->value_mean, &basis->page_variance})
    if (v->size() != basis->mean.size()) in.Fail("a vector of the basis is missing");
  const std::vector<uint32_t>& dims = basis->sketch_dims;
  const bool rising =
      std::adjacent_find(dims.begin(), dims.end(), std::greater_equal<>()) == dims.end();
  // Older images have sketches of 32 dimensions of small heads, too.
  const bool counted = dims.size() == SketchDims(head_dim) || dims.size() == kSketchDims;
  if (!dims.empty() && (!counted || !rising || dims.back() >= head_dim))
    in.Fail("the sketch's dimensions are out of range");
}

template <typename T, typename Field, typename Item>
std::vector<T> Column(const std::vector<Item>& items, Field Item::*field) {
  std::vector<T> column(items.size());
  std::transform(items.begin(), items.end(), column.begin(),
                 [&](const Item& item) { return item.*field; });
  return column;
}

template <typename Field, typename Item>
void FillColumn(ImageReader& in, std::vector<Item>* items, Field Item::*field) {
  const std::vector<Field> column = in.GetAll<Field>();
  if (column.size() != items->size()) return in.Fail("a column has the wrong length");
  for (size_t i = 0; i < column.size(); ++i) (*items)[i].*field = column[i];
}

void PutSupers(ImageWriter& out, const Tree& tree) {
  out.Put<uint64_t>(tree.supers.size());
  for (const Super& super : tree.supers) {
    for (uint32_t block : super.blocks) out.Put(block);
    out.Put(super.block_count);
    out.Put(super.page_count);
    out.Put(super.token_count);
    out.Put(super.value_scale);
  }
}

void GetSupers(ImageReader& in, Tree* tree) {
  const auto count = in.Get<uint64_t>();
  if (count > limits::kContextTokensMax) return in.Fail("it has too many supers");
  tree->supers.resize(count);
  for (Super& super : tree->supers) {
    for (uint32_t& block : super.blocks) block = in.Get<uint32_t>();
    super.block_count = in.Get<uint32_t>();
    super.page_count = in.Get<uint32_t>();
    super.token_count = in.Get<uint32_t>();
    super.value_scale = in.Get<float>();
  }
}

Status Broken(const std::string& what) { return Internal("cluster_tree: " + what); }

// Pages and slots name each other, and no slot else a page.
Status CheckSlots(const Tree& tree) {
  const size_t blocks = tree.leaves.block_count();
  if (tree.page_of_slot.size() != blocks * kBlockRows || tree.super_of_block.size() != blocks)
    return Broken("tables of slots and blocks have different lengths");
  uint64_t tokens = 0;
  for (uint32_t p = 0; p < tree.page_count(); ++p) {
    const Page& page = tree.pages[p];
    if (page.count < 1 || page.count > kPageRows)
      return Broken("page " + std::to_string(p) + " holds " + std::to_string(page.count) +
                    " tokens");
    if (page.slot >= tree.page_of_slot.size() || tree.page_of_slot[page.slot] != p)
      return Broken("page " + std::to_string(p) + " and its slot disagree");
    tokens += page.count;
  }
  const auto empty =
      static_cast<size_t>(std::count(tree.page_of_slot.begin(), tree.page_of_slot.end(), kNone));
  if (tree.page_of_slot.size() - empty != tree.pages.size())
    return Broken("a slot names a page that is elsewhere");
  if (tokens != tree.tokens)
    return Broken("pages hold " + std::to_string(tokens) + " tokens, expected " +
                  std::to_string(tree.tokens));
  return OkStatus();
}

// Blocks belong to one super each, or are free. Supers without a page are free, once.
Status CheckSupers(const Tree& tree) {
  size_t listed = tree.free_blocks.size(), empty = 0;
  for (uint32_t s = 0; s < tree.super_count(); ++s) {
    const Super& super = tree.supers[s];
    uint32_t pages = 0, tokens = 0;
    if (super.block_count > kSuperBlocksMax)
      return Broken("super " + std::to_string(s) + " has too many blocks");
    for (uint32_t b = 0; b < super.block_count; ++b) {
      const uint32_t block = super.blocks[b];
      const auto* end = super.blocks.data() + b;
      if (block >= tree.leaves.block_count() || tree.super_of_block[block] != s ||
          std::find(super.blocks.data(), end, block) != end)
        return Broken("super " + std::to_string(s) + " lists a block of another, or twice");
      for (uint32_t lane = 0; lane < kBlockRows; ++lane) {
        const uint32_t page = tree.page_of_slot[size_t{block} * kBlockRows + lane];
        if (page == kNone) continue;
        ++pages;
        tokens += tree.pages[page].count;
      }
    }
    listed += super.block_count;
    empty += pages == 0 ? 1 : 0;
    if (super.page_count != pages || super.token_count != tokens ||
        (pages == 0) != (super.block_count == 0))
      return Broken("super " + std::to_string(s) + " counts its pages or tokens wrongly");
  }
  std::vector<bool> freed(std::max<size_t>(tree.leaves.block_count(), tree.super_count()), false);
  for (const uint32_t block : tree.free_blocks) {
    if (block >= tree.leaves.block_count() || tree.super_of_block[block] != kNone || freed[block])
      return Broken("a free block is in use, or free twice");
    freed[block] = true;
  }
  if (listed != tree.leaves.block_count()) return Broken("a block belongs to nobody");
  freed.assign(freed.size(), false);
  for (const uint32_t super : tree.free_supers) {
    if (super >= tree.super_count() || tree.supers[super].block_count != 0 || freed[super])
      return Broken("a free super is in use, or free twice");
    freed[super] = true;
  }
  return tree.free_supers.size() == empty ? OkStatus() : Broken("an empty super is not free");
}

// A search knows empty slots by their log_count alone.
Status CheckLogCounts(const Tree& tree) {
  const auto wrong = [](float log_count, uint32_t tokens) {
    constexpr float kEmpty = -std::numeric_limits<float>::infinity();
    return tokens == 0 ? log_count != kEmpty
                       : !(std::fabs(log_count - std::log(static_cast<float>(tokens))) < 1e-3f);
  };
  for (uint32_t slot = 0; slot < tree.page_of_slot.size(); ++slot) {
    const uint32_t page = tree.page_of_slot[slot];
    if (wrong(tree.leaves.log_count[slot], page == kNone ? 0 : tree.pages[page].count))
      return Broken("slot " + std::to_string(slot) + " weighs its tokens wrongly");
  }
  for (uint32_t s = 0; s < tree.super_nodes.log_count.size(); ++s) {
    if (wrong(tree.super_nodes.log_count[s],
              s < tree.super_count() ? tree.supers[s].token_count : 0))
      return Broken("super " + std::to_string(s) + " weighs its tokens wrongly");
  }
  return OkStatus();
}

// Every reference between pages, slots, blocks and supers, and every count.
Status CheckLinks(const Tree& tree) {
  KV_RETURN_IF_ERROR(CheckSlots(tree));
  KV_RETURN_IF_ERROR(CheckSupers(tree));
  return CheckLogCounts(tree);
}

// What is not in columns that are checked as they are read.
bool NumbersInRange(const Tree& tree) {
  const Bounds most(tree.head_dim);
  const auto in_range = [](float x, float high) { return x >= 0 && x <= high; };
  const auto scale_ok = [&](const auto& node) {
    return in_range(node.value_scale, Bounds::kSlack * kValueMax / 127);
  };
  return std::all_of(tree.pages.begin(), tree.pages.end(),
                     [&](const Page& page) {
                       return scale_ok(page) && in_range(page.sketch_scale, most.sketch_scale) &&
                              in_range(page.rest_spread, most.spread);
                     }) &&
         std::all_of(tree.supers.begin(), tree.supers.end(), scale_ok);
}

bool SameSlot(const NodeTable& a, const NodeTable& b, uint32_t dim, uint32_t slot) {
  int8_t x[limits::kHeadDimMax], y[limits::kHeadDimMax];
  UnpackBlockRow(a.keys.row(slot / kBlockRows), dim, slot % kBlockRows, x);
  UnpackBlockRow(b.keys.row(slot / kBlockRows), dim, slot % kBlockRows, y);
  return std::memcmp(x, y, dim) == 0 && a.scale[slot] == b.scale[slot] &&
         a.log_count[slot] == b.log_count[slot] && a.spread[slot] == b.spread[slot] &&
         a.square[slot] == b.square[slot];
}

// Older images have 8 bits of each dimension, blocks of quantized.h: such rows are twice as long.
void GetSketches(ImageReader& in, Tree* tree) {
  if (!in.ok() || !tree->basis.sketched()) return GetRows(in, &tree->sketches, 0);
  const auto dims = static_cast<uint32_t>(tree->basis.sketch_dims.size());
  const std::vector<uint8_t> flat = in.GetAll<uint8_t>();
  for (const size_t row_bytes : {SketchBytes(dims), size_t{dims} * kBlockRows}) {
    if (flat.size() != tree->pages.size() * row_bytes) continue;
    tree->sketches = ChunkedRows(row_bytes);
    return FillRows(flat, &tree->sketches);
  }
  in.Fail("the table of sketches has the wrong size");
}

// Rows of 8 bits become such as are written now. REQUIRES: checked numbers.
void ShortenSketches(Tree* tree) {
  const auto dims = static_cast<uint32_t>(tree->basis.sketch_dims.size());
  if (dims == 0 || tree->sketches.row_bytes() == SketchBytes(dims)) return;
  const Bounds most(tree->head_dim);
  ChunkedRows shorter(SketchBytes(dims));
  shorter.Resize(tree->page_count());
  for (uint32_t p = 0; p < tree->page_count(); ++p) {
    Page& page = tree->pages[p];
    const float scale = std::min(page.sketch_scale, most.scale);
    float deltas[kPageRows * kSketchDimsMax];
    for (uint32_t t = 0; t < page.count; ++t) {
      int8_t row[kSketchDimsMax];
      UnpackBlockRow(tree->sketches.row(p), dims, t, row);
      for (uint32_t i = 0; i < dims; ++i) deltas[t * dims + i] = scale * static_cast<float>(row[i]);
    }
    page.sketch_scale = PackSketch(deltas, page.count, dims, shorter.row(p));
  }
  tree->sketches = std::move(shorter);
}

}  // namespace

void Save(const Tree& tree, const PolicyOptions& options, std::string* image) {
  ImageWriter out(PolicyKind::kClusterTree, options, image);
  out.Put(tree.tokens);
  PutBasis(out, tree.basis);
  PutNodes(out, tree.leaves);
  out.PutAll(tree.page_of_slot);
  out.PutAll(tree.super_of_block);
  out.PutAll(tree.free_blocks);
  out.PutAll(tree.free_supers);
  out.Put<uint64_t>(tree.pages.size());
  out.PutAll(Column<uint32_t>(tree.pages, &Page::slot));
  out.PutAll(Column<uint32_t>(tree.pages, &Page::count));
  out.PutAll(Column<float>(tree.pages, &Page::value_scale));
  out.PutAll(Column<float>(tree.pages, &Page::sketch_scale));
  out.PutAll(Column<float>(tree.pages, &Page::rest_spread));
  PutRows(out, tree.values);
  PutRows(out, tree.sketches);
  PutNodes(out, tree.super_nodes);
  PutRows(out, tree.super_values);
  PutSupers(out, tree);
  out.Finish();
}

Status Restore(std::string_view image, const PolicyOptions& options, Tree* tree) {
  ImageReader in(PolicyKind::kClusterTree, options, image);
  Tree read(options.head_dim);
  read.tokens = in.Get<uint64_t>();
  GetBasis(in, options.head_dim, &read.basis);
  GetNodes(in, options.head_dim, &read.leaves);
  read.page_of_slot = in.GetAll<uint32_t>();
  read.super_of_block = in.GetAll<uint32_t>();
  read.free_blocks = in.GetAll<uint32_t>();
  read.free_supers = in.GetAll<uint32_t>();
  const auto page_count = in.Get<uint64_t>();
  if (page_count > limits::kContextTokensMax) in.Fail("it has too many pages");
  if (in.ok()) read.pages.resize(page_count);
  FillColumn(in, &read.pages, &Page::slot);
  FillColumn(in, &read.pages, &Page::count);
  FillColumn(in, &read.pages, &Page::value_scale);
  FillColumn(in, &read.pages, &Page::sketch_scale);
  FillColumn(in, &read.pages, &Page::rest_spread);
  GetRows(in, &read.values, read.pages.size());
  GetSketches(in, &read);
  GetNodes(in, options.head_dim, &read.super_nodes);
  const size_t supers_max = size_t{read.super_nodes.block_count()} * kBlockRows;
  const std::vector<uint8_t> values = in.GetAll<uint8_t>();
  GetSupers(in, &read);
  if (read.supers.size() > supers_max || supers_max - read.supers.size() >= kBlockRows ||
      values.size() != read.supers.size() * options.head_dim)
    in.Fail("the table of supers has the wrong size");
  KV_RETURN_IF_ERROR(in.Finish());
  read.super_values.Resize(read.supers.size());
  for (size_t s = 0; s < read.supers.size(); ++s) {
    std::memcpy(read.super_values.row(s), values.data() + s * options.head_dim, options.head_dim);
  }
  if (read.page_count() > 0 && read.basis.mean.empty())
    return DataLoss("index image: the basis is missing");
  if (!NumbersInRange(read)) return DataLoss("index image: a number of a page is out of range");
  if (const Status links = CheckLinks(read); !links.ok())
    return DataLoss("index image: " + links.message());
  ShortenSketches(&read);
  *tree = std::move(read);
  return OkStatus();
}

Status Validate(const Tree& tree, const PolicyOptions& options, const PagedKv& pages) {
  KV_RETURN_IF_ERROR(CheckLinks(tree));
  const auto broken = [](const char* node, uint32_t i, const char* what) {
    return Broken(std::string(node) + " " + std::to_string(i) + " " + what);
  };
  if (pages.page_count != tree.page_count()) {
    return Internal("cluster_tree: " + std::to_string(pages.page_count) + " pages stored, " +
                    std::to_string(tree.page_count()) + " indexed");
  }
  bool any_rows = false;
  for (uint32_t p = 0; p < tree.page_count(); ++p) {
    if (pages.pages[p].fill != tree.pages[p].count)
      return broken("page", p, "has another number of tokens than stored");
    any_rows = any_rows || pages.pages[p].k != nullptr;
  }
  if (!any_rows) return OkStatus();
  // Summaries are functions of the rows: computed again on a copy, they must come out the same.
  std::string image;
  Save(tree, options, &image);
  Tree copy(options.head_dim);
  KV_RETURN_IF_ERROR(Restore(image, options, &copy));
  for (uint32_t p = 0; p < tree.page_count(); ++p) {
    const PageView& page = pages.pages[p];
    if (page.k == nullptr) continue;
    PageRows rows(tree.head_dim);
    rows.AddPage(copy.basis, pages.dtype, page);
    WritePage(copy, p, rows);
    if (!SameSlot(tree.leaves, copy.leaves, tree.head_dim, tree.pages[p].slot))
      return broken("page", p, "has a stale key summary");
    if (std::memcmp(tree.values.row(p), copy.values.row(p), tree.head_dim) != 0)
      return broken("page", p, "has a stale mean value");
    if (tree.basis.sketched() &&
        std::memcmp(tree.sketches.row(p), copy.sketches.row(p), tree.sketches.row_bytes()) != 0) {
      return broken("page", p, "has a stale sketch");
    }
  }
  for (uint32_t s = 0; s < tree.super_count(); ++s) {
    WriteSuper(copy, s);
    if (!SameSlot(tree.super_nodes, copy.super_nodes, tree.head_dim, s))
      return broken("super", s, "has a stale summary");
  }
  return OkStatus();
}

}  // namespace icecache::cluster_tree
