#include "tests/bench/accuracy_plot.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace icecache {
namespace {

constexpr double kWidth = 860, kHeight = 460, kLeft = 76, kRight = 280, kTop = 40, kBottom = 54;
const char* const kColours[] = {"#1f6fb2", "#d1582a", "#2f8f4e", "#8a4fb0", "#b0862a",
                                "#c23b6e", "#3aa6a6", "#666666", "#6b8e23", "#7a4a2a"};

std::string Format(const char* format, double a) {
  char text[64];
  std::snprintf(text, sizeof(text), format, a);
  return text;
}

std::string Escape(const std::string& text) {
  std::string escaped;
  for (const char c : text) {
    if (c == '<') {
      escaped += "&lt;";
    } else if (c == '&') {
      escaped += "&amp;";
    } else {
      escaped += c;
    }
  }
  return escaped;
}

// One axis: data to pixels, and where its ticks are.
class Axis {
 public:
  Axis(bool log, double from, double to) : log_(log), from_(from), to_(to) {}
  void Add(double value) {
    if (!Shown(value)) return;
    low_ = std::min(low_, Scale(value));
    high_ = std::max(high_, Scale(value));
  }
  // After the last Add: some air, and zero at the bottom of a linear axis of positive values.
  void Close() {
    if (low_ > high_) low_ = 0, high_ = 1;
    if (!log_ && low_ > 0) low_ = 0;
    if (high_ == low_) high_ = low_ + 1;
    high_ += 0.04 * (high_ - low_);
  }
  bool Shown(double value) const { return std::isfinite(value) && (!log_ || value > 0); }
  double At(double value) const {
    return from_ + (Scale(value) - low_) / (high_ - low_) * (to_ - from_);
  }
  std::vector<double> Ticks() const {
    std::vector<double> ticks;
    if (log_) {
      for (double decade = std::floor(low_); decade <= high_; ++decade)
        for (const double digit : {1.0, 2.0, 5.0}) {
          const double value = digit * std::pow(10.0, decade);
          if (std::log10(value) >= low_ - 1e-9 && std::log10(value) <= high_)
            ticks.push_back(value);
        }
      return ticks;
    }
    double step = std::pow(10.0, std::floor(std::log10((high_ - low_) / 4)));
    if ((high_ - low_) / step > 10) step *= 2.5;
    for (double value = std::ceil(low_ / step) * step; value <= high_; value += step)
      ticks.push_back(std::abs(value) < step * 1e-6 ? 0 : value);
    return ticks;
  }

 private:
  double Scale(double value) const { return log_ ? std::log10(value) : value; }

  const bool log_;
  const double from_, to_;
  double low_ = 1e300, high_ = -1e300;
};

std::string Text(double x, double y, const char* anchor, const std::string& text) {
  return "<text x='" + Format("%.1f", x) + "' y='" + Format("%.1f", y) + "' text-anchor='" +
         anchor + "'>" + Escape(text) + "</text>\n";
}

std::string Stroke(double x1, double y1, double x2, double y2, const char* colour) {
  return "<line x1='" + Format("%.1f", x1) + "' y1='" + Format("%.1f", y1) + "' x2='" +
         Format("%.1f", x2) + "' y2='" + Format("%.1f", y2) + "' stroke='" + colour + "'/>\n";
}

std::string Frame(const Plot& plot, const Axis& x, const Axis& y) {
  const double bottom = kHeight - kBottom, right = kWidth - kRight;
  std::string svg;
  for (const double tick : x.Ticks()) {
    svg += Stroke(x.At(tick), kTop, x.At(tick), bottom, "#e4e4e4");
    svg += Text(x.At(tick), bottom + 18, "middle", Format("%.4g", tick));
  }
  for (const double tick : y.Ticks()) {
    svg += Stroke(kLeft, y.At(tick), right, y.At(tick), "#e4e4e4");
    svg += Text(kLeft - 8, y.At(tick) + 4, "end", Format("%.4g", tick));
  }
  svg += Stroke(kLeft, bottom, right, bottom, "#333") + Stroke(kLeft, kTop, kLeft, bottom, "#333");
  svg += Text((kLeft + right) / 2, kHeight - 14, "middle", plot.x_label);
  svg += "<g transform='translate(18 " + Format("%.1f", (kTop + bottom) / 2) + ") rotate(-90)'>" +
         Text(0, 0, "middle", plot.y_label) + "</g>\n";
  return svg + Text(kLeft, 24, "start", plot.title);
}

}  // namespace

std::string DrawSvg(const Plot& plot) {
  Axis x(plot.log_x, kLeft, kWidth - kRight), y(plot.log_y, kHeight - kBottom, kTop);
  for (const PlotLine& line : plot.lines) {
    for (const auto& [px, py] : line.points) {
      if (!x.Shown(px) || !y.Shown(py)) continue;
      x.Add(px);
      y.Add(py);
    }
  }
  x.Close();
  y.Close();
  std::string svg = "<svg xmlns='http://www.w3.org/2000/svg' width='" + Format("%.0f", kWidth) +
                    "' height='" + Format("%.0f", kHeight) +
                    "' font-family='sans-serif' font-size='12'>\n"
                    "<rect width='100%' height='100%' fill='white'/>\n" +
                    Frame(plot, x, y);
  double legend = kTop + 6;
  for (size_t i = 0; i < plot.lines.size(); ++i) {
    const char* colour = kColours[i % std::size(kColours)];
    const std::string dash = i >= std::size(kColours) ? " stroke-dasharray='5 3'" : "";
    std::string path, dots;
    for (const auto& [px, py] : plot.lines[i].points) {
      if (!x.Shown(px) || !y.Shown(py)) continue;
      const std::string at = Format("%.1f", x.At(px)) + "," + Format("%.1f", y.At(py));
      path += (path.empty() ? "" : " ") + at;
      if (plot.lines[i].points.size() <= 12)
        dots += "<circle cx='" + Format("%.1f", x.At(px)) + "' cy='" + Format("%.1f", y.At(py)) +
                "' r='3' fill='" + colour + "'/>\n";
    }
    svg += "<polyline points='" + path + "' fill='none' stroke='" + colour +
           "' stroke-width='1.8'" + dash + "/>\n" + dots;
    svg += "<line x1='" + Format("%.1f", kWidth - kRight + 14) + "' x2='" +
           Format("%.1f", kWidth - kRight + 38) + "' y1='" + Format("%.1f", legend) + "' y2='" +
           Format("%.1f", legend) + "' stroke='" + colour + "' stroke-width='1.8'" + dash + "/>\n" +
           Text(kWidth - kRight + 44, legend + 4, "start", plot.lines[i].name);
    legend += 17;
  }
  return svg + "</svg>\n";
}

}  // namespace icecache
