// The cells of an accuracy table: their names, their file, and what one holds.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "common/status.h"

namespace icecache {

struct CellName {
  std::string task, policy;
  uint32_t budget = 0;  // tokens per kv head, sinks and window included; 0: full
  uint32_t length = 0;
  uint64_t seed = 0;
  friend auto operator<=>(const CellName&, const CellName&) = default;
};

struct Cell {
  CellName name;
  std::string model;
  std::string build;  // BuildName() of the program that made it
  double accuracy = 0;  // mean score, 0 to 1
  uint32_t questions = 0;
  double output_error = 0;  // mean over measured steps, layers, query heads: |o - full| / |full|
  double output_error_p90 = 0;
  std::vector<double> error_by_turn;  // mean error of each measured turn, in order
  double bytes_per_token = 0;         // that would move to a worker which keeps 3 selections
  double ms_per_token = 0;            // CPU, model included, of steps that were not measured
  double tokens_read = 0;             // rows of K read exactly, per selection
  double pages = 0, pages_fetched = 0, pages_refetched = 0;  // per selection
  double page_overlap = 0;  // share of pages that the selection before had, too
  double tokens_per_page = 0, hot_tokens_per_page = 0;
  double build_ms = 0;  // CPU, of the whole index
  double index_bytes = 0;
};

std::string FormatCell(const Cell& cell, const std::string& commit, const std::string& machine);
// DATA_LOSS when the line is none.
Result<Cell> ParseCell(const std::string& line);

// Cells of a file, by name; the last of equals counts. Those that another build than `build` made
// are left out, and counted in *others: its policies may answer otherwise. Empty: any build will do.
// A last line that was cut off is left out (its run was interrupted); any other bad line is
// DATA_LOSS naming its number. No file: none.
Result<std::map<CellName, Cell>> ReadCells(const std::string& path, const std::string& build,
                                           uint64_t* others);

}  // namespace icecache
