#include "common/config_file.h"

#include <toml++/toml.h>

#include <algorithm>
#include <fstream>
#include <sstream>

#include "common/limits.h"

namespace icecache::config {
namespace {

using Kind = FileEntry::Kind;

std::string RealText(double value) {
  std::ostringstream text;
  text.precision(17);
  text << value;
  return text.str();
}

std::string Place(const std::string& path, const toml::source_region& at) {
  return path + ":" + std::to_string(at.begin.line);
}

std::vector<FileEntry> Entries(const toml::table& table, const std::string& path, int depth);

FileEntry Entry(const toml::node& node, const std::string& path, int depth) {
  FileEntry entry;
  if (const auto* text = node.as_string()) {
    entry.kind = Kind::kString;
    entry.values = {text->get()};
  } else if (const auto* number = node.as_integer()) {
    entry.kind = Kind::kInteger;
    entry.values = {std::to_string(number->get())};
  } else if (const auto* flag = node.as_boolean()) {
    entry.kind = Kind::kBool;
    entry.values = {flag->get() ? "true" : "false"};
  } else if (const auto* real = node.as_floating_point()) {
    entry.kind = Kind::kReal;
    entry.values = {RealText(real->get())};
  } else if (const auto* list = node.as_array();
             list != nullptr && (list->empty() || list->is_homogeneous(toml::node_type::string))) {
    entry.kind = Kind::kStrings;
    for (const auto& item : *list) entry.values.push_back(item.as_string()->get());
  } else if (const auto* table = node.as_table(); table != nullptr && depth < 2) {
    entry.kind = Kind::kTable;
    entry.children = Entries(*table, path, depth + 1);
  } else if (depth < 2 && node.is_array_of_tables()) {
    entry.kind = Kind::kTables;
    for (const auto& item : *node.as_array()) {
      entry.children.push_back(Entry(item, path, depth));
      entry.children.back().where = Place(path, item.source());
    }
  } else {
    entry.values = {node.is_array() ? "a list" : node.is_table() ? "a table" : "a date or time"};
  }
  return entry;
}

std::vector<FileEntry> Entries(const toml::table& table, const std::string& path, int depth) {
  std::vector<FileEntry> entries;
  for (const auto& [key, node] : table) {
    FileEntry entry = Entry(node, path, depth);
    entry.key = key.str();
    entry.where = Place(path, key.source());
    entries.push_back(std::move(entry));
  }
  return entries;
}

bool Accepts(ValueKind wanted, Kind found) {
  switch (wanted) {
    case ValueKind::kString:
      return found == Kind::kString;
    case ValueKind::kBool:
      return found == Kind::kBool;
    case ValueKind::kUnsigned:
      return found == Kind::kInteger;
    case ValueKind::kReal:
      return found == Kind::kInteger || found == Kind::kReal;
    case ValueKind::kSize:
    case ValueKind::kMillis:
      return found == Kind::kInteger || found == Kind::kString;
    case ValueKind::kList:
      return found == Kind::kStrings;
  }
  return false;
}

}  // namespace

Result<std::vector<FileEntry>> ParseToml(std::string_view text, const std::string& source) {
  try {
    return Entries(toml::parse(text, source), source, 1);
  } catch (const toml::parse_error& e) {
    return InvalidArgument(Place(source, e.source()) +
                           ": not TOML: " + std::string(e.description()));
  }
}

Result<std::vector<FileEntry>> ReadConfigFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string text(limits::kConfigFileBytesMax + 1, '\0');
  if (file) file.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (file.bad() || (!file && !file.eof())) {
    return NotFound("configuration file '" + path + "' cannot be read: check --config or " +
                    VariableName("config"));
  }
  text.resize(static_cast<size_t>(file.gcount()));
  if (text.size() > limits::kConfigFileBytesMax) {
    return InvalidArgument(path + ": more than " + std::to_string(limits::kConfigFileBytesMax) +
                           " bytes; is it a configuration file?");
  }
  return ParseToml(text, path);
}

Status AssignFromFile(Setting& setting, const FileEntry& entry) {
  if (Accepts(setting.kind, entry.kind)) return Assign(setting, entry.where, entry.values);
  std::string found = entry.kind == Kind::kStrings  ? "a list"
                      : entry.kind == Kind::kTable  ? "a table"
                      : entry.kind == Kind::kTables ? "a list of tables"
                                                    : entry.values[0];
  const char* form = setting.kind == ValueKind::kString ? " in quotes"
                     : setting.kind == ValueKind::kList ? R"(, written ["a", "b"])"
                                                        : "";
  return InvalidArgument(Refuse(setting, entry.where, found).message() + form);
}

}  // namespace icecache::config
