#include "tests/bench/select_flags.h"

#include <map>

#include "common/limits.h"

namespace icecache {

namespace {
constexpr uint32_t kKeysBuiltOnce = 262144;  // from here on a build takes seconds
}  // namespace

void SelectFlags::AddTo(ConfigParser* parser) {
  parser->Section("Data");
  parser->Add(
      "trace", &trace,
      "clustered | runs | weak | calibrated:{retrieval,sinky,topic,broad,diffuse} | file:PATH@L.H");
  parser->Add("keys", &keys, "tokens indexed by the build", 1, limits::kContextTokensMax);
  parser->Add("dim", &dim, "head_dim", 16, limits::kHeadDimMax);
  parser->Add("group", &group, "query heads of the kv head", 1, limits::kGroupMax);
  parser->Add("group_spread", &group_spread,
              "share of heads that look elsewhere than their group; -1: the trace's own", -1, 1);
  parser->Add("queries", &queries, "group queries asked", 1, 100000);
  parser->Add("dtype", &dtype, "f32 | f16 | bf16");
  parser->Add("seed", &seed, "of the trace and of the policy");
  parser->Section("Policy");
  parser->Add("policy", &policy, PolicyKindNames());
  parser->Add("budget_pages", &budget_pages, "pages returned at most", 0,
              limits::kPagesPerSelectMax);
  parser->Add("read_cap", &read_cap,
              "tokens read exactly beyond the returned pages (service reading)", 0,
              limits::kReadCapMax);
  parser->Add("min_mass", &min_mass, "return only as many pages as reach this share; 0: off", 0, 1);
  parser->Add("rank", &rank, "mass_sum | mass_max | max_token");
  parser->Add(
      "near", &near,
      "ask as a layer behind an anchor (--layer-reuse): near 4/5 of as many heaviest tokens", 0,
      limits::kNearPositionsMax);
  parser->Add("energy", &energy, "tell the build the mean squares of earlier queries");
  parser->Add(
      "proposed", &proposed,
      "cluster_tree: build from a layout made before, as with --build-on worker: none | cpu "
      "| emulated | cuda");
  parser->Add("layout", &layout, "cluster_tree: auto | content | sequential | content_value");
  parser->Add("sketch", &sketch, "cluster_tree: auto | on | off");
  parser->Add("dci_improved", &dci_improved,
              "dci_tree: without the reference's anchors, and with queries on the keys' scale");
  parser->Section("Measurement");
  parser->Add("insert_fraction", &insert_fraction,
              "tokens inserted after the build, as a share of --keys", 0, 4);
  parser->Add("threads", &threads, "slices built at the same time, for the threads_build fields", 1,
              64);
  parser->Add("builds", &builds,
              "times the slice is built: build_us_per_key is the median, as a build thread of a "
              "server pays that has built before, build_us_per_key_first the first, with its page "
              "faults; 0: 3, from 262,144 keys on 1",
              0, 99);
  parser->Add("profile", &profile,
              "also what the trace is like: concentration, and variance inside pages by layout");
  parser->Add("repeats", &repeats, "calls per query; the fastest counts", 1, 1000);
  parser->Add("json", &json, "one line of JSON instead of one field per line");
}

Result<ClusterTreeOptions> SelectFlags::TreeOptions() const {
  using Layout = ClusterTreeOptions::Layout;
  using Sketch = ClusterTreeOptions::Sketch;
  const std::map<std::string, Layout> layouts = {{"auto", Layout::kAuto},
                                                 {"content", Layout::kContent},
                                                 {"sequential", Layout::kSequential},
                                                 {"content_value", Layout::kContentValue}};
  const std::map<std::string, Sketch> sketches = {
      {"auto", Sketch::kAuto}, {"on", Sketch::kOn}, {"off", Sketch::kOff}};
  const auto found_layout = layouts.find(layout);
  const auto found_sketch = sketches.find(sketch);
  if (found_layout == layouts.end())
    return InvalidArgument("--layout '" + layout +
                           "': use auto, content, sequential or content_value");
  if (found_sketch == sketches.end())
    return InvalidArgument("--sketch '" + sketch + "': use auto, on or off");
  ClusterTreeOptions options;
  options.layout = found_layout->second;
  options.sketch = found_sketch->second;
  return options;
}

uint32_t SelectFlags::Builds() const {
  if (builds > 0) return builds;
  return keys < kKeysBuiltOnce ? 3 : 1;
}

Result<GroupRank> SelectFlags::Rank() const {
  if (rank == "mass_sum") return GroupRank::kMassSum;
  if (rank == "mass_max") return GroupRank::kMassMax;
  if (rank == "max_token") return GroupRank::kMaxToken;
  return InvalidArgument("--rank '" + rank + "': use mass_sum, mass_max or max_token");
}

}  // namespace icecache
