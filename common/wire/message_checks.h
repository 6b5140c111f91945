// MessageChecks: the questions that every decoder asks of numbers it has not written itself. Each
// answers OK or INVALID_ARGUMENT naming message, field, found and expected. A value; used on any
// thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "common/status.h"

namespace icecache::wire {

class MessageChecks {
 public:
  // `message`: its name in the schema; a literal.
  constexpr explicit MessageChecks(std::string_view message) : message_(message) {}

  std::string_view message() const { return message_; }
  Status Bad(std::string_view field, std::string_view found, std::string_view expected) const;
  Status Between(std::string_view field, uint64_t found, uint64_t min, uint64_t max) const;
  Status AtMost(std::string_view field, uint64_t found, uint64_t max) const {
    return Between(field, found, 0, max);
  }
  Status Kind(uint16_t found, uint16_t expected) const;
  Status BodyBytes(size_t found, size_t expected) const;
  // [min, max]; NaN never passes.
  Status InRange(std::string_view field, float found, float min, float max) const;
  // No NaN and no infinity. Cost: one pass.
  Status Finite(std::string_view field, std::span<const float> values) const;
  // At most max bytes and no control characters: names end up in logs, URLs and terminals.
  Status Text(std::string_view field, std::string_view text, size_t bytes_max) const;
  // Token rows [first, first + count) end within a context.
  Status Positions(std::string_view field, uint32_t first, uint32_t count) const;

 private:
  std::string_view message_;
};

}  // namespace icecache::wire
