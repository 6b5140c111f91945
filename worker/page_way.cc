#include "worker/page_way.h"

#include <utility>

namespace icecache {
namespace {

constexpr std::pair<PageWay, std::string_view> kNames[] = {
    {PageWay::kAuto, "auto"}, {PageWay::kFrames, "frames"},         {PageWay::kLanding, "landing"},
    {PageWay::kIpc, "ipc"},   {PageWay::kRegistered, "registered"},
};

// Why a way cannot be taken; empty: it can.
std::string Obstacle(PageWay way, const PageWayFacts& facts) {
  if (way == PageWay::kFrames) return "";
  if (!facts.landing) return "there is no room for a landing buffer";
  if (way == PageWay::kLanding) return "";
  if (way == PageWay::kIpc) return facts.pushes ? "" : std::string(facts.no_push);
  if (!facts.mapped) return "the server's memory is not mapped here";
  return facts.registers ? "" : "the device reads no memory that is mapped read-only";
}

}  // namespace

std::string_view PageWayName(PageWay way) {
  for (const auto& [known, name] : kNames) {
    if (known == way) return name;
  }
  KV_CHECK(false);
  return "";
}

Result<PageWay> ParsePageWay(std::string_view name) {
  for (const auto& [way, known] : kNames) {
    if (known == name) return way;
  }
  return InvalidArgument("'" + std::string(name) +
                         "', expected auto, frames, landing, ipc or registered");
}

PageWayChoice ChoosePageWay(PageWay asked, const PageWayFacts& facts) {
  PageWayChoice choice;
  std::string obstacles;
  // From the one that copies least; what was asked for is the first to be tried, and then what is
  // next after it.
  for (const PageWay way :
       {PageWay::kRegistered, PageWay::kIpc, PageWay::kLanding, PageWay::kFrames}) {
    if (asked != PageWay::kAuto && way > asked) continue;
    const std::string obstacle = Obstacle(way, facts);
    if (obstacle.empty()) {
      choice.way = way;
      break;
    }
    if (obstacles.find(obstacle) == std::string::npos) {
      obstacles += (obstacles.empty() ? "" : "; ") + obstacle;
    }
  }
  choice.denied = asked != PageWay::kAuto && choice.way != asked;
  if (asked == choice.way) {
    choice.reason = "asked for";
  } else if (!obstacles.empty()) {
    choice.reason = obstacles;
  } else {
    choice.reason = "the server is on this host, and the device reads its memory";
  }
  return choice;
}

}  // namespace icecache
