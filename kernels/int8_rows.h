// Int8 code of a page's K and V rows for the wire: half the bytes and a little more.
//
// K has a minimum and a step per channel (keys differ between channels far more than within one), V
// per token; codes are bytes, x ~ minimum + code * step. Channels whose step would be far above the
// others' (K), or whose values would stretch every token's range (V), are outliers and keep their
// 16 bits. Minimum and step are kept in the rows' own dtype. KIVI and KVQuant found this split of
// axes; whoever wants exact rows does not use this.
//
// Error of a decoded element: at most half a step of its channel (K) or token (V) plus the rounding
// of the dtype; outliers are exact. Never makes a NaN or an infinity of finite rows.
//
//   K minimum[dim], K step[dim], V minimum[rows], V step[rows]    in the dtype
//   u8 K outliers, u8 V outliers, their channels u8 each, 0 or 1 byte of padding
//   outlier columns [outliers][rows] in the dtype; K codes u8 [rows, dim]; V codes u8 [rows, dim]
//
// Cost: a few microseconds a page of 16 x 128, one thread, no allocation. dim: a multiple of 16 up
// to kHeadDimMax; rows: 1 to kPageTokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/int8_layout.h"
#include "kernels/paged_kv.h"

namespace icecache {

// Room that a code may need.
size_t Int8RowsBytesMax(DType dtype, uint32_t rows, uint32_t dim);

// Writes the code and returns its bytes. Worth it from about 8 rows: below, a channel's minimum and
// step take more than the rows. REQUIRES: finite values.
size_t EncodeInt8Rows(const TokenRows& rows, std::byte* code);

// Whether `code` is, by its size, counts and channels, one that EncodeInt8Rows could have written
// for this many rows. Then decoding reads and writes nothing beyond it and the rows.
bool CheckInt8Rows(std::span<const std::byte> code, DType dtype, uint32_t rows, uint32_t dim);

// Writes k[rows, dim] and v[rows, dim]. False, and nothing written, unless CheckInt8Rows. On a
// device: kernels/gpu/copy_spans.h.
bool DecodeInt8Rows(std::span<const std::byte> code, DType dtype, uint32_t rows, uint32_t dim,
                    std::byte* k, std::byte* v);

}  // namespace icecache
