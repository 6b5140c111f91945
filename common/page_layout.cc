#include "common/page_layout.h"

#include <string>

#include "common/limits.h"

namespace icecache {
namespace {

constexpr uint32_t kPageTokensMean = limits::kPageTokens / 2;  // at least
constexpr uint32_t kSuperPagesMean = 4;

Status Broken(const std::string& what) { return InvalidArgument("page layout: " + what); }

}  // namespace

uint64_t SliceSeed(uint64_t context_seed, uint64_t flat_index) {  // splitmix64
  uint64_t x = context_seed + (flat_index + 1) * 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

Status CheckLayout(const PageLayout& layout, uint32_t token_count) {
  if (token_count == 0 && layout.page_count() == 0) return OkStatus();
  if (layout.tokens.size() != token_count || layout.page_begin.empty() ||
      layout.page_begin.front() != 0 || layout.page_begin.back() != token_count) {
    return Broken("covers " + std::to_string(layout.tokens.size()) + " tokens, expected " +
                  std::to_string(token_count));
  }
  for (uint32_t p = 0; p < layout.page_count(); ++p) {
    const uint32_t begin = layout.page_begin[p], end = layout.page_begin[p + 1];
    if (begin >= end || end - begin > limits::kPageTokens) {
      return Broken("page " + std::to_string(p) + " spans [" + std::to_string(begin) + ", " +
                    std::to_string(end) + "), expected 1 to " +
                    std::to_string(limits::kPageTokens) + " tokens");
    }
  }
  std::vector<bool> seen(token_count, false);
  for (const uint32_t token : layout.tokens) {
    if (token >= token_count || seen[token]) {
      return Broken("token " + std::to_string(token) + " is there twice or not of the " +
                    std::to_string(token_count));
    }
    seen[token] = true;
  }
  return OkStatus();
}

Status CheckPacking(const Packing& packing, uint32_t token_count) {
  KV_RETURN_IF_ERROR(CheckLayout(packing.layout, token_count));
  const uint32_t pages = packing.layout.page_count(), supers = packing.super_count();
  if (pages > token_count / kPageTokensMean + 1) {
    return Broken(std::to_string(pages) + " pages for " + std::to_string(token_count) +
                  " tokens, expected at most " + std::to_string(token_count / kPageTokensMean + 1));
  }
  if (supers > pages / kSuperPagesMean + 1) {
    return Broken(std::to_string(supers) + " groups of " + std::to_string(pages) +
                  " pages, expected at most " + std::to_string(pages / kSuperPagesMean + 1));
  }
  const auto& begin = packing.super_begin;
  if (pages > 0 && (begin.empty() || begin.front() != 0 || begin.back() != pages)) {
    return Broken("its groups do not cover the " + std::to_string(pages) + " pages");
  }
  for (uint32_t s = 0; s < supers; ++s) {
    if (begin[s] < begin[s + 1] && begin[s + 1] - begin[s] <= kSuperPagesMax) continue;
    return Broken("group " + std::to_string(s) + " spans pages [" + std::to_string(begin[s]) +
                  ", " + std::to_string(begin[s + 1]) + "), expected 1 to " +
                  std::to_string(kSuperPagesMax));
  }
  return OkStatus();
}

}  // namespace icecache
