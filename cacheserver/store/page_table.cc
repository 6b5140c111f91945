#include "cacheserver/store/page_table.h"

#include <bit>
#include <cstring>
#include <string>

#include "common/checksum.h"

namespace icecache {
namespace {

constexpr uint32_t kNoPage = ~0u;

}  // namespace

PageTable::PageTable(PagePool& pool, const Options& options)
    : pool_(pool),
      options_(options),
      row_bytes_(size_t{options.head_dim} * DTypeBytes(options.dtype)),
      frame_bytes_(
          static_cast<uint32_t>(limits::kPageTokens * (2 * row_bytes_ + sizeof(uint32_t)))) {}

PageTable::~PageTable() {
  ReleaseSpares();
  std::vector<Frame> frames;
  frames.reserve(entries_.size());
  for (const Entry& entry : entries_) {
    // A load in flight holds its segment, so there is none here.
    if (entry.residency != Residency::kCold) frames.push_back(entry.frame);
  }
  pool_.Release(options_.tenant, frame_bytes_, frames);
}

Status PageTable::ReserveFrames(uint32_t count) {
  if (count <= spares_.size()) return OkStatus();
  return pool_.Reserve(options_.tenant, frame_bytes_, count - spare_frames(), &spares_);
}

void PageTable::ReleaseSpares() {
  pool_.Release(options_.tenant, frame_bytes_, spares_);
  spares_.clear();
}

void PageTable::ReservePages(uint32_t count) {
  entries_.reserve(count);
  views_.reserve(count);
}

Frame PageTable::TakeSpare() {
  KV_CHECK(!spares_.empty());
  const Frame frame = spares_.back();
  spares_.pop_back();
  return frame;
}

PageId PageTable::AddPage(uint32_t version) {
  Entry entry;
  entry.frame = TakeSpare();
  entry.version = version;
  entries_.push_back(entry);
  views_.push_back({k_row(entry.frame, 0), v_row(entry.frame, 0), 0});
  return PageId(page_count() - 1);
}

void PageTable::AppendRow(PageId page, const std::byte* k, const std::byte* v, uint32_t position) {
  Entry& entry = entries_[page.value];
  PageView& view = views_[page.value];
  KV_CHECK(entry.residency == Residency::kWarm && view.fill < limits::kPageTokens);
  std::memcpy(k_row(entry.frame, view.fill), k, row_bytes_);
  std::memcpy(v_row(entry.frame, view.fill), v, row_bytes_);
  position_row(entry.frame)[view.fill] = position;
  const uint32_t block = position / kPositionsPerBlock;
  if (block >= page_of_.size()) page_of_.resize(block + 1);
  if (page_of_[block].empty()) page_of_[block].resize(kPositionsPerBlock, kNoPage);
  page_of_[block][position % kPositionsPerBlock] = page.value;
  ++view.fill;
  ++token_count_;
  entry.committed = false;
}

void PageTable::Commit(PageId page) {
  KV_CHECK(views_[page.value].fill > 0);
  entries_[page.value].checksum = Checksum(page);
  entries_[page.value].committed = true;
}

void PageTable::MoveRows(PageId from, uint16_t mask, PageId to, uint32_t version) {
  const Entry old = entries_[from.value];
  const uint32_t fill = views_[from.value].fill;
  const auto moved = static_cast<uint32_t>(std::popcount(mask));
  KV_CHECK(moved > 0 && moved < fill && std::bit_width(mask) <= static_cast<int>(fill));
  KV_CHECK(old.residency == Residency::kWarm && from != to);

  entries_[from.value].frame = TakeSpare();
  entries_[from.value].version = version;
  views_[from.value] = {k_row(entries_[from.value].frame, 0), v_row(entries_[from.value].frame, 0),
                        0};
  token_count_ -= fill;
  for (uint32_t row = 0; row < fill; ++row) {
    AppendRow((mask >> row & 1) != 0 ? to : from, k_row(old.frame, row), v_row(old.frame, row),
              position_row(old.frame)[row]);
  }
  Commit(from);
  Commit(to);
  pool_.Release(options_.tenant, frame_bytes_, {&old.frame, 1});
}

void PageTable::RestoreCold(std::span<const PageName> pages) {
  KV_CHECK(entries_.empty());
  ReservePages(static_cast<uint32_t>(pages.size()));
  for (const PageName& page : pages) {
    KV_CHECK(page.fill > 0 && page.fill <= limits::kPageTokens);
    Entry entry;
    entry.checksum = page.checksum;
    entry.version = page.version;
    entry.residency = Residency::kCold;
    entry.committed = true;
    entries_.push_back(entry);
    views_.push_back({nullptr, nullptr, page.fill});
    token_count_ += page.fill;
  }
  cold_count_ = page_count();
}

PageTable::PageName PageTable::name(PageId page) const {
  const Entry& entry = entries_[page.value];
  KV_CHECK(entry.committed);
  return {entry.version, views_[page.value].fill, entry.checksum};
}

void PageTable::Evict(PageId page) {
  Entry& entry = entries_[page.value];
  KV_CHECK(entry.residency == Residency::kWarm && entry.committed && entry.holds == 0);
  pool_.Release(options_.tenant, frame_bytes_, {&entry.frame, 1});
  entry.frame = {};
  entry.residency = Residency::kCold;
  views_[page.value].k = views_[page.value].v = nullptr;
  ++cold_count_;
}

Status PageTable::BeginLoad(PageId page) {
  Entry& entry = entries_[page.value];
  KV_CHECK(entry.residency == Residency::kCold);
  KV_RETURN_IF_ERROR(ReserveFrames(1));
  entry.frame = TakeSpare();
  entry.residency = Residency::kLoading;
  --cold_count_;
  ++loading_count_;
  return OkStatus();
}

Status PageTable::FillLoading(PageId page, std::span<const std::byte> stored) const {
  const Entry& entry = entries_[page.value];
  const uint32_t fill = views_[page.value].fill;
  const size_t rows_bytes = fill * row_bytes_;
  const size_t expected = 2 * rows_bytes + fill * sizeof(uint32_t);
  const auto lost = [&](const std::string& what) {
    return DataLoss("page " + std::to_string(page.value) + " of segment " +
                    std::to_string(options_.segment.value) + " in the cold store: " + what +
                    "; drop the context and prefill it again");
  };
  if (stored.size() != expected) {
    return lost(std::to_string(stored.size()) + " bytes, expected " + std::to_string(expected));
  }
  std::memcpy(k_row(entry.frame, 0), stored.data(), rows_bytes);
  std::memcpy(v_row(entry.frame, 0), stored.data() + rows_bytes, rows_bytes);
  std::memcpy(position_row(entry.frame), stored.data() + 2 * rows_bytes, fill * sizeof(uint32_t));
  if (Checksum(page) != entry.checksum) return lost("its checksum does not match");
  return OkStatus();
}

void PageTable::EndLoad(PageId page, bool loaded) {
  Entry& entry = entries_[page.value];
  KV_CHECK(entry.residency == Residency::kLoading);
  --loading_count_;
  if (!loaded) {
    pool_.Release(options_.tenant, frame_bytes_, {&entry.frame, 1});
    entry.frame = {};
    entry.residency = Residency::kCold;
    ++cold_count_;
    return;
  }
  entry.residency = Residency::kWarm;
  entry.referenced = true;
  views_[page.value].k = k_row(entry.frame, 0);
  views_[page.value].v = v_row(entry.frame, 0);
}

void PageTable::AppendStored(PageId page, std::string* out) const {
  const PageContent c = content(page);
  for (std::span<const std::byte> part : {c.k_rows, c.v_rows, c.positions}) {
    out->append(reinterpret_cast<const char*>(part.data()), part.size());
  }
}

PagedKv PageTable::view() const {
  PagedKv kv;
  kv.dtype = options_.dtype;
  kv.head_dim = options_.head_dim;
  kv.page_count = page_count();
  kv.pages = views_.data();
  return kv;
}

PageContent PageTable::content(PageId page) const {
  const Entry& entry = entries_[page.value];
  const uint32_t fill = views_[page.value].fill;
  KV_CHECK(entry.residency == Residency::kWarm && entry.committed);
  PageContent content;
  content.k_rows = {k_row(entry.frame, 0), fill * row_bytes_};
  content.v_rows = {v_row(entry.frame, 0), fill * row_bytes_};
  content.positions = std::as_bytes(std::span(position_row(entry.frame), fill));
  content.frame = entry.frame;
  content.version = entry.version;
  content.fill = fill;
  content.checksum = entry.checksum;
  return content;
}

const uint32_t* PageTable::positions(PageId page) const {
  return position_row(entries_[page.value].frame);
}

std::vector<PageId> PageTable::ColdPages() const {
  std::vector<PageId> pages;
  if (cold_count_ == 0 && loading_count_ == 0) return pages;
  for (uint32_t p = 0; p < page_count(); ++p) {
    if (residency(PageId(p)) != Residency::kWarm) pages.emplace_back(p);
  }
  return pages;
}

std::optional<PageId> PageTable::FindPosition(uint32_t position) const {
  const uint32_t block = position / kPositionsPerBlock;
  if (block >= page_of_.size() || page_of_[block].empty()) return std::nullopt;
  const uint32_t page = page_of_[block][position % kPositionsPerBlock];
  return page == kNoPage ? std::nullopt : std::optional(PageId(page));
}

uint64_t PageTable::Checksum(PageId page) const {
  const Entry& entry = entries_[page.value];
  const uint32_t fill = views_[page.value].fill;
  return PageChecksum({options_.segment.value, page.value, entry.version},
                      {k_row(entry.frame, 0), fill * row_bytes_},
                      {v_row(entry.frame, 0), fill * row_bytes_},
                      std::as_bytes(std::span(position_row(entry.frame), fill)));
}

Status PageTable::Validate() const {
  uint64_t tokens = 0;
  for (uint32_t p = 0; p < page_count(); ++p) {
    const std::string name =
        "page " + std::to_string(p) + " of segment " + std::to_string(options_.segment.value);
    if (views_[p].fill == 0 || views_[p].fill > limits::kPageTokens) {
      return Internal(name + " holds " + std::to_string(views_[p].fill) + " rows");
    }
    tokens += views_[p].fill;
    if (entries_[p].residency != Residency::kWarm) continue;
    if (views_[p].k != k_row(entries_[p].frame, 0) || views_[p].v != v_row(entries_[p].frame, 0)) {
      return Internal(name + ": the view points away from its frame");
    }
    if (!entries_[p].committed || entries_[p].checksum != Checksum(PageId(p))) {
      return DataLoss(name + ": content does not match its checksum");
    }
  }
  if (tokens != token_count_) {
    return Internal("page table counts " + std::to_string(token_count_) + " tokens, its pages " +
                    std::to_string(tokens));
  }
  return OkStatus();
}

}  // namespace icecache
