#include "common/config_values.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <numeric>

#include "common/size.h"

namespace icecache::config {
namespace {

template <typename T>
std::optional<T> ParseNumber(std::string_view text) {
  T value{};
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (text.empty() || error != std::errc() || stop != end) return std::nullopt;
  return value;
}

std::optional<bool> ParseBool(std::string_view text) {
  std::string lower(text);
  for (char& c : lower) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  if (lower == "true" || lower == "yes" || lower == "on" || lower == "1") return true;
  if (lower == "false" || lower == "no" || lower == "off" || lower == "0") return false;
  return std::nullopt;
}

// A setting of one value: parse(text) gives an optional that is stored in *field.
template <typename T, typename Parse>
Setting Scalar(ValueKind kind, std::string expects, T* field, Parse parse) {
  Setting s;
  s.kind = kind;
  s.expects = std::move(expects);
  s.assign = [field, parse](const std::vector<std::string>& values) {
    if (values.size() != 1) return false;
    const auto value = parse(values[0]);
    if (value.has_value()) *field = *value;
    return value.has_value();
  };
  return s;
}

std::string Real(double value) {
  char buffer[40];
  const auto [end, error] = std::to_chars(buffer, buffer + sizeof buffer, value);
  KV_CHECK(error == std::errc());
  std::string text(buffer, end);
  // TOML tells a float from an integer by its point or exponent.
  return text.find_first_of(".en") == std::string::npos ? text + ".0" : text;
}

size_t EditDistance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t above = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, diagonal + (a[i - 1] == b[j - 1] ? 0 : 1)});
      diagonal = above;
    }
  }
  return row[b.size()];
}

std::string Bare(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (c == '-' || c == '_') continue;
    out += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  }
  return out;
}

}  // namespace

Status Refuse(const Setting& setting, const std::string& source, const std::string& value) {
  const std::string shown = setting.secret ? "(hidden)" : "'" + value + "'";
  return InvalidArgument(source + ": " + setting.key + " = " + shown + ", expected " +
                         setting.expects);
}

Status Assign(Setting& setting, std::string source, const std::vector<std::string>& values) {
  if (!setting.assign(values)) {
    return Refuse(setting, source, values.empty() ? "" : values.back());
  }
  setting.source = std::move(source);
  return OkStatus();
}

Setting StringSetting(std::string* field) {
  Setting s = Scalar(ValueKind::kString, "text", field,
                     [](const std::string& text) { return std::optional<std::string>(text); });
  s.print = [field] { return TomlQuoted(*field); };
  return s;
}

Setting BoolSetting(bool* field) {
  Setting s = Scalar(ValueKind::kBool, "true or false", field, ParseBool);
  s.print = [field] { return std::string(*field ? "true" : "false"); };
  return s;
}

Setting UnsignedSetting(uint32_t* field, uint32_t min, uint32_t max) {
  Setting s = Scalar(ValueKind::kUnsigned,
                     "a whole number " + std::to_string(min) + ".." + std::to_string(max), field,
                     [min, max](const std::string& text) {
                       const auto value = ParseNumber<uint32_t>(text);
                       return value && *value >= min && *value <= max ? value : std::nullopt;
                     });
  s.print = [field] { return std::to_string(*field); };
  return s;
}

Setting UnsignedSetting(uint64_t* field) {
  // TOML integers are signed: what is above could be set by a flag and not be printed.
  Setting s = Scalar(ValueKind::kUnsigned, "a whole number 0..9223372036854775807", field,
                     [](const std::string& text) {
                       const auto value = ParseNumber<uint64_t>(text);
                       return value && *value <= INT64_MAX ? value : std::nullopt;
                     });
  s.print = [field] { return std::to_string(*field); };
  return s;
}

Setting RealSetting(double* field, double min, double max) {
  Setting s = Scalar(ValueKind::kReal, "a number " + Real(min) + ".." + Real(max), field,
                     [min, max](const std::string& text) {
                       const auto value = ParseNumber<double>(text);
                       return value && *value >= min && *value <= max ? value : std::nullopt;
                     });
  s.print = [field] { return Real(*field); };
  return s;
}

