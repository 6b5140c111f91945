// Line plots as SVG text: enough for the report of an accuracy table.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace icecache {

struct PlotLine {
  std::string name;
  std::vector<std::pair<double, double>> points;  // ascending x
};

struct Plot {
  std::string title, x_label, y_label;
  bool log_x = false, log_y = false;  // points that are not positive are then left out
  std::vector<PlotLine> lines;
};

// A whole SVG document; without any point, axes from 0 to 1.
std::string DrawSvg(const Plot& plot);

}  // namespace icecache
