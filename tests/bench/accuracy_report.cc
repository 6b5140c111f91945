#include "tests/bench/accuracy_report.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <numeric>
#include <set>

#include "tests/bench/accuracy_plot.h"
#include "tests/bench/measure.h"

namespace icecache {
namespace {

using Field = std::function<double(const Cell&)>;

class Report {
 public:
  Report(const std::map<CellName, Cell>& cells, const std::vector<std::string>& methods)
      : cells_(cells), methods_(methods) {
    for (const auto& [name, cell] : cells) {
      lengths_.insert(name.length);
      tasks_.insert(name.task);
      if (name.budget > 0) budgets_.insert(name.budget);
    }
  }

  std::string Table(uint32_t length) const;
  Plot ByBudget(const char* title, const char* label, const Field& field) const;
  Plot ErrorByBytes() const;
  Plot ErrorGrowth() const;
  const std::set<uint32_t>& lengths() const { return lengths_; }

 private:
  // One value per seed that has a cell.
  std::vector<double> Values(const std::string& task, const std::string& method, uint32_t budget,
                             uint32_t length, const Field& field) const {
    std::vector<double> values;
    for (const auto& [name, cell] : cells_) {
      if (name.task == task && name.policy == method && name.budget == budget &&
          name.length == length)
        values.push_back(field(cell));
    }
    return values;
  }
  // Mean over tasks of the means over seeds; NaN without cells.
  double MeanOf(const std::string& method, uint32_t budget, uint32_t length,
                const Field& field) const {
    std::vector<double> means;
    for (const std::string& task : tasks_) {
      const std::vector<double> values = Values(task, method, budget, length, field);
      if (!values.empty()) means.push_back(Mean(values));
    }
    return means.empty() ? NAN : Mean(means);
  }
  std::string Row(const std::string& method, uint32_t budget, uint32_t length) const;
  std::vector<double> ErrorByTurn(const std::string& method, double* step) const;
  uint32_t longest() const { return lengths_.empty() ? 0 : *lengths_.rbegin(); }

