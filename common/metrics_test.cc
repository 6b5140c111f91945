#include "common/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <sstream>
#include <thread>
#include <vector>

namespace icecache {
namespace {

using testing::HasSubstr;

std::vector<std::string> Lines(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) lines.push_back(line);
  return lines;
}

TEST(Metrics, RendersCountersAndGaugesAsPrometheusText) {
  MetricsRegistry registry;
  registry.GetCounter("icecache_selects_total", "Selections answered.").Add(3);
  registry.GetGauge("icecache_pages", "Pages held.", {{"tier", "warm"}}).Set(-7);
  registry.GetGauge("icecache_pages", "Pages held.", {{"tier", "cold"}}).Add(2);
  EXPECT_EQ(registry.RenderPrometheus(),
            "# HELP icecache_pages Pages held.\n"
            "# TYPE icecache_pages gauge\n"
            "icecache_pages{tier=\"cold\"} 2\n"
            "icecache_pages{tier=\"warm\"} -7\n"
            "# HELP icecache_selects_total Selections answered.\n"
            "# TYPE icecache_selects_total counter\n"
            "icecache_selects_total 3\n");
}

TEST(Metrics, SameNameAndLabelsAreOneMetric) {
  MetricsRegistry registry;
  Counter& a = registry.GetCounter("c_total", "first help", {{"tenant", "x"}});
  EXPECT_EQ(&a, &registry.GetCounter("c_total", "other help", {{"tenant", "x"}}));
  EXPECT_NE(&a, &registry.GetCounter("c_total", "", {{"tenant", "y"}}));
  EXPECT_THAT(registry.RenderPrometheus(), HasSubstr("# HELP c_total first help\n"));
}

TEST(Metrics, CountersOfSecondsCountNanosecondsAndShowSeconds) {
  MetricsRegistry registry;
  registry.GetCounter("busy_seconds_total", "Time.").Set(1'250'000'000);
  EXPECT_THAT(registry.RenderPrometheus(), testing::HasSubstr("\nbusy_seconds_total 1.25\n"));
}

TEST(Metrics, LabelValuesAreEscaped) {
  MetricsRegistry registry;
  registry.GetCounter("c_total", "h", {{"tenant", "a\"b\\c\nd"}, {"op", "select"}}).Add();
  EXPECT_THAT(registry.RenderPrometheus(),
              HasSubstr("c_total{tenant=\"a\\\"b\\\\c\\nd\",op=\"select\"} 1\n"));
}

TEST(Metrics, HistogramBucketsAreCumulativeAndInclusive) {
  Histogram h;
  h.ObserveSeconds(0);
  h.ObserveSeconds(1e-6);      // le 1 us
  h.ObserveSeconds(1.001e-6);  // le 2 us
  h.ObserveSeconds(4e-6);      // le 4 us
  h.ObserveSeconds(100);       // +Inf
  EXPECT_EQ(h.bucket(0), 2u);
  EXPECT_EQ(h.bucket(1), 1u);
  EXPECT_EQ(h.bucket(2), 1u);
  EXPECT_EQ(h.bucket(Histogram::kBuckets), 1u);
  EXPECT_EQ(h.count(), 5u);
  EXPECT_NEAR(h.sum_seconds(), 100.000006, 1e-6);
}

TEST(Metrics, HistogramTakesAnyNumber) {
  Histogram h;
  for (const double x : {-1.0, std::nan(""), 1e300, double{INFINITY}, -double{INFINITY}}) {
    h.ObserveSeconds(x);
  }
  EXPECT_EQ(h.count(), 5u);
  EXPECT_EQ(h.bucket(0), 3u);
  EXPECT_EQ(h.bucket(Histogram::kBuckets), 2u);
}

TEST(Metrics, RendersHistogramsWithBoundsInSeconds) {
  MetricsRegistry registry;
  Histogram& h = registry.GetHistogram("icecache_select_seconds", "Time.", {{"layer", "0"}});
  h.ObserveSeconds(1.5e-6);
  h.ObserveSeconds(3);
  const auto lines = Lines(registry.RenderPrometheus());
  ASSERT_EQ(lines.size(), 2u + Histogram::kBuckets + 1 + 2);
  EXPECT_EQ(lines[1], "# TYPE icecache_select_seconds histogram");
  EXPECT_EQ(lines[2], "icecache_select_seconds_bucket{layer=\"0\",le=\"1e-06\"} 0");
  EXPECT_EQ(lines[3], "icecache_select_seconds_bucket{layer=\"0\",le=\"2e-06\"} 1");
  EXPECT_EQ(lines[25], "icecache_select_seconds_bucket{layer=\"0\",le=\"8.388608\"} 2");
  EXPECT_EQ(lines[26], "icecache_select_seconds_bucket{layer=\"0\",le=\"+Inf\"} 2");
  EXPECT_EQ(lines[27], "icecache_select_seconds_sum{layer=\"0\"} 3.0000015");
  EXPECT_EQ(lines[28], "icecache_select_seconds_count{layer=\"0\"} 2");
}

TEST(Metrics, ManyThreadsCountEverything) {
  MetricsRegistry registry;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 1000; ++i) {
        registry.GetCounter("c_total", "h").Add();
        registry.GetHistogram("h_seconds", "h").ObserveSeconds(1e-5);
      }
    });
  }
  for (auto& t : threads) t.join();
  EXPECT_EQ(registry.GetCounter("c_total", "h").value(), 4000u);
  EXPECT_EQ(registry.GetHistogram("h_seconds", "h").count(), 4000u);
}

TEST(MetricsDeathTest, ANameIsOfOneKindForEver) {
  MetricsRegistry registry;
  registry.GetCounter("x", "h");
  EXPECT_DEATH(registry.GetGauge("x", "h"), "invariant");
}

}  // namespace
}  // namespace icecache
