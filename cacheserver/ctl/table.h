// Columns of text, aligned, for people; scripts use --json.
#pragma once

#include <string>
#include <vector>

namespace icecache {

class Table {
 public:
  explicit Table(std::vector<std::string> headers) : rows_{std::move(headers)} {}
  // As many cells as there are headers (KV_CHECK). Cells that look like numbers or sizes stand at
  // the right.
  void Add(std::vector<std::string> cells);
  size_t row_count() const { return rows_.size() - 1; }
  std::string Render() const;

 private:
  std::vector<std::vector<std::string>> rows_;  // the first: headers
};

}  // namespace icecache
