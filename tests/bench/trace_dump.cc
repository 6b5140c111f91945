// Traces from what a model really computed.
#include <algorithm>
#include <charconv>
#include <utility>

#include "kernels/attention.h"
#include "tests/bench/trace.h"
#include "worker/trace_file.h"

namespace icecache {
namespace {

constexpr uint32_t kSinks = 16, kWindow = 16;  // the worker's defaults

struct SliceName {
  std::string path;
  uint16_t layer = 0, head = 0;
};

// PATH@L.H; an '@' that is not followed by two numbers belongs to the path.
SliceName ParseSliceName(const std::string& name) {
  const size_t at = name.rfind('@');
  if (at == std::string::npos) return {name};
  SliceName slice{name.substr(0, at)};
  const char* const end = name.data() + name.size();
  const auto layer = std::from_chars(name.data() + at + 1, end, slice.layer);
  if (layer.ec != std::errc() || layer.ptr == end || *layer.ptr != '.') return {name};
  const auto head = std::from_chars(layer.ptr + 1, end, slice.head);
  return head.ec == std::errc() && head.ptr == end ? slice : SliceName{name};
}

TokenRows RowsOf(const TraceSlice& slice, const ModelShape& shape, uint32_t first, uint32_t count) {
  const size_t at = first * shape.row_bytes();
  return {shape.dtype, shape.head_dim, count, slice.k.data() + at, slice.v.data() + at};
}

// What sinks and everything from `window_first` (follow: the last kWindow) to the query give.
void AttendLocally(const TraceSlice& slice, const TraceExtent& extent, uint32_t window_first,
                   bool follow, Trace* trace) {
  const std::unique_ptr<AttentionBackend> backend = MakeCpuAttention();
  const size_t row = size_t{trace->group} * trace->dim;
  trace->local_lse.resize(size_t{trace->query_count} * trace->group);
  trace->local_out.resize(trace->query_count * row);
  AttentionStates states;
  for (uint32_t q = 0; q < trace->query_count; ++q) {
    const uint32_t position = extent.tokens - trace->query_count + q;
    const uint32_t begin = follow ? position + 1 - kWindow : window_first;
    states.Reset(trace->group, trace->dim);
    backend->AttendRows(trace->Query(q), RowsOf(slice, extent.shape, 0, kSinks), states.ref());
    backend->AttendRows(trace->Query(q),
                        RowsOf(slice, extent.shape, begin, position + 1 - begin), states.ref());
    for (uint32_t h = 0; h < trace->group; ++h)
      trace->local_lse[size_t{q} * trace->group + h] = LogSumExp(states.ref(), h);
    FinishStates(states.ref(), trace->local_out.data() + q * row);
  }
}

}  // namespace

Result<Trace> LoadTrace(const TraceSpec& spec, const std::string& name) {
  const SliceName at = ParseSliceName(name);
  KV_ASSIGN_OR_RETURN(TraceReader reader, TraceReader::Open(at.path));
  const TraceExtent& extent = reader.extent();
  KV_ASSIGN_OR_RETURN(const TraceSlice slice, reader.Read(LayerId(at.layer), KvHeadId(at.head)));
  const ModelShape& shape = extent.shape;
  if (spec.query_count == 0 || spec.query_count > extent.query_count ||
      spec.query_count + kSinks + kWindow > extent.tokens) {
    return InvalidArgument("trace '" + at.path + "' has queries of " +
                           std::to_string(extent.query_count) + " of " +
                           std::to_string(extent.tokens) + " tokens, too few to ask " +
                           std::to_string(spec.query_count));
  }
  Trace trace{.dtype = shape.dtype,
              .dim = shape.head_dim,
              .group = shape.group(),
              .query_count = spec.query_count};
  const size_t asked = size_t{spec.query_count} * shape.group() * shape.head_dim;
  const std::span<const float> queries = slice.queries;
  trace.queries.assign(queries.end() - static_cast<ptrdiff_t>(asked), queries.end());
  if (queries.size() > asked) {
    const std::span<const float> earlier = queries.first(queries.size() - asked);
    trace.energy = EnergyOf(earlier, trace.dim);
    const size_t seen = std::min(earlier.size(), size_t{32} * shape.group() * shape.head_dim);
    trace.history.assign(earlier.end() - static_cast<ptrdiff_t>(seen), earlier.end());
  }

  const uint32_t window_first = extent.tokens - spec.query_count + 1 - kWindow;
  uint32_t rows_end = window_first;
  if (spec.follow) {
    trace.keys = std::min(window_first - kSinks, spec.keys);
    trace.extra_keys = spec.query_count - 1;
    for (uint32_t q = 0; q < spec.query_count; ++q) trace.asked_after.push_back(trace.keys + q);
    rows_end += trace.extra_keys;
  } else {
    const uint32_t total = std::min(window_first - kSinks, spec.keys + spec.extra_keys);
    trace.extra_keys = std::min(spec.extra_keys, total / 2);
    trace.keys = total - trace.extra_keys;
  }
  const size_t row = shape.row_bytes();
  const auto begin = static_cast<ptrdiff_t>((rows_end - trace.keys - trace.extra_keys) * row);
  const auto end = static_cast<ptrdiff_t>(rows_end * row);
  trace.k.assign(slice.k.begin() + begin, slice.k.begin() + end);
  trace.v.assign(slice.v.begin() + begin, slice.v.begin() + end);
  AttendLocally(slice, extent, window_first, spec.follow, &trace);
  return trace;
}

}  // namespace icecache
