// Keys of the cold store. Ids are big-endian, so that the keys of a segment, and of a slice in it, lie
// together and in order.
//
//   pages    segment u64, slice u32, page u32     a page's rows (PageTable::AppendStored)
//   index    segment u64, slice u32, 'i' | 'r'    a slice's index or rows (HeadSlice::SaveIndex, SaveRows)
//   records  "segment/" + segment u64             written before anything of a segment
//            "context/" + segment u64, tenant 0, name 0   a durable context; its chain's last segment
//            "start"                              what the next start must not use again
#pragma once

#include <string>

#include "common/ids.h"

namespace icecache::cold_keys {

inline void AppendBigEndian(uint64_t value, int bytes, std::string* out) {
  for (int shift = 8 * (bytes - 1); shift >= 0; shift -= 8) {
    out->push_back(static_cast<char>(value >> shift & 0xff));
  }
}
inline std::string SegmentPrefix(SegmentId segment) {
  std::string key;
  AppendBigEndian(segment.value, 8, &key);
  return key;
}
inline std::string Slice(SegmentId segment, uint32_t flat) {
  std::string key = SegmentPrefix(segment);
  AppendBigEndian(flat, 4, &key);
  return key;
}
inline std::string Page(SegmentId segment, uint32_t flat, PageId page) {
  std::string key = Slice(segment, flat);
  AppendBigEndian(page.value, 4, &key);
  return key;
}
inline std::string Index(SegmentId segment, uint32_t flat) { return Slice(segment, flat) + 'i'; }
inline std::string Rows(SegmentId segment, uint32_t flat) { return Slice(segment, flat) + 'r'; }

inline constexpr char kSegments[] = "segment/";
inline constexpr char kContexts[] = "context/";
inline constexpr char kStart[] = "start";
inline std::string SegmentRecord(SegmentId segment) { return kSegments + SegmentPrefix(segment); }
// Names hold no zero byte, so that no key is the beginning of another.
inline std::string ContextRecord(SegmentId last, const std::string& tenant,
                                 const std::string& name) {
  return kContexts + SegmentPrefix(last) + tenant + '\0' + name + '\0';
}

}  // namespace icecache::cold_keys
