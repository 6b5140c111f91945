#include <algorithm>
#include <cmath>
#include <string>

#include "cacheserver/select/dci_tree_internal.h"
#include "cacheserver/select/image.h"
#include "kernels/distance.h"

namespace icecache {

void DciTree::PutCell(const Cell& cell, ImageWriter* writer) {
  writer->Put(cell.lift);
  writer->Put<uint64_t>(cell.children.size());
  for (const Child& child : cell.children) {
    writer->Put(child.projection);
    writer->Put(child.token);
  }
}

DciTree::Cell DciTree::GetCell(ImageReader* reader) {
  Cell cell;
  cell.lift = reader->GetFinite();
  const auto count = reader->Get<uint64_t>();
  for (uint64_t i = 0; i < count && reader->ok(); ++i) {
    Child child{};
    child.projection = reader->GetFinite();
    child.token = reader->Get<uint32_t>();
    cell.children.push_back(child);
  }
  return cell;
}

void DciTree::Save(std::string* image) const {
  ImageWriter writer(PolicyKind::kDciTree, options_, image);
  writer.PutAll(direction_);
  writer.Put(lift_);
  writer.PutAll(page_fills_);
  writer.PutAll(page_tokens_);
  writer.Put<uint64_t>(tokens_.size());
  for (const TokenInfo& token : tokens_) {
    writer.Put(token.norm);
    writer.Put(token.head);
    writer.Put(token.parent_dot);
    writer.Put(token.parent);
    writer.Put(token.node);
    writer.Put(token.level);
  }
  writer.Put<uint64_t>(levels_.size());
  PutCell(root_, &writer);
  for (const Level& l : levels_) {
    writer.PutAll(l.tokens);
    writer.PutAll(l.keys);
    for (const Cell& cell : l.cells) PutCell(cell, &writer);
  }
  writer.Finish();
}

Status DciTree::Restore(std::string_view image) {
  ImageReader reader(PolicyKind::kDciTree, options_, image);
  DciTree fresh(options_, tree_options_);
  fresh.direction_ = reader.GetAllFinite();
  fresh.lift_ = reader.GetFinite();
  fresh.page_fills_ = reader.GetAll<uint8_t>();
  fresh.page_tokens_ = reader.GetAll<uint32_t>();
  const auto tokens = reader.Get<uint64_t>();
  for (uint64_t t = 0; t < tokens && reader.ok(); ++t) {
    TokenInfo token;
    token.norm = reader.GetFinite();
    token.head = reader.GetFinite();
    token.parent_dot = reader.GetFinite();
    token.parent = reader.Get<uint32_t>();
    token.node = reader.Get<uint32_t>();
    token.level = reader.Get<uint8_t>();
    fresh.tokens_.push_back(token);
    if (token.level == 0) ++fresh.level0_count_;
  }
  const auto levels = reader.Get<uint64_t>();
  if (levels > kLevelsMax) reader.Fail("it has too many levels");
  fresh.root_ = GetCell(&reader);
  for (uint64_t l = 0; l < levels && reader.ok(); ++l) {
    Level at;
    at.tokens = reader.GetAll<uint32_t>();
    at.keys = reader.GetAllFinite();
    for (size_t i = 0; i < at.tokens.size() && reader.ok(); ++i)
      at.cells.push_back(GetCell(&reader));
    fresh.levels_.push_back(std::move(at));
  }
  KV_RETURN_IF_ERROR(reader.Finish());
  // Places of tokens follow from the pages' lists.
  const size_t page_slots = fresh.page_fills_.size() * limits::kPageTokens;
  if (fresh.page_tokens_.size() != page_slots || fresh.direction_.size() != direction_.size())
    return DataLoss("dci_tree image: arrays do not fit each other");
  for (size_t p = 0; p < fresh.page_fills_.size(); ++p) {
    for (uint32_t r = 0; r < fresh.page_fills_[p] && r < limits::kPageTokens; ++r) {
      const uint32_t t = fresh.page_tokens_[p * limits::kPageTokens + r];
      if (t >= fresh.tokens_.size()) return DataLoss("dci_tree image: a page names no token");
      fresh.tokens_[t].page = static_cast<uint32_t>(p);
      fresh.tokens_[t].row = static_cast<uint8_t>(r);
    }
  }
  for (const Status& status : {fresh.CheckShape(), fresh.CheckCells()})
    if (!status.ok()) return DataLoss("dci_tree image: " + status.message());
  direction_ = std::move(fresh.direction_);
  lift_ = fresh.lift_;
  tokens_ = std::move(fresh.tokens_);
  levels_ = std::move(fresh.levels_);
  root_ = std::move(fresh.root_);
  level0_count_ = fresh.level0_count_;
  page_tokens_ = std::move(fresh.page_tokens_);
  page_fills_ = std::move(fresh.page_fills_);
  return OkStatus();
}

// Pages hold every token once; levels, nodes and parents are in range.
Status DciTree::CheckShape() const {
  size_t total = 0;
  for (uint32_t p = 0; p < page_count(); ++p) {
    if (page_fills_[p] == 0 || page_fills_[p] > limits::kPageTokens)
      return Internal("page " + std::to_string(p) + " has a fill of " +
                      std::to_string(page_fills_[p]));
    total += page_fills_[p];
    for (uint32_t r = 0; r < page_fills_[p]; ++r) {
      const uint32_t t = page_tokens_[size_t{p} * limits::kPageTokens + r];
      if (t >= token_count() || tokens_[t].page != p || tokens_[t].row != r)
        return Internal("row " + std::to_string(r) + " of page " + std::to_string(p) +
                        " and its token disagree");
    }
  }
  if (total != token_count())
    return Internal("pages hold " + std::to_string(total) + " of " + std::to_string(token_count()) +
                    " tokens");
  uint32_t level0 = 0;
  for (uint32_t t = 0; t < token_count(); ++t) {
    const TokenInfo& info = tokens_[t];
    const std::string name = "token " + std::to_string(t);
    if (info.level > top_level()) return Internal(name + " is above the top level");
    if (info.level == 0) {
      ++level0;
    } else if (info.node >= level(info.level).tokens.size() ||
               level(info.level).tokens[info.node] != t) {
      return Internal(name + " is not the pivot that it says");
    }
    const bool is_top = info.level == top_level();
    if (is_top != (info.parent == kRoot) ||
        (!is_top && info.parent >= level(info.level + 1).tokens.size()))
      return Internal(name + " has no parent on the level above");
    if (info.norm < 0 || info.norm > lift_) return Internal(name + " is longer than the lift");
  }
  size_t pivots = 0;
  for (const Level& l : levels_) {
    pivots += l.tokens.size();
    if (l.tokens.empty() || l.cells.size() != l.tokens.size() ||
        l.keys.size() != l.tokens.size() * options_.head_dim)
      return Internal("a level is empty or its arrays do not fit each other");
  }
  if (level0 != level0_count_ || level0 + pivots != token_count())
    return Internal("levels do not count every token once");
  return OkStatus();
}

// Cells hold every token once, with its parent, in order of projection.
Status DciTree::CheckCells() const {
  size_t total = 0;
  const auto check = [&](const Cell& cell, uint32_t child_level, uint32_t parent) -> Status {
    total += cell.children.size();
    for (size_t i = 0; i < cell.children.size(); ++i) {
      const Child& child = cell.children[i];
      if (child.token >= token_count() || tokens_[child.token].level != child_level ||
          tokens_[child.token].parent != parent)
        return Internal("a cell holds a token that is not its pivot's child");
      if (i > 0 && !(cell.children[i - 1] < child)) return Internal("a cell is out of order");
      if (cell.lift == lift_ && child.projection != ProjectionOf(tokens_[child.token]))
        return Internal("a projection is stale in a cell that is marked fresh");
    }
    return OkStatus();
  };
  KV_RETURN_IF_ERROR(check(root_, top_level(), kRoot));
  for (uint32_t l = top_level(); l > 0; --l)
    for (uint32_t i = 0; i < level(l).cells.size(); ++i)
      KV_RETURN_IF_ERROR(check(level(l).cells[i], l - 1, i));
  if (total != token_count())
    return Internal("cells hold " + std::to_string(total) + " of " + std::to_string(token_count()) +
                    " tokens");
  return OkStatus();
}

Status DciTree::Validate(const PagedKv& pages) const {
  if (pages.page_count != page_count())
    return Internal("the index has " + std::to_string(page_count()) + " pages, the store " +
                    std::to_string(pages.page_count));
  for (uint32_t p = 0; p < page_count(); ++p)
    if (pages.pages[p].fill != page_fills_[p])
      return Internal("page " + std::to_string(p) + " has fill " + std::to_string(page_fills_[p]) +
                      " in the index and " + std::to_string(pages.pages[p].fill) + " in the store");
  KV_RETURN_IF_ERROR(CheckShape());
  KV_RETURN_IF_ERROR(CheckCells());
  // Every token's row is the row that the index thinks it is.
  std::vector<float> key(options_.head_dim);
  for (uint32_t t = 0; t < token_count(); ++t) {
    const TokenInfo& info = tokens_[t];
    if (pages.pages[info.page].k == nullptr) continue;
    ToF32(pages.pages[info.page].k + info.row * pages.row_bytes(), pages.dtype, key.size(),
          key.data());
    double square = 0;
    for (const float x : key) square += double{x} * x;
    if (info.norm < std::numeric_limits<float>::max() / 5 &&
        std::abs(std::sqrt(square) - info.norm) > 1e-5 * info.norm)
      return Internal("token " + std::to_string(t) + " is another key in the store");
    if (info.level > 0 && !std::equal(key.begin(), key.end(),
                                      level(info.level).keys.begin() +
                                          static_cast<ptrdiff_t>(size_t{info.node} * key.size())))
      return Internal("pivot " + std::to_string(t) + " has another key in the store");
  }
  return OkStatus();
}

void DciTree::VisitCounters(const CounterVisitor& visit) const {
  size_t bytes = tokens_.size() * sizeof(TokenInfo) + page_tokens_.size() * sizeof(uint32_t) +
                 page_fills_.size() + direction_.size() * sizeof(float) +
                 root_.children.size() * sizeof(Child);
  size_t empty_cells = 0;
  for (const Level& l : levels_) {
    bytes += l.tokens.size() * sizeof(uint32_t) + l.keys.size() * sizeof(float);
    for (const Cell& cell : l.cells) {
      bytes += sizeof(Cell) + cell.children.size() * sizeof(Child);
      empty_cells += cell.children.empty();
    }
  }
  visit("pages", page_count());
  visit("tokens", token_count());
  visit("index_bytes", static_cast<double>(bytes));
  visit("levels", top_level() + 1);
  visit("pivots", token_count() - level0_count_);
  visit("empty_cells", static_cast<double>(empty_cells));
}

}  // namespace icecache
