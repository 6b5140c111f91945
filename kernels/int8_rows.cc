#include "kernels/int8_rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "common/limits.h"
#include "common/status.h"
#include "kernels/distance.h"
#include "kernels/int8_layout.h"

namespace icecache {
namespace {

constexpr uint32_t kRowsMax = limits::kPageTokens;
constexpr uint32_t kDimMax = limits::kHeadDimMax;
constexpr float kOutlierFactor = 4;  // times the mean step (K) or largest value (V) of a channel
constexpr float kLevels = 255;

// A step in the dtype that is not below range / kLevels. Halves, since a range can be twice the
// largest float.
float StoreStep(float half_range, DType dtype, std::byte* out) {
  const float step = half_range * (2 / kLevels);
  if (dtype == DType::kF32) {
    std::memcpy(out, &step, sizeof(step));
    return step;
  }
  const auto read = [dtype](uint16_t b) {
    return dtype == DType::kF16 ? F16ToF32(b) : BF16ToF32(b);
  };
  uint16_t bits = dtype == DType::kF16 ? F32ToF16(step) : F32ToBF16(step);
  while (read(bits) < step) ++bits;  // at most twice: rounding is to nearest
  std::memcpy(out, &bits, sizeof(bits));
  return read(bits);
}

struct Block {  // one of K and V on its way
  float x[kRowsMax * kDimMax];
  float low[kDimMax], high[kDimMax];  // per channel
  bool outlier[kDimMax];
};

void Load(const std::byte* from, DType dtype, uint32_t rows, uint32_t dim, Block* block) {
  ToF32(from, dtype, size_t{rows} * dim, block->x);
  std::copy_n(block->x, dim, block->low);
  std::copy_n(block->x, dim, block->high);
  for (uint32_t r = 1; r < rows; ++r) {
    const float* row = block->x + size_t{r} * dim;
    for (uint32_t d = 0; d < dim; ++d) {
      block->low[d] = std::min(block->low[d], row[d]);
      block->high[d] = std::max(block->high[d], row[d]);
    }
  }
}

// Channels whose size is far above the mean, at most kInt8OutliersMax of them, the largest ones.
uint32_t FindOutliers(const float* size, uint32_t dim, bool* outlier, std::byte* channels) {
  float sum = 0;
  for (uint32_t d = 0; d < dim; ++d) sum += size[d] / static_cast<float>(dim);
  std::fill_n(outlier, dim, false);
  const float bound = kOutlierFactor * sum;
  uint32_t found[kDimMax];
  uint32_t count = 0;
  for (uint32_t d = 0; d < dim; ++d) {
    if (size[d] > bound) found[count++] = d;
  }
  if (count > kInt8OutliersMax) {
    std::nth_element(found, found + kInt8OutliersMax, found + count,
                     [size](uint32_t a, uint32_t b) { return size[a] > size[b]; });
    count = kInt8OutliersMax;
    std::sort(found, found + count);
  }
  for (uint32_t i = 0; i < count; ++i) {
    outlier[found[i]] = true;
    channels[i] = static_cast<std::byte>(found[i]);
  }
  return count;
}

// codes[d] of one row; half_min and 2 / step per channel. Halves keep differences finite.
void CodeRow(const float* x, const float* half_min, const float* inverse, uint32_t dim,
             std::byte* codes) {
  auto* out = reinterpret_cast<uint8_t*>(codes);
  for (uint32_t d = 0; d < dim; ++d) {
    const float level = (0.5f * x[d] - half_min[d]) * inverse[d] + 0.5f;
    out[d] = static_cast<uint8_t>(static_cast<int32_t>(std::clamp(level, 0.0f, kLevels)));
  }
}

void DecodeRow(const std::byte* codes, const float* half_min, const float* half_step, uint32_t dim,
               float largest, float* x) {
  const auto* in = reinterpret_cast<const uint8_t*>(codes);
  for (uint32_t d = 0; d < dim; ++d) {
    x[d] = DecodeInt8(half_min[d], half_step[d], in[d], largest);
  }
}

float Inverse(float step) { return step > 0 ? 2 / step : 0; }

void EncodeKeys(Block& block, DType dtype, uint32_t rows, uint32_t dim,
                const Int8Parts<std::byte>& to) {
  float half_min[kDimMax], inverse[kDimMax];
  const size_t e = DTypeBytes(dtype);
  FromF32(block.low, dim, dtype, to.k_min);  // an element's own value: exact
  for (uint32_t d = 0; d < dim; ++d) {
    const float half_range = block.outlier[d] ? 0 : 0.5f * block.high[d] - 0.5f * block.low[d];
    half_min[d] = 0.5f * block.low[d];
    inverse[d] = Inverse(StoreStep(half_range, dtype, to.k_step + d * e));
  }
  for (uint32_t r = 0; r < rows; ++r) {
    CodeRow(block.x + size_t{r} * dim, half_min, inverse, dim, to.k_codes + size_t{r} * dim);
  }
}

void EncodeValues(Block& block, DType dtype, uint32_t rows, uint32_t dim,
                  const Int8Parts<std::byte>& to) {
  float half_min[kDimMax], inverse[kDimMax];
  const size_t e = DTypeBytes(dtype);
  for (uint32_t r = 0; r < rows; ++r) {
    float* row = block.x + size_t{r} * dim;
    float low = std::numeric_limits<float>::max(), high = -low;
    for (uint32_t d = 0; d < dim; ++d) {
      low = block.outlier[d] ? low : std::min(low, row[d]);
      high = block.outlier[d] ? high : std::max(high, row[d]);
    }
    FromF32(&low, 1, dtype, to.v_min + r * e);
    const float step = StoreStep(0.5f * high - 0.5f * low, dtype, to.v_step + r * e);
    std::fill_n(half_min, dim, 0.5f * low);
    std::fill_n(inverse, dim, Inverse(step));
    CodeRow(row, half_min, inverse, dim, to.v_codes + size_t{r} * dim);
  }
}

void CopyColumn(const std::byte* rows, uint32_t row_count, size_t row_bytes, size_t at, size_t e,
                std::byte* column) {
  for (uint32_t r = 0; r < row_count; ++r) std::memcpy(column + r * e, rows + r * row_bytes + at, e);
}

}  // namespace

size_t Int8RowsBytesMax(DType dtype, uint32_t rows, uint32_t dim) {
  std::byte start{};
  return static_cast<size_t>(
      Int8Parts<std::byte>(&start, dtype, rows, dim, 2 * kInt8OutliersMax).end - &start);
}

size_t EncodeInt8Rows(const TokenRows& rows, std::byte* code) {
  const uint32_t n = rows.count, dim = rows.head_dim;
  KV_CHECK(n > 0 && n <= kRowsMax && dim <= kDimMax);
  const size_t e = DTypeBytes(rows.dtype);
  static thread_local Block keys, values;
  Load(rows.k, rows.dtype, n, dim, &keys);
  Load(rows.v, rows.dtype, n, dim, &values);
  float size[kDimMax] = {};
  std::byte channels[2 * kInt8OutliersMax];
  for (uint32_t d = 0; d < dim; ++d) size[d] = 0.5f * keys.high[d] - 0.5f * keys.low[d];
  const uint32_t k_count = FindOutliers(size, dim, keys.outlier, channels);
  for (uint32_t d = 0; d < dim; ++d) size[d] = std::max(values.high[d], -values.low[d]);
  const uint32_t v_count = FindOutliers(size, dim, values.outlier, channels + k_count);
  const uint32_t outliers = k_count + v_count;
  const Int8Parts<std::byte> to(code, rows.dtype, n, dim, outliers);
  to.counts[0] = static_cast<std::byte>(k_count);
  to.counts[1] = static_cast<std::byte>(v_count);
  std::copy_n(channels, outliers, to.channels);
  if (outliers % 2 != 0) to.channels[outliers] = std::byte{0};
  for (uint32_t i = 0; i < outliers; ++i) {
    CopyColumn(i < k_count ? rows.k : rows.v, n, rows.row_bytes(),
               std::to_integer<size_t>(channels[i]) * e, e, to.columns + size_t{i} * n * e);
  }
  EncodeKeys(keys, rows.dtype, n, dim, to);
  EncodeValues(values, rows.dtype, n, dim, to);
  return static_cast<size_t>(to.end - code);
}

bool CheckInt8Rows(std::span<const std::byte> code, DType dtype, uint32_t rows, uint32_t dim) {
  if (rows == 0 || rows > kRowsMax || dim > kDimMax) return false;
  const Int8Parts<const std::byte> none(code.data(), dtype, rows, dim, 0);
  if (code.data() + code.size() < none.end) return false;
  const auto k_count = std::to_integer<uint32_t>(none.counts[0]);
  const auto v_count = std::to_integer<uint32_t>(none.counts[1]);
  if (k_count > kInt8OutliersMax || v_count > kInt8OutliersMax) return false;
  const Int8Parts<const std::byte> parts(code.data(), dtype, rows, dim, k_count + v_count);
  if (code.data() + code.size() != parts.end) return false;
  return std::all_of(parts.channels, parts.channels + k_count + v_count,
                     [dim](std::byte channel) { return std::to_integer<uint32_t>(channel) < dim; });
}

bool DecodeInt8Rows(std::span<const std::byte> code, DType dtype, uint32_t rows, uint32_t dim,
                    std::byte* k, std::byte* v) {
  if (!CheckInt8Rows(code, dtype, rows, dim)) return false;
  const size_t e = DTypeBytes(dtype), row_bytes = dim * e;
  const std::byte* const counts =
      Int8Parts<const std::byte>(code.data(), dtype, rows, dim, 0).counts;
  const auto k_count = std::to_integer<uint32_t>(counts[0]);
  const uint32_t outliers = k_count + std::to_integer<uint32_t>(counts[1]);
  const Int8Parts<const std::byte> from(code.data(), dtype, rows, dim, outliers);

  float half_min[kDimMax], half_step[kDimMax], row[kDimMax];
  const float largest = LargestOf(dtype);
  ToF32(from.k_min, dtype, dim, half_min);
  ToF32(from.k_step, dtype, dim, half_step);
  for (uint32_t d = 0; d < dim; ++d) half_min[d] *= 0.5f, half_step[d] *= 0.5f;
  for (uint32_t r = 0; r < rows; ++r) {
    DecodeRow(from.k_codes + size_t{r} * dim, half_min, half_step, dim, largest, row);
    FromF32(row, dim, dtype, k + r * row_bytes);
  }
  for (uint32_t r = 0; r < rows; ++r) {
    float low = 0, step = 0;
    ToF32(from.v_min + r * e, dtype, 1, &low);
    ToF32(from.v_step + r * e, dtype, 1, &step);
    std::fill_n(half_min, dim, 0.5f * low);
    std::fill_n(half_step, dim, 0.5f * step);
    DecodeRow(from.v_codes + size_t{r} * dim, half_min, half_step, dim, largest, row);
    FromF32(row, dim, dtype, v + r * row_bytes);
  }
  for (uint32_t i = 0; i < outliers; ++i) {
    const auto channel = std::to_integer<size_t>(from.channels[i]);
    std::byte* to = (i < k_count ? k : v) + channel * e;
    const std::byte* column = from.columns + size_t{i} * rows * e;
    for (uint32_t r = 0; r < rows; ++r) std::memcpy(to + r * row_bytes, column + r * e, e);
  }
  return true;
}

}  // namespace icecache
