// The table's parts: methods by name, cells in a file that grows, and an attention in this process
// that is the very thing when everything may be read.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "tests/bench/accuracy_attention.h"
#include "tests/bench/accuracy_cells.h"
#include "tests/bench/accuracy_plot.h"
#include "tests/bench/accuracy_report.h"
#include "tests/bench/accuracy_run.h"
#include "tests/bench/measure.h"
#include "tests/bench/random.h"
#include "worker/attention_full.h"

namespace icecache {
namespace {

using ::testing::HasSubstr;

TEST(AccuracyMethod, OptionsFollowTheName) {
  auto method =
      ParseAccuracyMethod("cluster_tree/strict/rerank_pages_max=48/layout=sequential/mass=0.9");
  ASSERT_TRUE(method.ok()) << method.status().ToString();
  EXPECT_EQ(method->read_cap, 0u);
  EXPECT_EQ(method->tree.rerank_pages_max, 48u);
  EXPECT_EQ(method->tree.layout, ClusterTreeOptions::Layout::kSequential);
  EXPECT_FLOAT_EQ(method->min_mass, 0.9f);
  EXPECT_TRUE(method->custom);
  EXPECT_EQ(ParseAccuracyMethod("full")->kind, AccuracyMethod::Kind::kFull);
  EXPECT_EQ(ParseAccuracyMethod("dci_tree")->dci.anchor_interval, 120u);  // the reference's
  EXPECT_EQ(ParseAccuracyMethod("dci_tree/improved")->dci.anchor_interval, 0u);
}

TEST(AccuracyMethod, WhatIsNotUnderstoodIsNamed) {
  const auto message = [](const char* text) {
    return ParseAccuracyMethod(text).status().message();
  };
  EXPECT_THAT(message("clustertree"), HasSubstr("cluster_tree"));
  EXPECT_THAT(message("cluster_tree/colour=1"), HasSubstr("rerank_pages"));
  EXPECT_THAT(message("cluster_tree/rerank_pages_max=x"), HasSubstr("'x'"));
  EXPECT_THAT(message("cluster_tree/rerank_pages_max=-1"), HasSubstr("'-1'"));
  EXPECT_THAT(message("cluster_tree/strict=1"), HasSubstr("no value"));
  EXPECT_THAT(message("sequential/rerank_pages_max=4"), HasSubstr("rerank_pages"))
      << "an option of another policy";
  EXPECT_THAT(message("full/strict"), HasSubstr("no options"));
  EXPECT_THAT(message("cluster_tree/reuse=0"), HasSubstr("reuse"));
}

Cell SomeCell(const std::string& policy, uint32_t budget, uint64_t seed, double accuracy) {
  Cell cell;
  cell.name = {"single", policy, budget, 4096, seed};
  cell.model = "llama:x:0";
  cell.accuracy = accuracy;
  cell.questions = 16;
  cell.output_error = 0.125;
  cell.bytes_per_token = 2048;
  cell.error_by_turn = {0.1, 0.2};
  return cell;
}

TEST(AccuracyCells, ReadBackAndForgiveACutLastLine) {
  const std::string path = testing::TempDir() + "/accuracy_cells.jsonl";
  const Cell cell = SomeCell("cluster_tree/strict", 64, 2, 0.9375);
  const std::string line = FormatCell(cell, "commit", "machine");
  EXPECT_THAT(line, HasSubstr("\"bench\":\"accuracy\""));
  std::ofstream(path) << line << "\n" << line.substr(0, 40);
  uint64_t others = 0;
  auto cells = ReadCells(path, "", &others);
  ASSERT_TRUE(cells.ok()) << cells.status().ToString();
  ASSERT_EQ(cells->size(), 1u);
  EXPECT_EQ(cells->begin()->second.accuracy, 0.9375);
  EXPECT_EQ(cells->begin()->second.error_by_turn, cell.error_by_turn);
  std::ofstream(path) << line.substr(0, 40) << "\n" << line << "\n";
  EXPECT_THAT(ReadCells(path, "", &others).status().message(), HasSubstr(":1"));
  std::remove(path.c_str());
  EXPECT_TRUE(ReadCells(path, "", &others)->empty()) << "no file, no cells";
}

TEST(AccuracyCells, OfAnotherBuildAreLeftOut) {
  const std::string path = testing::TempDir() + "/accuracy_builds.jsonl";
  Cell ours = SomeCell("quest", 64, 1, 0.5), theirs = SomeCell("quest", 64, 2, 0.7);
  ours.build = "00aa";
  theirs.build = "00bb";
  std::ofstream(path) << FormatCell(ours, "c", "m") << "\n" << FormatCell(theirs, "c", "m") << "\n";
  uint64_t others = 0;
  const auto cells = ReadCells(path, "00aa", &others);
  ASSERT_EQ(cells->size(), 1u);
  EXPECT_EQ(cells->begin()->second.build, "00aa");
  EXPECT_EQ(others, 1u);
  EXPECT_EQ(ReadCells(path, "", &others)->size(), 2u);
  EXPECT_EQ(others, 0u);
  std::remove(path.c_str());
  EXPECT_EQ(BuildName().size(), 16u);
}

TEST(AccuracyReport, GivesMeanDeviationAndRetention) {
  std::map<CellName, Cell> cells;
  for (const Cell& cell : {SomeCell("full", 0, 1, 1.0), SomeCell("full", 0, 2, 1.0),
                           SomeCell("quest", 64, 1, 0.5), SomeCell("quest", 64, 2, 0.7)})
    cells[cell.name] = cell;
  const std::string table = FormatAccuracyTable(cells, {"full", "quest", "absent"});
  EXPECT_THAT(table, HasSubstr("| quest | 64 | 60.0 ± 14.1 | 60.0 | 60.0 % | 0.125 | 2.0 |"));
  EXPECT_THAT(table, HasSubstr("| full | all | 100.0 ± 0.0 |"));
  EXPECT_EQ(table.find("absent"), std::string::npos);
  const std::string folder = testing::TempDir() + "/accuracy_report";
  ASSERT_TRUE(WriteAccuracyReport(cells, {"full", "quest"}, folder).ok());
  for (const char* name : {"accuracy.md", "accuracy_by_budget.svg", "error_by_bytes.svg",
                           "error_growth.svg", "page_overlap.svg", "page_transfer.svg"})
    EXPECT_TRUE(std::filesystem::exists(folder + "/" + name)) << name;
  std::filesystem::remove_all(folder);
}

TEST(AccuracyReport, ShowsGrowthInUnitsOfTheOracle) {
  std::map<CellName, Cell> cells;
  for (Cell cell : {SomeCell("top_k", 64, 1, 1.0), SomeCell("cluster_tree", 64, 1, 1.0)}) {
    cell.questions = 320;
    cell.error_by_turn.assign(32, cell.name.policy == "top_k" ? 0.5 : 0.1);
    cells[cell.name] = cell;
  }
  const std::string folder = testing::TempDir() + "/accuracy_growth";
  const auto plot = [&](const std::vector<std::string>& methods) {
    EXPECT_TRUE(WriteAccuracyReport(cells, methods, folder).ok());
    std::ifstream file(folder + "/error_growth.svg");
    return std::string((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  };
  EXPECT_THAT(plot({"top_k", "cluster_tree"}), HasSubstr("that of top_k"));
  cells.erase(cells.find({"single", "top_k", 64, 4096, 1}));
  EXPECT_THAT(plot({"cluster_tree"}), HasSubstr("relative output error"));
  std::filesystem::remove_all(folder);
}

TEST(AccuracyPlot, LeavesOutWhatALogAxisCannotShow) {
  const std::string svg =
      DrawSvg({"a < b", "x", "y", true, true, {{"line", {{0, 1}, {1, 1}, {10, 100}}}}});
  EXPECT_THAT(svg, HasSubstr("a &lt; b"));
  EXPECT_EQ(svg.find("nan"), std::string::npos);
  EXPECT_EQ(svg.find("inf"), std::string::npos);
  EXPECT_THAT(DrawSvg({}), HasSubstr("</svg>")) << "no points at all";
}

// K and V of no model: 2 layers of 2 kv heads with 2 query heads each.
class PolicyAttentionTest : public ::testing::Test {
 protected:
  static constexpr uint32_t kTokens = 300, kDim = 32;
  const ModelShape shape_{2, 2, 4, kDim, DType::kF32};
  const SparseBudget budget_{.tokens = 128};
  const std::unique_ptr<AttentionBackend> backend_ = MakeCpuAttention();
  TraceRandom random_{5};

  ReadDocument Document() {
    ReadDocument document;
    document.shape = shape_;
    document.tokens = kTokens;
    document.query_count = 8;
    document.kv = std::make_unique<LocalKv>(shape_);
    for (uint16_t l = 0; l < shape_.layers; ++l) {
      LayerRows rows(shape_, TokenPos(0), kTokens);
      std::vector<float> k(kTokens * 2 * kDim), v(k.size());
      random_.Fill(k.data(), k.size(), 1.0f);
      random_.Fill(v.data(), v.size(), 1.0f);
      rows.RoundAndStore(0, kTokens, k.data(), v.data());
      document.kv->Append(LayerId(l), rows);
      for (uint32_t h = 0; h < shape_.kv_heads; ++h) {
        std::vector<float> queries(8 * 2 * kDim);
        random_.Fill(queries.data(), queries.size(), 0.2f);
        document.queries.push_back(std::move(queries));
        document.energy.emplace_back(kDim, 0.04f);
      }
    }
    return document;
  }

  struct Token {
    std::vector<float> q, k, v;
  };
  Token NextToken() {
    Token token{std::vector<float>(4 * kDim), std::vector<float>(2 * kDim),
                std::vector<float>(2 * kDim)};
    random_.Fill(token.q.data(), token.q.size(), 0.4f);
    random_.Fill(token.k.data(), token.k.size(), 1.0f);
    random_.Fill(token.v.data(), token.v.size(), 1.0f);
    return token;
  }
  std::vector<float> Ask(DecodeAttention& attention, uint16_t layer, uint32_t position,
                         const Token& token) {
    std::vector<float> out(4 * kDim);
    EXPECT_TRUE(attention
                    .Attend(LayerId(layer), TokenPos(position), 1, token.q.data(), token.k.data(),
                            token.v.data(), out.data())
                    .ok());
    return out;
  }
  static double Difference(const std::vector<float>& a, const std::vector<float>& b) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < a.size(); ++i) {
      difference += (a[i] - b[i]) * (a[i] - b[i]);
      norm += b[i] * b[i];
    }
    return std::sqrt(difference / norm);
  }

  // The largest difference from full attention over `steps` tokens after the document, which must
  // then be as it was.
  double Worst(const std::string& name, bool grow, uint32_t steps) {
    ReadDocument document = Document();
    const AccuracyMethod method = ParseAccuracyMethod(name).value();
    auto index = IndexDocument(document, method, budget_);
    EXPECT_TRUE(index.ok()) << index.status().ToString();
    PolicyAttention policy(document, *index, *backend_, method, budget_, grow);
    std::vector<Token> tokens;
    std::vector<std::vector<float>> said;
    for (uint32_t t = 0; t < steps; ++t) {
      tokens.push_back(NextToken());
      for (uint16_t l = 0; l < 2; ++l) said.push_back(Ask(policy, l, kTokens + t, tokens[t]));
    }
    if (!grow) policy.Begin();
    document.kv->Truncate(kTokens);
    AttentionFull full(shape_, *document.kv, *backend_);
    double worst = 0;
    for (uint32_t t = 0; t < steps; ++t)
      for (uint16_t l = 0; l < 2; ++l)
        worst = std::max(worst, Difference(said[2 * t + l], Ask(full, l, kTokens + t, tokens[t])));
    return worst;
  }
};

TEST_F(PolicyAttentionTest, CountsEveryTokenOnceWhileASequenceGrows) {
  // `exact` answers with a residual of all that it does not return: nothing may be missing, and
  // nothing twice, before and after tokens have left the window, forked or grown in place, through
  // rebuilds.
  EXPECT_LT(Worst("exact", false, 60), 1e-4);
  EXPECT_LT(Worst("exact", true, 60), 1e-4);
  EXPECT_LT(Worst("exact/recluster=7", true, 60), 1e-4);
  EXPECT_LT(Worst("cluster_tree/read_cap=65536", true, 40), 2e-3);
}

TEST_F(PolicyAttentionTest, LeavesOutWhatIsNotChosenWhenPlain) {
  EXPECT_GT(Worst("exact/plain", false, 3), 0.02);
  EXPECT_GT(Worst("sequential/plain", true, 20), 0.02);
}

TEST_F(PolicyAttentionTest, DenseLayersLeaveNothingOut) {
  EXPECT_LT(Worst("sequential/plain/dense=2", false, 20), 1e-6);
  EXPECT_LT(Worst("sequential/plain/dense=2", true, 20), 1e-6);
  EXPECT_GT(Worst("sequential/plain/dense=1", true, 20), 0.02) << "the second layer still does";
}

TEST_F(PolicyAttentionTest, CountsPagesThatAreKept) {
  ReadDocument document = Document();
  const AccuracyMethod method = ParseAccuracyMethod("sequential").value();
  auto index = IndexDocument(document, method, budget_);
  ASSERT_TRUE(index.ok());
  PolicyAttention policy(document, *index, *backend_, method, budget_, false);
  const Token token = NextToken();
  policy.Probe(true);
  for (int i = 0; i < 2; ++i) {
    Ask(policy, 0, kTokens, token);
    policy.Begin();  // the same question again: the same pages
  }
  const SelectionStats& stats = policy.selection_stats();
  EXPECT_LE(stats.repeated, stats.comparable);
  EXPECT_EQ(stats.selections, 4u) << "two kv heads, twice";
  EXPECT_EQ(stats.pages, 4u * 6) << "(128 - 16 - 16) / 16 pages";
  EXPECT_LE(stats.fetched, stats.pages / 2 + 2) << "what was fetched stays";
  EXPECT_EQ(stats.probed_pages, stats.pages);
  EXPECT_GT(stats.hot_tokens, 0u);
  EXPECT_LE(stats.hot_tokens, stats.paged_tokens);
}

TEST_F(PolicyAttentionTest, FollowersTakeTheirLeadersPages) {
  ReadDocument document = Document();
  const AccuracyMethod method = ParseAccuracyMethod("sequential/plain/reuse=2").value();
  auto index = IndexDocument(document, method, budget_);
  ASSERT_TRUE(index.ok());
  PolicyAttention policy(document, *index, *backend_, method, budget_, true);
  for (uint32_t t = 0; t < 40; ++t) {
    const Token token = NextToken();
    for (uint16_t l = 0; l < 2; ++l) Ask(policy, l, kTokens + t, token);
  }
  EXPECT_EQ(index->slices[0].store->PageOf(), index->slices[2].store->PageOf());
  EXPECT_EQ(index->slices[2].policy, nullptr);
}

// A whole small table with the shipped model, twice.
TEST(AccuracyTable, IsResumedWhereItStopped) {
  const char* source = std::getenv("ICECACHE_SOURCE_DIR");
  const std::string folder = testing::TempDir() + "/accuracy_table";
  std::filesystem::create_directories(folder);
  AccuracyOptions options;
  options.model = std::string(source == nullptr ? "." : source) + "/tests/models/recall";
  options.tasks = {"single", "multiturn", "text"};
  options.methods = {"full", "top_k", "cluster_tree"};
  options.budgets = {64};
  options.lengths = {768};
  options.seeds = 1;
  options.questions = 4;
  options.write_tokens = 20;
  options.cache = folder + "/cache";
  options.out = folder + "/cells.jsonl";
  options.report = folder + "/report";
  const Status status = RunAccuracy(options);
  ASSERT_TRUE(status.ok()) << status.ToString();
  const auto bytes = std::filesystem::file_size(options.out);
  uint64_t others = 0;
  auto cells = ReadCells(options.out, BuildName(), &others);
  ASSERT_TRUE(cells.ok());
  ASSERT_EQ(cells->size(), 9u) << "three tasks, three methods, one budget each";
  for (const auto& [name, cell] : *cells) {
    EXPECT_EQ(cell.questions, name.task == "text" ? 20u : 4u);
    if (name.policy == "full") {
      EXPECT_EQ(cell.output_error, 0.0) << name.task;
      EXPECT_EQ(cell.accuracy, 1.0) << name.task;
    } else {
      EXPECT_GT(cell.output_error, 0.0) << name.task;
    }
  }
  ASSERT_TRUE(RunAccuracy(options).ok());
  EXPECT_EQ(std::filesystem::file_size(options.out), bytes) << "nothing was left to do";
  options.methods = {"full", "sequential"};
  ASSERT_TRUE(RunAccuracy(options).ok());
  EXPECT_EQ(ReadCells(options.out, BuildName(), &others)->size(), 12u) << "only the new method";
  options.methods = {"none"};
  EXPECT_EQ(RunAccuracy(options).code(), StatusCode::kInvalidArgument);
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace icecache
