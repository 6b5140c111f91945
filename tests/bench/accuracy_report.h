// A table of accuracy cells as a page for people: Markdown in the form papers use, and plots.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "tests/bench/accuracy_cells.h"

namespace icecache {

// Per length: method x budget in rows, tasks in columns, percent as mean +- standard deviation over
// seeds; mean over tasks, and retention (its ratio to `full`); then output error, bytes and CPU
// time a token, tokens read. Methods keep the order of `methods`; those without cells are left out.
std::string FormatAccuracyTable(const std::map<CellName, Cell>& cells,
                                const std::vector<std::string>& methods);

// Writes folder/accuracy.md and the plots accuracy_by_budget, error_by_bytes, error_growth,
// page_overlap and page_transfer (.svg), for the longest length. UNAVAILABLE naming the file.
Status WriteAccuracyReport(const std::map<CellName, Cell>& cells,
                           const std::vector<std::string>& methods, const std::string& folder);

}  // namespace icecache