Setting SizeSetting(uint64_t* bytes) {
  Setting s = Scalar(ValueKind::kSize, "a size such as 4GiB, 512MiB or 65536", bytes,
                     [](const std::string& text) {
                       const auto size = ParseSize(text);
                       return size.ok() ? std::optional<uint64_t>(*size) : std::nullopt;
                     });
  s.print = [bytes] {
    const std::string pretty = FormatSize(*bytes);
    const auto back = ParseSize(pretty);
    return back.ok() && *back == *bytes ? TomlQuoted(pretty) : std::to_string(*bytes);
  };
  return s;
}

Setting MillisSetting(uint32_t* ms) {
  Setting s = Scalar(ValueKind::kMillis, "a time such as 250, 250ms or 2s", ms,
                     [](const std::string& text) { return ParseMillis(text); });
  s.print = [ms] { return TomlQuoted(std::to_string(*ms) + "ms"); };
  return s;
}

Setting ListSetting(std::vector<std::string>* field) {
  Setting s;
  s.kind = ValueKind::kList;
  s.expects = "a list such as a,b,c";
  s.assign = [field](const std::vector<std::string>& values) {
    *field = values;
    return true;
  };
  s.print = [field] {
    std::string text;
    for (const std::string& item : *field) text += (text.empty() ? "" : ", ") + TomlQuoted(item);
    return "[" + text + "]";
  };
  return s;
}

std::optional<uint32_t> ParseMillis(std::string_view text) {
  double scale = 1;
  if (text.ends_with("ms")) {
    text.remove_suffix(2);
  } else if (text.ends_with("s")) {
    text.remove_suffix(1);
    scale = 1000;
  }
  const auto value = ParseNumber<double>(text);
  if (!value || !std::isfinite(*value)) return std::nullopt;
  const double ms = std::round(*value * scale * 1e6) / 1e6;  // 1.1s is 1100, not 1100.0000000000002
  if (ms < 0 || ms > UINT32_MAX || ms != std::floor(ms)) return std::nullopt;
  return static_cast<uint32_t>(ms);
}

std::string TomlQuoted(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    const auto u = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (u < 0x20 || u == 0x7f) {
      char buffer[8];
      std::snprintf(buffer, sizeof buffer, "\\u%04x", static_cast<unsigned>(u));
      out += buffer;
    } else {
      out += c;
    }
  }
  return out + '"';
}

std::vector<std::string> SplitList(std::string_view text) {
  std::vector<std::string> items;
  if (text.empty()) return items;
  for (size_t at = 0;;) {
    const size_t comma = text.find(',', at);
    items.emplace_back(text.substr(at, comma == std::string_view::npos ? comma : comma - at));
    if (comma == std::string_view::npos) return items;
    at = comma + 1;
  }
}

std::string FlagName(std::string_view key) {
  std::string flag = "--" + std::string(key);
  std::replace(flag.begin(), flag.end(), '_', '-');
  return flag;
}

std::string VariableName(std::string_view key) {
  std::string name = "ICECACHE_";
  for (const char c : key) {
    name += static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  }
  return name;
}

bool IsSnakeCase(std::string_view key) {
  return !key.empty() && key[0] >= 'a' && key[0] <= 'z' &&
         std::all_of(key.begin(), key.end(), [](char c) {
           return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_';
         });
}

std::string DidYouMean(std::string_view word, const std::vector<std::string>& candidates) {
  const std::string bare = Bare(word);
  const std::string* best = nullptr;
  size_t least = std::max<size_t>(2, bare.size() / 3) + 1;
  for (const std::string& candidate : candidates) {
    const size_t distance = EditDistance(bare, Bare(candidate));
    if (distance >= least) continue;
    least = distance;
    best = &candidate;
  }
  return best == nullptr ? "" : "; did you mean " + *best + "?";
}

}  // namespace icecache::config
