#include "tests/bench/accuracy_cells.h"

#include <fstream>
#include <nlohmann/json.hpp>

namespace icecache {

using Json = nlohmann::ordered_json;

std::string FormatCell(const Cell& cell, const std::string& commit, const std::string& machine) {
  Json json;
  json["bench"] = "accuracy";
  json["model"] = cell.model;
  json["build"] = cell.build;
  json["task"] = cell.name.task;
  json["policy"] = cell.name.policy;
  json["budget"] = cell.name.budget;
  json["length"] = cell.name.length;
  json["seed"] = cell.name.seed;
  json["accuracy"] = cell.accuracy;
  json["questions"] = cell.questions;
  json["output_error"] = cell.output_error;
  json["output_error_p90"] = cell.output_error_p90;
  json["bytes_per_token"] = cell.bytes_per_token;
  json["ms_per_token"] = cell.ms_per_token;
  json["tokens_read"] = cell.tokens_read;
  json["pages"] = cell.pages;
  json["pages_fetched"] = cell.pages_fetched;
  json["pages_refetched"] = cell.pages_refetched;
  json["page_overlap"] = cell.page_overlap;
  json["tokens_per_page"] = cell.tokens_per_page;
  json["hot_tokens_per_page"] = cell.hot_tokens_per_page;
  json["build_ms"] = cell.build_ms;
  json["index_bytes"] = cell.index_bytes;
  json["error_by_turn"] = cell.error_by_turn;
  json["commit"] = commit;
  json["machine"] = machine;
  return json.dump();
}

Result<Cell> ParseCell(const std::string& line) {
  const Json json = Json::parse(line, nullptr, false);
  if (json.is_discarded() || !json.is_object()) return DataLoss("no JSON object");
  Cell cell;
  try {
    const auto number = [&json](const char* key) { return json.at(key).get<double>(); };
    cell.name = {json.at("task"), json.at("policy"), json.at("budget"), json.at("length"),
                 json.at("seed")};
    cell.model = json.at("model");
    cell.build = json.value("build", "");
    cell.accuracy = number("accuracy");
    cell.questions = json.at("questions");
    cell.output_error = number("output_error");
    cell.output_error_p90 = number("output_error_p90");
    cell.bytes_per_token = number("bytes_per_token");
    cell.ms_per_token = number("ms_per_token");
    cell.tokens_read = number("tokens_read");
    cell.pages = number("pages");
    cell.pages_fetched = number("pages_fetched");
    cell.pages_refetched = number("pages_refetched");
    cell.page_overlap = number("page_overlap");
    cell.tokens_per_page = number("tokens_per_page");
    cell.hot_tokens_per_page = number("hot_tokens_per_page");
    cell.build_ms = number("build_ms");
    cell.index_bytes = number("index_bytes");
    cell.error_by_turn = json.at("error_by_turn").get<std::vector<double>>();
  } catch (const nlohmann::json::exception& error) {
    return DataLoss(std::string("no cell of an accuracy table: ") + error.what());
  }
  return cell;
}

Result<std::map<CellName, Cell>> ReadCells(const std::string& path, const std::string& build,
                                           uint64_t* others) {
  *others = 0;
  std::map<CellName, Cell> cells;
  std::ifstream file(path);
  std::string line;
  for (int number = 1; std::getline(file, line); ++number) {
    if (line.empty()) continue;
    Result<Cell> cell = ParseCell(line);
    if (cell.ok()) {
      if (!build.empty() && cell->build != build) {
        ++*others;
        continue;
      }
      cells[cell->name] = std::move(cell).value();
      continue;
    }
    const bool last = file.peek() == std::ifstream::traits_type::eof();
    if (!last) return cell.status().WithContext(path + ":" + std::to_string(number));
  }
  return cells;
}

}  // namespace icecache
