// Takes whole pages and compares each with the model. A wrong byte ends the process.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <map>
#include <set>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "common/checksum.h"
#include "tests/chaos/document.h"
#include "worker/cache_client.h"

namespace icecache::chaos {

inline constexpr int kBadExit = 3;

[[noreturn]] inline void Fail(const std::string& what) {
  std::fprintf(stderr, "CHAOS: %s\n", what.c_str());
  std::fflush(stderr);
  std::_Exit(kBadExit);
}

class CheckingSink final : public SelectionSink {
 public:
  CheckingSink(const Content& content, LayerId layer) : content_(content), layer_(layer) {}
  void FillHead(wire::SelectHead*) override { seen_.clear(); }
  void OnSelection(const wire::HeadSelection& selection,
                   std::vector<wire::ResidentPage>* refetch) override {
    std::vector<uint64_t>& chosen = chosen_[selection.head.value];
    chosen.clear();
    for (const wire::PagePayload& page : selection.pages) {
      for (const uint64_t part : {page.segment.value, uint64_t{page.page.value},
                                  uint64_t{page.version}, uint64_t{page.fill}, page.checksum}) {
        chosen.push_back(part);
      }
      if (!Take(selection.head, page))
        refetch->push_back({page.segment, page.page, page.version, page.fill});
    }
  }
  void OnRefetched(KvHeadId head, const wire::PagePayload& page) override { Take(head, page); }
  Status OnReplyTaken() override { return OkStatus(); }
  Status Settle(std::vector<HeadPages>*) override { return OkStatus(); }
  // Which pages were chosen for each head, in their order, with their checksums.
  uint64_t Hash() const {
    uint64_t hash = 0;
    for (const auto& [head, chosen] : chosen_)
      hash = Checksum64(std::as_bytes(std::span(chosen)), hash + head + 1);
    return hash;
  }
  uint64_t pages = 0;

 private:
  // False: not intact, to be fetched again, as every worker does.
  bool Take(KvHeadId head, const wire::PagePayload& mapped) {
    wire::PagePayload page = mapped;
    const size_t rows = size_t{page.fill} * kShape.row_bytes();
    if (page.from != 0 || page.k_rows.size() != rows || page.v_rows.size() != rows ||
        page.positions.size() != page.fill * sizeof(uint32_t)) {
      return false;
    }
    // The rows may lie in the server's memory: first copied, then believed.
    std::vector<std::byte> copy;
    for (const auto part : {page.k_rows, page.v_rows, page.positions})
      copy.insert(copy.end(), part.begin(), part.end());
    page.k_rows = std::span(copy).first(rows);
    page.v_rows = std::span(copy).subspan(rows, rows);
    page.positions = std::span(copy).subspan(2 * rows);
    if (PageChecksum({page.segment.value, page.page.value, page.version}, page.k_rows, page.v_rows,
                     page.positions) != page.checksum) {
      return false;
    }
    if (const Status status = content_.CheckPage(layer_, head, page); !status.ok())
      Fail("page " + std::to_string(page.page.value) +
           " passed its checksum and is wrong: " + status.ToString());
    if (!seen_.insert({head.value, page.segment.value, page.page.value}).second)
      Fail("a page was selected twice");
    ++pages;
    return true;
  }
  const Content& content_;
  const LayerId layer_;
  std::map<uint16_t, std::vector<uint64_t>> chosen_;
  std::set<std::tuple<uint16_t, uint64_t, uint32_t>> seen_;
};

}  // namespace icecache::chaos