  const std::map<CellName, Cell>& cells_;
  const std::vector<std::string>& methods_;
  std::set<uint32_t> lengths_, budgets_;
  std::set<std::string> tasks_;
};

std::string Text(const char* format, double a, double b = 0) {
  char text[80];
  std::snprintf(text, sizeof(text), format, a, b);
  return text;
}

double Deviation(const std::vector<double>& values) {
  if (values.size() < 2) return 0;
  const double mean = Mean(values);
  double sum = 0;
  for (const double value : values) sum += (value - mean) * (value - mean);
  return std::sqrt(sum / static_cast<double>(values.size() - 1));
}

double AccuracyOf(const Cell& cell) { return cell.accuracy; }

std::string Report::Row(const std::string& method, uint32_t budget, uint32_t length) const {
  const double mean = MeanOf(method, budget, length, AccuracyOf);
  if (std::isnan(mean)) return "";
  std::string row = "| " + method + " | " + (budget == 0 ? "all" : std::to_string(budget)) + " |";
  for (const std::string& task : tasks_) {
    const std::vector<double> values = Values(task, method, budget, length, AccuracyOf);
    row += values.empty() ? " - |"
                          : Text(" %.1f ± %.1f |", 100 * Mean(values), 100 * Deviation(values));
  }
  const double full = MeanOf("full", 0, length, AccuracyOf);
  row += Text(" %.1f |", 100 * mean);
  row += std::isnan(full) || full == 0 ? " - |" : Text(" %.1f %% |", 100 * mean / full);
  const auto of = [&](const Field& field) { return MeanOf(method, budget, length, field); };
  row += Text(" %.3f |", of([](const Cell& c) { return c.output_error; }));
  row += Text(" %.1f |", of([](const Cell& c) { return c.bytes_per_token / 1024; }));
  row += Text(" %.0f |", of([](const Cell& c) { return c.tokens_read; }));
  return row + Text(" %.2f |\n", of([](const Cell& c) { return c.ms_per_token; }));
}

std::string Report::Table(uint32_t length) const {
  std::string table = "\n## " + std::to_string(length) + " tokens\n\n| method | budget |";
  std::string line = "|---|---|";
  for (const std::string& task : tasks_) {
    table += " " + task + " |";
    line += "---|";
  }
  table += " mean | retention | output error | KiB/token | tokens read | ms/token |\n" + line +
           "---|---|---|---|---|---|\n";
  for (const std::string& method : methods_) {
    table += Row(method, 0, length);
    for (const uint32_t budget : budgets_) table += Row(method, budget, length);
  }
  return table;
}

Plot Report::ByBudget(const char* title, const char* label, const Field& field) const {
  Plot plot{std::string(title) + ", " + std::to_string(longest()) + " tokens",
            "tokens per kv head",
            label,
            true,
            false,
            {}};
  for (const std::string& method : methods_) {
    PlotLine line{method, {}};
    for (const uint32_t budget : budgets_) {
      const double value = MeanOf(method, budget, longest(), field);
      if (!std::isnan(value)) line.points.emplace_back(budget, value);
    }
    if (!line.points.empty()) plot.lines.push_back(std::move(line));
  }
  return plot;
}

Plot Report::ErrorByBytes() const {
  Plot plot{"Output error by transfer, " + std::to_string(longest()) + " tokens",
            "KiB moved per token",
            "relative output error",
            true,
            true,
            {}};
  for (const std::string& method : methods_) {
    PlotLine line{method, {}};
    for (const uint32_t budget : budgets_) {
      const double bytes =
          MeanOf(method, budget, longest(), [](const Cell& c) { return c.bytes_per_token / 1024; });
      const double error =
          MeanOf(method, budget, longest(), [](const Cell& c) { return c.output_error; });
      if (bytes > 0) line.points.emplace_back(bytes, error);
    }
    if (!line.points.empty()) plot.lines.push_back(std::move(line));
  }
  return plot;
}

// Mean error of every measured turn over the cells of sequences that grow, at the largest budget;
// empty without any. *step: tokens from one to the next.
std::vector<double> Report::ErrorByTurn(const std::string& method, double* step) const {
  constexpr size_t kTurnsMin = 32;
  std::vector<double> mean;
  double count = 0;
  for (const auto& [name, cell] : cells_) {
    if (name.policy != method || name.budget == 0 || name.budget != *budgets_.rbegin() ||
        cell.error_by_turn.size() < kTurnsMin)
      continue;
    mean.resize(std::max(mean.size(), cell.error_by_turn.size()));
    for (size_t i = 0; i < cell.error_by_turn.size(); ++i) mean[i] += cell.error_by_turn[i];
    *step = static_cast<double>(cell.questions) / static_cast<double>(cell.error_by_turn.size());
    ++count;
  }
  for (double& error : mean) error /= count;
  return mean;
}

// Over the tokens that were added, eight turns a point. Text that is harder is so for every method:
// where the oracle has cells, too, errors are shown in units of its own in the same turns.
Plot Report::ErrorGrowth() const {
  constexpr size_t kTurns = 8;
  double step = 1;
  const std::vector<double> oracle = ErrorByTurn("top_k", &step);
  Plot plot{"Output error while a sequence grows",
            "tokens after the document",
            oracle.empty() ? "relative output error" : "output error / that of top_k",
            false,
            false,
            {}};
  for (const std::string& method : methods_) {
    const std::vector<double> error = ErrorByTurn(method, &step);
    PlotLine line{method, {}};
    for (size_t i = 0; i + kTurns <= error.size(); i += kTurns) {
      const auto sum = [&](const std::vector<double>& of) {
        const auto begin = of.begin() + static_cast<ptrdiff_t>(i);
        return std::accumulate(begin, begin + kTurns, 0.0);
      };
      const double unit = oracle.size() == error.size() ? sum(oracle) : kTurns;
      line.points.emplace_back(static_cast<double>(i + kTurns / 2) * step, sum(error) / unit);
    }
    if (!line.points.empty()) plot.lines.push_back(std::move(line));
  }
  return plot;
}

Status WriteText(const std::string& path, const std::string& text) {
  std::ofstream file(path);
  file << text;
  file.close();
  return file ? OkStatus() : Unavailable("cannot write " + path);
}

}  // namespace

std::string FormatAccuracyTable(const std::map<CellName, Cell>& cells,
                                const std::vector<std::string>& methods) {
  const Report report(cells, methods);
  std::string text;
  for (const uint32_t length : report.lengths()) text += report.Table(length);
  return text;
}

Status WriteAccuracyReport(const std::map<CellName, Cell>& cells,
                           const std::vector<std::string>& methods, const std::string& folder) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  const Report report(cells, methods);
  const std::string head =
      "# Accuracy\n\nPercent of answers that are right, mean ± standard deviation over seeds; "
      "retention is the mean over tasks against full KV. Budgets count sinks and window.\n";
  KV_RETURN_IF_ERROR(
      WriteText(folder + "/accuracy.md", head + FormatAccuracyTable(cells, methods)));
  const auto draw = [&folder](const char* name, const Plot& plot) {
    return WriteText(folder + "/" + name + ".svg", DrawSvg(plot));
  };
  KV_RETURN_IF_ERROR(
      draw("accuracy_by_budget",
           report.ByBudget("Accuracy", "share of answers that are right", AccuracyOf)));
  KV_RETURN_IF_ERROR(draw("error_by_bytes", report.ErrorByBytes()));
  KV_RETURN_IF_ERROR(draw("error_growth", report.ErrorGrowth()));
  KV_RETURN_IF_ERROR(
      draw("page_overlap",
           report.ByBudget("Pages that the step before had, too", "share of returned pages",
                           [](const Cell& c) { return c.pages > 0 ? c.page_overlap : NAN; })));
  return draw("page_transfer",
              report.ByBudget("Pages fetched per step", "pages per slice and step",
                              [](const Cell& c) { return c.pages > 0 ? c.pages_fetched : NAN; }));
}

}  // namespace icecache
