#include "common/wire/message_checks.h"

#include <cmath>

#include "common/limits.h"

namespace icecache::wire {

Status MessageChecks::Bad(std::string_view field, std::string_view found,
                          std::string_view expected) const {
  std::string text(message_);
  text.append(".").append(field).append(" = ").append(found);
  text.append(", expected ").append(expected);
  return InvalidArgument(std::move(text));
}

Status MessageChecks::Between(std::string_view field, uint64_t found, uint64_t min,
                              uint64_t max) const {
  if (found >= min && found <= max) return OkStatus();
  return Bad(field, std::to_string(found), std::to_string(min) + ".." + std::to_string(max));
}

Status MessageChecks::Kind(uint16_t found, uint16_t expected) const {
  if (found == expected) return OkStatus();
  return Bad("kind", std::to_string(found), std::to_string(expected));
}

Status MessageChecks::BodyBytes(size_t found, size_t expected) const {
  if (found == expected) return OkStatus();
  return Bad("body", std::to_string(found) + " bytes",
             std::to_string(expected) + " bytes by the numbers in the message");
}

Status MessageChecks::InRange(std::string_view field, float found, float min, float max) const {
  if (found >= min && found <= max) return OkStatus();
  return Bad(field, std::to_string(found), std::to_string(min) + ".." + std::to_string(max));
}

Status MessageChecks::Finite(std::string_view field, std::span<const float> values) const {
  for (size_t i = 0; i < values.size(); ++i) {
    if (std::isfinite(values[i])) continue;
    return Bad(std::string(field) + "[" + std::to_string(i) + "]", std::to_string(values[i]),
               "a finite number");
  }
  return OkStatus();
}

Status MessageChecks::Text(std::string_view field, std::string_view text, size_t bytes_max) const {
  if (text.size() > bytes_max) {
    return Bad(field, std::to_string(text.size()) + " bytes",
               "at most " + std::to_string(bytes_max));
  }
  for (const char c : text) {
    const auto u = static_cast<unsigned char>(c);
    if (u >= 0x20 && u != 0x7f) continue;
    return Bad(field, "text with control character " + std::to_string(u), "printable text");
  }
  return OkStatus();
}

Status MessageChecks::Positions(std::string_view field, uint32_t first, uint32_t count) const {
  return AtMost(field, uint64_t{first} + count, limits::kContextTokensMax);
}

}  // namespace icecache::wire
