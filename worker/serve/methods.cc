#include "worker/serve/methods.h"

#include <string>

namespace icecache {

std::string_view MethodName(Method method) {
  switch (method) {
    case Method::kIceCache:
      return "icecache";
    case Method::kFullKv:
      return "full_kv";
    case Method::kExact:
      return "exact";
    case Method::kSinkWindow:
      return "sink_window";
  }
  return "unknown";
}

Result<Method> ParseMethod(std::string_view name) {
  for (const Method method : kAllMethods) {
    if (MethodName(method) == name) return method;
  }
  return InvalidArgument("method '" + std::string(name) +
                         "': expected icecache, full_kv, exact or sink_window");
}

}  // namespace icecache
