#include "worker/model/unicode.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "common/status.h"

namespace icecache {
namespace {

// UTF-8 of U+0300, the first character that combines, begins with it; no lesser byte begins one.
constexpr unsigned char kFirstMarkLead = 0xcc;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

}  // namespace

std::string NormalizeNfc(std::string_view text) {
  const auto plain = [](char c) { return static_cast<unsigned char>(c) < kFirstMarkLead; };
  if (std::all_of(text.begin(), text.end(), plain)) return std::string(text);
  utf8proc_uint8_t* bytes = nullptr;
  const utf8proc_ssize_t size =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                   static_cast<utf8proc_ssize_t>(text.size()), &bytes,
                   static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  const std::unique_ptr<utf8proc_uint8_t, Free> owned(bytes);
  KV_CHECK(size >= 0);  // valid UTF-8: only memory can run out
  return {reinterpret_cast<const char*>(bytes), static_cast<size_t>(size)};
}

char32_t ToLower(char32_t code) {
  return static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(code)));
}

}  // namespace icecache
