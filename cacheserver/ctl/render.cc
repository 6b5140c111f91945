#include "cacheserver/ctl/render.h"

#include <nlohmann/json.hpp>

#include "cacheserver/ctl/table.h"
#include "common/size.h"

namespace icecache {
namespace {

using nlohmann::json;

std::string Bytes(const json& value) { return FormatSize(value.get<uint64_t>()); }
std::string Quota(const json& value) {
  return value.get<uint64_t>() == 0 ? "-" : FormatSize(value.get<uint64_t>());
}
std::string Number(const json& value) { return std::to_string(value.get<uint64_t>()); }
std::string Words(const json& list) {
  std::string out;
  for (const json& word : list) out += (out.empty() ? "" : ",") + word.get<std::string>();
  return out;
}
std::string Fixed(double value) {  // one digit
  const std::string text = std::to_string(value);
  return text.substr(0, text.find('.') + 2);
}
std::string Percent(double part) { return Fixed(part * 100) + "%"; }

std::string State(const json& context) {
  if (context.value("durable", false)) return "durable";
  if (context.at("published").get<bool>()) return "published";
  return context.at("sealed").get<bool>() ? "sealed" : "open";
}

std::string Contexts(const json& document) {
  Table table({"NAME", "TENANT", "TOKENS", "STATE", "SEGMENTS", "MERGED", "BYTES", "INDEX", "MATCHED", "REUSED",
               "MODEL", "POLICY"});
  for (const json& context : document.at("contexts")) {
    uint64_t bytes = 0, index = 0, merged = 0;
    for (const json& segment : context.at("segments")) {
      merged += segment.value("merged", 0u);
      bytes += segment.at("bytes").get<uint64_t>();
      index += segment.at("index_bytes").get<uint64_t>();
    }
    table.Add({context.at("name"), context.at("tenant"), Number(context.at("tokens")),
               State(context) + (context.at("shared").get<bool>() ? ",shared" : ""),
               std::to_string(context.at("segments").size()), std::to_string(merged),
               FormatSize(bytes), FormatSize(index), Number(context.at("prefix").at("forks")),
               Number(context.at("prefix").at("tokens_reused")), context.at("model"),
               context.at("policy")});
  }
  return table.Render();
}

std::string Tenants(const json& document) {
  Table table({"TENANT", "RIGHTS", "WEIGHT", "SERVICE_S", "QUEUED", "REFUSED", "QUOTA", "HELD",
               "USED", "CONTEXTS", "LEASES", "ACTIVE"});
  for (const json& tenant : document.at("tenants")) {
    table.Add({tenant.at("name"), Words(tenant.at("rights")), Number(tenant.at("weight")),
               Fixed(tenant.at("service_seconds").get<double>()),
               Number(tenant.at("requests_queued")), Number(tenant.at("requests_refused")),
               Quota(tenant.at("quota_bytes")), Bytes(tenant.at("held_bytes")),
               Bytes(tenant.at("used_bytes")), Number(tenant.at("contexts")),
               Number(tenant.at("leases")), tenant.at("active").get<bool>() ? "yes" : "no"});
  }
  return table.Render();
}

std::string Leases(const json& document) {
  Table table({"CONTEXT", "TENANT", "EPOCH", "USE", "LEFT_MS", "PEER"});
  for (const json& lease : document.at("leases")) {
    table.Add({lease.at("context"), lease.at("tenant"), Number(lease.at("epoch")),
               lease.at("writable").get<bool>() ? "write" : "read", Number(lease.at("left_ms")),
               lease.at("peer")});
  }
  return table.Render();
}

std::string Memory(const json& document) {
  std::string out;
  if (document.contains("size_bytes")) {
    out += "size " + Bytes(document.at("size_bytes")) + ", held " +
           Bytes(document.at("held_bytes")) + " (whole extents), used " +
           Bytes(document.at("used_bytes")) + "\n\n";
    Table shards({"SHARD", "SIZE", "HELD", "FRAMES", "ROWS", "WAITING_FRAMES", "CONTEXTS", "JOBS"});
    for (const json& shard : document.at("shards")) {
      shards.Add({Number(shard.at("id")), Bytes(shard.at("memory_bytes")),
                  Bytes(shard.at("held_bytes")), Bytes(shard.at("frame_bytes")),
                  Bytes(shard.at("row_bytes")), Number(shard.at("waiting_frames")),
                  Number(shard.at("contexts")), Number(shard.at("jobs"))});
    }
    out += shards.Render() + "\n";
  }
  Table tenants({"TENANT", "QUOTA", "HELD", "USED"});
  for (const json& tenant : document.at("tenants")) {
    tenants.Add({tenant.at("name"), Quota(tenant.at("quota_bytes")), Bytes(tenant.at("held_bytes")),
                 Bytes(tenant.at("used_bytes"))});
  }
  return out + tenants.Render();
}

std::string Explain(const json& document) {
  const std::string name = document.at("name");
  std::string out = name + ": " + document.at("why").get<std::string>() + "\n";
  if (!document.at("found").get<bool>()) return out;
  const json& context = document.at("context");
  out += "state " + State(context) + ", " + Number(context.at("tokens")) + " tokens of " +
         context.at("model").get<std::string>() + " (" + context.at("shape").get<std::string>() +
         "), " + Number(document.at("leases")) + " leases\n";
  out += "pages " + Number(document.at("pages").at("warm")) + " in memory, " +
         Number(document.at("pages").at("cold")) + " on disk only\n\n";
  Table segments({"SEGMENT", "TOKENS", "SEALED", "ON_DISK", "REFERENCES", "MERGED", "WARM", "COLD",
                  "PENDING_ROWS", "BYTES", "INDEX"});
  for (const json& segment : document.at("segments")) {
    segments.Add({Number(segment.at("id")), Number(segment.at("tokens")),
                  segment.at("sealed").get<bool>() ? "yes" : "no",
                  segment.at("stored").get<bool>() ? "yes" : "no", Number(segment.at("references")),
                  std::to_string(segment.value("merged", 0u)), Number(segment.at("warm_pages")), Number(segment.at("cold_pages")),
                  Number(segment.at("pending_rows")), Bytes(segment.at("bytes")),
                  Bytes(segment.at("index_bytes"))});
  }
  out += segments.Render();
  if (document.at("selections").empty()) return out + "\nno selection yet\n";
  Table last({"SHARD", "AGE_MS", "LAYER", "HEADS", "PAGES", "RESIDENT", "TOKENS_READ", "COVERED",
              "SELECT_US"});
  for (const json& one : document.at("selections")) {
    last.Add({Number(one.at("shard")), Number(one.at("age_ms")), Number(one.at("layer")),
              Number(one.at("heads")), Number(one.at("pages")), Number(one.at("resident_pages")),
              Number(one.at("tokens_read")), Percent(one.at("covered_mass").get<double>()),
              std::to_string(static_cast<uint64_t>(one.at("select_us").get<double>()))});
  }
  return out + "\nlast selections (COVERED: share of the softmax in the chosen pages)\n" +
         last.Render();
}

std::string Verify(const json& document) {
  std::string out = Number(document.at("pages")) + " pages of " + Number(document.at("contexts")) +
                    " contexts read, " + Number(document.at("damaged_slices")) +
                    " slices damaged\n";
  for (const json& one : document.at("damage")) out += "  " + one.get<std::string>() + "\n";
  return out;
}

std::string Render(wire::InspectTopic topic, const json& document) {
  switch (topic) {
    case wire::InspectTopic::kContexts:
      return Contexts(document);
    case wire::InspectTopic::kTenants:
      return Tenants(document);
    case wire::InspectTopic::kLeases:
      return Leases(document);
    case wire::InspectTopic::kMemory:
      return Memory(document);
    case wire::InspectTopic::kExplain:
      return Explain(document);
    case wire::InspectTopic::kVerify:
      return Verify(document);
  }
  return "";
}

Status Strange(const char* why) {
  return Internal(std::string("the server's report is not understood (") + why +
                  "); use icecachectl and icecache-server of one release, or --json");
}

}  // namespace

Result<std::string> RenderReport(wire::InspectTopic topic, const std::string& text) {
  try {
    return Render(topic, json::parse(text));
  } catch (const json::exception& e) {
    return Strange(e.what());
  }
}

Result<uint64_t> DamagedSlices(const std::string& text) {
  const json document = json::parse(text, nullptr, false);
  if (!document.is_object() || !document.contains("damaged_slices")) return Strange("no verify");
  return document["damaged_slices"].get<uint64_t>();
}

Result<bool> FoundContext(const std::string& text) {
  const json document = json::parse(text, nullptr, false);
  if (!document.is_object() || !document.contains("found")) return Strange("no explain");
  return document["found"].get<bool>();
}

}  // namespace icecache
