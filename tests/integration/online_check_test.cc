// The online check and growing budgets, with real processes: samples are taken as often as asked
// for, say what is true of a policy whose answers are known, and change no answer; --min-mass takes
// more than the budget where that is needed, and says how often.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "tests/support/process.h"

namespace icecache::test {
namespace {

using nlohmann::json;
using std::chrono_literals::operator""s;

constexpr double kLayers = 4, kHeads = 2;  // of tests/models/recall

// A server for each policy, so that its metrics are of one run.
struct Recall {
  explicit Recall(const std::vector<std::string>& switches) {
    std::vector<std::string> args = {"recall",       "--model",      SourcePath("tests/models/recall"),
                                     "--server",     server.address(), "--transports",
                                     "tcp,self",     "--tokens",     "1500",
                                     "--facts",      "8",            "--question-count",
                                     "8",            "--methods",    "icecache"};
    args.insert(args.end(), switches.begin(), switches.end());
    Process worker("icecache-worker", args);
    const ProcessResult r = worker.Wait(200s);
    EXPECT_TRUE(r.exited && r.exit_code == 0) << worker.Err();
    const json report = json::parse(worker.Out(), nullptr, false);
    EXPECT_FALSE(report.is_discarded()) << worker.Out();
    method = report.at("methods").at(0);
    EXPECT_EQ(method.at("degraded_steps"), 0);
    checks = server.Metric("icecache_checks_total");
    EXPECT_EQ(server.Metric("icecache_checks_skipped_total"), 0);
    mass = server.Metric("icecache_checked_mass_ppm_total") / 1e6 / checks;
    error = server.Metric("icecache_checked_output_error_ppm_total") / 1e6 / checks;
  }
  double heads_asked() const { return method.at("decoded_tokens").get<double>() * kLayers * kHeads; }
  double attended() const { return method.at("tokens_attended_per_head").get<double>(); }

  TestServer server{{"--memory-size", "256MiB", "--threads", "2", "--transports", "tcp,self"}};
  json method;
  double checks = 0, mass = 0, error = 0;
};

TEST(OnlineCheck, NobodyAskedNothingChecked) {
  const Recall run({"--budget", "96"});
  EXPECT_EQ(run.checks, 0);
  EXPECT_EQ(run.method.at("grown_steps"), 0);
}

TEST(OnlineCheck, AnExactPolicyHasNoErrorAndEveryStepIsSeen) {
  const Recall run({"--budget", "96", "--policy", "exact", "--check-every", "1"});
  EXPECT_EQ(run.checks, run.heads_asked());
  EXPECT_LT(run.error, 1e-3);
  EXPECT_GT(run.mass, 0.05);
  EXPECT_LT(run.mass, 0.95);
}

TEST(OnlineCheck, SamplesOneInNAndShowsWhatALeftOutResidualCosts) {
  const std::vector<std::string> sampled = {"--budget", "96", "--check-every", "4"};
  const Recall run(sampled);
  EXPECT_GT(run.checks, run.heads_asked() / 8);
  EXPECT_LT(run.checks, run.heads_asked() / 2);
  EXPECT_LT(run.error, 0.3);
  std::vector<std::string> plain = sampled;
  plain.push_back("--no-residual");
  const Recall without(plain);
  EXPECT_EQ(without.checks, run.checks) << "the same steps are sampled";
  EXPECT_GT(without.error, 2 * run.error);
  EXPECT_NEAR(without.mass, run.mass, 0.1);
}

TEST(OnlineCheck, ChangesNoAnswer) {
  const Recall off({"--budget", "96"}), on({"--budget", "96", "--check-every", "1"});
  EXPECT_EQ(off.method.at("answers"), on.method.at("answers"));
  EXPECT_EQ(off.method.at("bytes_per_token"), on.method.at("bytes_per_token"));
}

TEST(GrowingBudget, ReachesTheMassAndIsCounted) {
  const std::vector<std::string> strict = {"--budget",   "64", "--read-cap", "0",
                                           "--check-every", "1", "--min-mass", "0.9"};
  std::vector<std::string> capped = strict;
  capped.insert(capped.end(), {"--budget-growth", "1"});
  std::vector<std::string> free = strict;
  free.insert(free.end(), {"--budget-growth", "32"});
  const Recall small(capped), grown(free);
  EXPECT_EQ(small.method.at("grown_steps"), 0);
  EXPECT_LE(small.attended(), 64);
  EXPECT_GT(grown.method.at("grown_steps").get<double>(), 0);
  EXPECT_LE(grown.method.at("grown_steps").get<double>() * kHeads, grown.heads_asked());
  EXPECT_GT(grown.mass, small.mass + 0.1);
  EXPECT_GT(grown.mass, 0.75) << "estimates are not far off";
  EXPECT_LT(grown.attended(), 1500 * 0.75) << "but not everything is fetched";
  EXPECT_LT(grown.error, small.error);
}

}  // namespace
}  // namespace icecache::test
