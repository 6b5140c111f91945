// Save, Restore, Validate.
#include <algorithm>
#include <cmath>
#include <cstring>
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

void GetRows(ImageReader& in, ChunkedRows* rows, size_t expected_rows) {
  const std::vector<uint8_t> flat = in.GetAll<uint8_t>();
  if (flat.size() != expected_rows * rows->row_bytes())
    return in.Fail("a table of summaries has the wrong size");
  rows->Resize(expected_rows);
  for (size_t i = 0; i < expected_rows; ++i) {
    std::memcpy(rows->row(i), flat.data() + i * rows->row_bytes(), rows->row_bytes());
  }
}

void PutNodes(ImageWriter& out, const NodeTable& nodes) {
  out.Put(nodes.block_count());
  PutRows(out, nodes.keys);
  for (const auto* values : {&nodes.scale, &nodes.log_count, &nodes.spread, &nodes.square})
    out.PutAll(*values);
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
  (void)head_dim;
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
  basis->tokens = in.Get<uint64_t>();
  basis->energy = in.GetAll<float>();
  for (auto* v :
       {&basis->mean, &basis->scale, &basis->weight, &basis->value_mean, &basis->page_variance}) {
    *v = in.GetAll<float>();
    if (!v->empty() && v->size() != head_dim) in.Fail("a vector of the basis has the wrong length");
  }
  for (float scale : basis->scale) basis->inverse.push_back(1.0f / scale);
  basis->sketch_dims = in.GetAll<uint32_t>();
  basis->page_spread = in.Get<float>();
  const bool dims_ok = basis->sketch_dims.empty() || basis->sketch_dims.size() == kSketchDims;
  const bool range_ok = std::all_of(basis->sketch_dims.begin(), basis->sketch_dims.end(),
                                    [&](uint32_t j) { return j < head_dim; });
  if (!dims_ok || !range_ok) in.Fail("the sketch's dimensions are out of range");
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

// Every reference between pages, slots, blocks and supers, and every count.
Status CheckLinks(const Tree& tree) {
  const auto broken = [](const std::string& what) { return Internal("cluster_tree: " + what); };
  const size_t blocks = tree.leaves.block_count();
  if (tree.page_of_slot.size() != blocks * kBlockRows || tree.super_of_block.size() != blocks) {
    return broken("tables of slots and blocks have different lengths");
  }
  uint64_t tokens = 0;
  for (uint32_t p = 0; p < tree.page_count(); ++p) {
    const Page& page = tree.pages[p];
    if (page.count < 1 || page.count > kPageRows)
      return broken("page " + std::to_string(p) + " holds " + std::to_string(page.count) +
                    " tokens");
    if (page.slot >= tree.page_of_slot.size() || tree.page_of_slot[page.slot] != p) {
      return broken("page " + std::to_string(p) + " and its slot disagree");
    }
    tokens += page.count;
  }
  if (tokens != tree.tokens)
    return broken("pages hold " + std::to_string(tokens) + " tokens, expected " +
                  std::to_string(tree.tokens));
  std::vector<uint32_t> owned(tree.super_count(), 0);
  size_t used = 0;
  for (uint32_t slot = 0; slot < tree.page_of_slot.size(); ++slot) {
    const uint32_t page = tree.page_of_slot[slot];
    if (page == kNone) continue;
    const uint32_t super = tree.super_of_block[slot / kBlockRows];
    if (page >= tree.page_count() || tree.pages[page].slot != slot)
      return broken("slot " + std::to_string(slot) + " names a page that is elsewhere");
    if (super >= tree.super_count()) return broken("a page lies in a block without super");
    ++owned[super];
    ++used;
  }
  if (used != tree.pages.size()) return broken("a page has no slot");
  size_t held = 0;
  for (uint32_t s = 0; s < tree.super_count(); ++s) {
    const Super& super = tree.supers[s];
    if (super.block_count > kSuperBlocksMax || super.page_count != owned[s])
      return broken("super " + std::to_string(s) + " counts its pages wrongly");
    for (uint32_t b = 0; b < super.block_count; ++b) {
      if (super.blocks[b] >= blocks || tree.super_of_block[super.blocks[b]] != s)
        return broken("super " + std::to_string(s) + " lists a block of another");
    }
    held += super.block_count;
  }
  for (uint32_t block : tree.free_blocks) {
    if (block >= blocks || tree.super_of_block[block] != kNone)
      return broken("a free block is in use");
  }
  for (uint32_t super : tree.free_supers) {
    if (super >= tree.super_count() || tree.supers[super].page_count != 0)
      return broken("a free super is in use");
  }
  if (held + tree.free_blocks.size() != blocks) return broken("a block belongs to nobody");
  return OkStatus();
}

bool SameSlot(const NodeTable& a, const NodeTable& b, uint32_t dim, uint32_t slot) {
  int8_t x[limits::kHeadDimMax], y[limits::kHeadDimMax];
  UnpackBlockRow(a.keys.row(slot / kBlockRows), dim, slot % kBlockRows, x);
  UnpackBlockRow(b.keys.row(slot / kBlockRows), dim, slot % kBlockRows, y);
  return std::memcmp(x, y, dim) == 0 && a.scale[slot] == b.scale[slot] &&
         a.log_count[slot] == b.log_count[slot] && a.spread[slot] == b.spread[slot] &&
         a.square[slot] == b.square[slot];
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
  GetRows(in, &read.sketches, read.basis.sketched() ? read.pages.size() : 0);
  GetNodes(in, options.head_dim, &read.super_nodes);
  const size_t supers_max = size_t{read.super_nodes.block_count()} * kBlockRows;
  const std::vector<uint8_t> values = in.GetAll<uint8_t>();
  GetSupers(in, &read);
  if (read.supers.size() > supers_max || values.size() != read.supers.size() * options.head_dim) {
    in.Fail("the table of supers has the wrong size");
  }
  KV_RETURN_IF_ERROR(in.Finish());
  read.super_values.Resize(read.supers.size());
  for (size_t s = 0; s < read.supers.size(); ++s) {
    std::memcpy(read.super_values.row(s), values.data() + s * options.head_dim, options.head_dim);
  }
  if (read.page_count() > 0 && read.basis.mean.size() != options.head_dim)
    return DataLoss("index image: the basis is missing");
  if (const Status links = CheckLinks(read); !links.ok())
    return DataLoss("index image: " + links.message());
  *tree = std::move(read);
  return OkStatus();
}

Status Validate(const Tree& tree, const PolicyOptions& options, const PagedKv& pages) {
  KV_RETURN_IF_ERROR(CheckLinks(tree));
  const auto broken = [](const char* node, uint32_t i, const char* what) {
    return Internal(std::string("cluster_tree: ") + node + " " + std::to_string(i) + " " + what);
  };
  if (pages.page_count != tree.page_count()) {
    return Internal("cluster_tree: " + std::to_string(pages.page_count) + " pages stored, " +
                    std::to_string(tree.page_count()) + " indexed");
  }
  // Summaries are functions of the rows: computed again on a copy, they must come out the same.
  std::string image;
  Save(tree, options, &image);
  Tree copy(options.head_dim);
  KV_RETURN_IF_ERROR(Restore(image, options, &copy));
  for (uint32_t p = 0; p < tree.page_count(); ++p) {
    const PageView& page = pages.pages[p];
    if (page.fill != tree.pages[p].count)
      return broken("page", p, "has another number of tokens than stored");
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
    if (tree.supers[s].token_count != copy.supers[s].token_count)
      return broken("super", s, "counts its tokens wrongly");
  }
  return OkStatus();
}

}  // namespace icecache::cluster_tree
