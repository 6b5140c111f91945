// One table of accuracy: every task x length x seed x method x budget is a cell, one JSON object in
// a file that grows. What the file holds already is not run again.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/status.h"
#include "tests/bench/accuracy_method.h"
#include "tests/bench/tasks/task.h"

namespace icecache {

struct AccuracyOptions {
  std::string model;
  std::string kv_dtype = "f16";
  std::vector<std::string> tasks, methods;
  std::vector<uint32_t> budgets, lengths;
  uint32_t seeds = 3;
  uint32_t first_seed = 1;
  uint32_t questions = 16;
  uint32_t write_tokens = 256;
  uint32_t sink_tokens = 16, window_tokens = 16;
  uint32_t threads = 1;
  std::vector<std::string> text_files;
  std::string data;   // folder of LongBench or QA files
  std::string cache;  // folder of documents that were read before
  std::string out;    // the table; empty: stdout only
  bool any_build = false;  // cells of other builds of this program count, too
  bool json = false;  // every cell to stdout, too
  std::string
      report;  // folder for the table as a page, with plots (accuracy_report.h); empty: none
  bool progress = false;
};

// Runs what is missing. CANCELLED on SIGINT, with everything finished so far in the file.
Status RunAccuracy(const AccuracyOptions& options);

}  // namespace icecache
