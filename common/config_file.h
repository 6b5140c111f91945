// Private to config.cc: a TOML file as plain entries with their places. toml++ stays behind
// config_file.cc.
#pragma once

#include <string>
#include <vector>

#include "common/config_values.h"
#include "common/status.h"

namespace icecache::config {

struct FileEntry {
  enum class Kind { kString, kInteger, kReal, kBool, kStrings, kTable, kOther };
  std::string key;
  std::string where;  // "server.toml:3"
  Kind kind = Kind::kOther;
  std::vector<std::string>
      values;  // one, or the elements of kStrings; of kOther: what it is, in words
  std::vector<FileEntry> children;  // of kTable
};

// NOT_FOUND when the file cannot be read, INVALID_ARGUMENT naming file:line when it is not TOML or
// larger than kConfigFileBytesMax. Tables are read two levels deep; deeper ones are kOther.
Result<std::vector<FileEntry>> ReadConfigFile(const std::string& path);

// Gives the setting the entry's value. Strict by kind, since verbose = "yes" is more likely a
// mistake than a wish.
Status AssignFromFile(Setting& setting, const FileEntry& entry);

}  // namespace icecache::config
