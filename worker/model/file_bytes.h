// FileBytes: a file mapped read-only. Pages are shared with every process that maps the same file.
//
// Thread: immutable, any. A file that is truncated while mapped raises SIGBUS on access: replace
// model files by rename, never in place.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "common/status.h"

namespace icecache {

class FileBytes {
 public:
  // NOT_FOUND, PERMISSION_DENIED or INTERNAL with the path and the system's reason.
  static Result<std::unique_ptr<FileBytes>> Map(const std::string& path);
  ~FileBytes();
  FileBytes(const FileBytes&) = delete;
  FileBytes& operator=(const FileBytes&) = delete;

  std::span<const std::byte> bytes() const { return bytes_; }
  std::string_view text() const {
    return {reinterpret_cast<const char*>(bytes_.data()), bytes_.size()};
  }
  const std::string& path() const { return path_; }

 private:
  FileBytes(std::string path, std::span<const std::byte> bytes)
      : path_(std::move(path)), bytes_(bytes) {}

  const std::string path_;
  const std::span<const std::byte> bytes_;
};

// True when `path` names something that can be opened as a file.
bool FileExists(const std::string& path);

}  // namespace icecache
