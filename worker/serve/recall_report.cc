#include "worker/serve/recall_report.h"

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "common/size.h"
#include "common/status.h"

namespace icecache {
namespace {

using nlohmann::ordered_json;

const RecallMethodReport* Find(const RecallReport& report, const std::string& name) {
  for (const RecallMethodReport& method : report.methods) {
    if (method.name == name) return &method;
  }
  return nullptr;
}

ordered_json MethodJson(const RecallMethodReport& method, const RecallMethodReport* full) {
  const DecodeStats& stats = method.stats;
  const AttentionStats& attention = stats.attention;
  ordered_json json;
  json["name"] = method.name;
  json["budget"] = method.budget;
  json["accuracy"] = method.accuracy();
  json["questions"] = method.answers.size();
  json["tokens_attended_per_head"] = attention.tokens_per_head();
  json["bytes_per_token"] = stats.bytes_per_token();
  json["worker_kv_bytes"] = stats.kv_bytes;
  json["ms_per_token"] = stats.ms_per_token(stats.total);
  json["ms_split"] = {{"model", stats.ms_per_token(stats.model())},
                      {"select", stats.ms_per_token(attention.select_wait)},
                      {"transfer", stats.ms_per_token(attention.transfer)},
                      {"attention", stats.ms_per_token(attention.attention)}};
  json["server_select_ms_per_token"] = stats.ms_per_token(
      std::chrono::nanoseconds(static_cast<int64_t>(attention.server_select_ns)));
  json["fork_ms_per_question"] = std::chrono::duration<double, std::milli>(method.between).count() /
                                 static_cast<double>(std::max<size_t>(1, method.answers.size()));
  json["hit_rate"] = attention.hit_rate();
  json["bad_pages"] = attention.bad_pages;
  json["degraded_steps"] = attention.degraded_steps;
  json["grown_steps"] = attention.grown_steps;
  json["decoded_tokens"] = stats.tokens;
  json["full_kv_bytes"] = stats.full_kv_bytes;
  if (full != nullptr) json["agreement_with_full_kv"] = Agreement(method, *full);
  json["answers"] = ordered_json::array();
  for (const RecallAnswer& answer : method.answers) {
    json["answers"].push_back({{"name", answer.name},
                               {"right", answer.right},
                               {"said", answer.said},
                               {"fact_position", answer.fact_position}});
  }
  return json;
}

}  // namespace

double RecallMethodReport::accuracy() const {
  if (answers.empty()) return 0;
  const auto right =
      std::count_if(answers.begin(), answers.end(), [](const auto& a) { return a.right; });
  return static_cast<double>(right) / static_cast<double>(answers.size());
}

double Agreement(const RecallMethodReport& a, const RecallMethodReport& b) {
  KV_CHECK(a.answers.size() == b.answers.size());
  if (a.answers.empty()) return 1;
  size_t same = 0;
  for (size_t i = 0; i < a.answers.size(); ++i) {
    KV_CHECK(a.answers[i].name == b.answers[i].name);
    same += a.answers[i].said == b.answers[i].said ? 1 : 0;
  }
  return static_cast<double>(same) / static_cast<double>(a.answers.size());
}

std::string FormatRecallJson(const RecallReport& report) {
  ordered_json json;
  json["document_tokens"] = report.document_tokens;
  json["prefill_tokens"] = report.prefill_tokens;
  json["prefill_seconds"] = std::chrono::duration<double>(report.prefill).count();
  json["facts"] = report.facts;
  json["methods"] = ordered_json::array();
  const RecallMethodReport* const full = Find(report, "full_kv");
  for (const RecallMethodReport& method : report.methods) {
    json["methods"].push_back(MethodJson(method, full));
  }
  return json.dump(1, ' ', false, ordered_json::error_handler_t::replace) + "\n";
}

std::string FormatRecallTable(const RecallReport& report) {
  char line[256];
  std::snprintf(line, sizeof(line),
                "%u tokens, %u prefilled in %.1f s\n%-12s %7s %9s %12s %12s %10s %9s\n",
                report.document_tokens, report.prefill_tokens,
                std::chrono::duration<double>(report.prefill).count(), "method", "budget",
                "accuracy", "tokens/head", "moved/token", "worker KV", "ms/token");
  std::string text = line;
  for (const RecallMethodReport& method : report.methods) {
    const DecodeStats& stats = method.stats;
    std::snprintf(line, sizeof(line), "%-12s %7u %7.1f %% %12.1f %12s %10s %9.2f\n",
                  method.name.c_str(), method.budget, 100 * method.accuracy(),
                  stats.attention.tokens_per_head(),
                  FormatSize(static_cast<uint64_t>(stats.bytes_per_token())).c_str(),
                  FormatSize(stats.kv_bytes).c_str(), stats.ms_per_token(stats.total));
    text += line;
  }
  return text;
}

}  // namespace icecache
