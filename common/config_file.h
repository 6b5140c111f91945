// A TOML file as plain entries with their places, for settings (config.cc) and for other files of
// an operator's. toml++ stays behind config_file.cc. Any thread.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "common/config_values.h"
#include "common/status.h"

namespace icecache::config {

struct FileEntry {
  enum class Kind { kString, kInteger, kReal, kBool, kStrings, kTable, kTables, kOther };
  std::string key;
  std::string where;  // "server.toml:3"
  Kind kind = Kind::kOther;
  // One, or the elements of kStrings; of kOther: what it is, in words.
  std::vector<std::string> values;
  std::vector<FileEntry> children;  // of kTable; of kTables (an array of tables): the tables
};

// INVALID_ARGUMENT naming source:line when it is not TOML. Tables are read two levels deep; deeper
// ones are kOther. Entries of a table are in the order of their names.
Result<std::vector<FileEntry>> ParseToml(std::string_view text, const std::string& source);

// ParseToml of a file. NOT_FOUND when it cannot be read, INVALID_ARGUMENT when it is larger than
// kConfigFileBytesMax.
Result<std::vector<FileEntry>> ReadConfigFile(const std::string& path);

// Gives the setting the entry's value. Strict by kind, since verbose = "yes" is more likely a
// mistake than a wish.
Status AssignFromFile(Setting& setting, const FileEntry& entry);

}  // namespace icecache::config
