// Private to config.cc: one setting, and values as text: parsed strictly, printed so that they read
// back.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "common/status.h"

namespace icecache::config {

// What a setting may be in a TOML file; on the command line and in the environment all are text.
enum class ValueKind { kString, kBool, kUnsigned, kReal, kSize, kMillis, kList };

struct Setting {
  std::string key;
  ValueKind kind = ValueKind::kString;
  std::string help;
  std::string section;
  std::string expects;                                          // "a size such as 4GiB"
  std::function<bool(const std::vector<std::string>&)> assign;  // false: not what is expected
  std::function<std::string()> print;                           // the value as TOML
  bool required = false;
  bool secret = false;
  bool positional = false;
  std::string source;  // empty: still the default
  std::vector<std::function<Status()>> checks;
};

// INVALID_ARGUMENT "<source>: key = 'value', expected ...". Assign ends in it when the values are
// not accepted.
Status Refuse(const Setting& setting, const std::string& source, const std::string& value);
Status Assign(Setting& setting, std::string source, const std::vector<std::string>& values);

// Setters, one per kind; `expects` and `print` are filled, too.
Setting StringSetting(std::string* field);
Setting BoolSetting(bool* field);
Setting UnsignedSetting(uint32_t* field, uint32_t min, uint32_t max);
Setting UnsignedSetting(uint64_t* field);
Setting RealSetting(double* field, double min, double max);
Setting SizeSetting(uint64_t* bytes);
Setting MillisSetting(uint32_t* ms);
Setting ListSetting(std::vector<std::string>* field);

// "250", "250ms", "2s", "1.5s"; nullopt when it is none of these or above 2^32 - 1 ms.
std::optional<uint32_t> ParseMillis(std::string_view text);
std::string TomlQuoted(std::string_view text);
std::vector<std::string> SplitList(std::string_view text);  // at commas; "" has no elements

std::string FlagName(std::string_view key);      // memory_size -> --memory-size
std::string VariableName(std::string_view key);  // memory_size -> ICECACHE_MEMORY_SIZE
bool IsSnakeCase(std::string_view key);

// "; did you mean X?" for the candidate nearest to `word` by edit distance, or "" when none is
// near. Dashes, underscores and case do not count.
std::string DidYouMean(std::string_view word, const std::vector<std::string>& candidates);

}  // namespace icecache::config
