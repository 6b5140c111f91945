#include "worker/model/gemm.h"

#include <cblas.h>

#include <algorithm>
#include <mutex>

#include "common/limits.h"
#include "kernels/distance.h"

namespace icecache {
namespace {

// Up to here reading each weight row once for all tokens beats converting panels for sgemm: 16
// tokens by 4,096 x 4,096 f16 take 16 ms against 27 ms, one token 1.8 against 13.8 (Zen 3, one
// core).
constexpr uint32_t kRowTokensMax = limits::kGroupMax;
constexpr uint32_t kPanelRowsMax = 256;  // with 4,096 inputs 4 MiB of f32 per thread
constexpr uint32_t kPanelRowsMin = 32;
// Weights of a product whose reading takes clearly longer than waking a thread does.
constexpr size_t kShareBytesMin = 2u << 20;
constexpr uint32_t kRowLanes = 16;  // DotRows wants whole vectors

// Our threads call sgemm side by side; OpenBLAS's own would compete with them for the same cores.
void UseOneBlasThread() {
  static std::once_flag once;
  std::call_once(once, [] { openblas_set_num_threads(1); });
}

bool IsFloatAligned(const std::byte* data) {
  return reinterpret_cast<uintptr_t>(data) % alignof(float) == 0;
}

}  // namespace

Gemm::Gemm(uint32_t threads) : threads_(threads), panels_(threads_.count()) { UseOneBlasThread(); }

void Gemm::Multiply(const float* x, uint32_t tokens, const WeightMatrix& w, const float* bias,
                    float* y) {
  if (tokens == 0) return;
  if (tokens <= kRowTokensMax && w.cols % kRowLanes == 0) {
    MultiplyRows(x, tokens, w, y);
  } else {
    MultiplyPanels(x, tokens, w, y);
  }
  if (bias == nullptr) return;
  for (uint32_t t = 0; t < tokens; ++t) {
    float* row = y + size_t{t} * w.rows;
    for (uint32_t r = 0; r < w.rows; ++r) row[r] += bias[r];
  }
}

void Gemm::MultiplyRows(const float* x, uint32_t tokens, const WeightMatrix& w, float* y) {
  const size_t bytes = size_t{w.rows} * w.cols * DTypeBytes(w.dtype);
  const uint32_t shares = bytes >= kShareBytesMin ? threads_.count() : 1;
  const uint32_t share_rows = (w.rows + shares - 1) / shares;
  threads_.For(shares, [&](uint32_t share, uint32_t) {
    const uint32_t begin = std::min(share * share_rows, w.rows);
    const uint32_t count = std::min(share_rows, w.rows - begin);
    if (count == 0) return;
    DotRows(x, tokens, w.row(begin), w.dtype, count, w.cols, y + begin, w.rows);
  });
}

void Gemm::MultiplyPanels(const float* x, uint32_t tokens, const WeightMatrix& w, float* y) {
  // Two panels per thread, so that an uneven end costs at most half a share.
  const uint32_t even = (w.rows + 2 * threads_.count() - 1) / (2 * threads_.count());
  const uint32_t panel_rows = std::clamp(even, kPanelRowsMin, kPanelRowsMax);
  const uint32_t panel_count = (w.rows + panel_rows - 1) / panel_rows;
  const bool in_place = w.dtype == DType::kF32 && IsFloatAligned(w.data);
  threads_.For(panel_count, [&](uint32_t index, uint32_t thread) {
    const uint32_t begin = index * panel_rows;
    const uint32_t count = std::min(panel_rows, w.rows - begin);
    const float* panel = reinterpret_cast<const float*>(w.row(begin));
    if (!in_place) {
      std::vector<float>& scratch = panels_[thread];
      const size_t elements = size_t{count} * w.cols;
      if (scratch.size() < elements) scratch.resize(elements);
      ToF32(w.row(begin), w.dtype, elements, scratch.data());
      panel = scratch.data();
    }
    MultiplyTransposed(tokens, count, w.cols, x, w.cols, panel, w.cols, y + begin, w.rows);
  });
}

void MultiplyTransposed(uint32_t m, uint32_t n, uint32_t k, const float* a, size_t lda,
                        const float* b, size_t ldb, float* c, size_t ldc) {
  UseOneBlasThread();
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, static_cast<int>(m), static_cast<int>(n),
              static_cast<int>(k), 1.0f, a, static_cast<int>(lda), b, static_cast<int>(ldb), 0.0f,
              c, static_cast<int>(ldc));
}

void MultiplyAdd(uint32_t m, uint32_t n, uint32_t k, const float* a, size_t lda, const float* b,
                 size_t ldb, float* c, size_t ldc) {
  UseOneBlasThread();
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, static_cast<int>(m), static_cast<int>(n),
              static_cast<int>(k), 1.0f, a, static_cast<int>(lda), b, static_cast<int>(ldb), 1.0f,
              c, static_cast<int>(ldc));
}

}  // namespace icecache
