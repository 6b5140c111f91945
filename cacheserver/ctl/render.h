// The reports of the server (wire::Inspect, JSON) as tables for people.
#pragma once

#include <string>

#include "common/status.h"
#include "common/wire/control_codec.h"

namespace icecache {

// INTERNAL when the document is not what the topic's should be (another release of the server).
Result<std::string> RenderReport(wire::InspectTopic topic, const std::string& json);

// Of a verify report.
Result<uint64_t> DamagedSlices(const std::string& json);
// Of an explain report.
Result<bool> FoundContext(const std::string& json);

}  // namespace icecache
