// Parts of control-plane messages that several of them hold, to and from Cap'n Proto: texts, shapes
// and contexts. For control_codec.cc alone.
#pragma once

#include <string>
#include <string_view>

#include "common/wire/control_codec.h"
#include "common/wire/message_checks.h"
#include "wire/control.capnp.h"

namespace icecache::wire {

void WriteShape(const ModelShape& in, schema::Shape::Builder out);
void WriteContext(const ContextInfo& in, schema::ContextInfo::Builder out);

// Read into *out; the limit is on bytes.
Status ReadText(const MessageChecks& check, std::string_view field, std::string_view text,
                size_t bytes_max, std::string* out);
Status ReadName(const MessageChecks& check, std::string_view field, std::string_view text,
                std::string* out);
Status ReadLabel(const MessageChecks& check, std::string_view field, std::string_view text,
                 std::string* out);
Status ReadShape(const MessageChecks& check, schema::Shape::Reader in, ModelShape* out);
Status ReadContext(const MessageChecks& check, schema::ContextInfo::Reader in, ContextInfo* out);

}  // namespace icecache::wire
