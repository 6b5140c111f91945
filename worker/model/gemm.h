// Matrix products of the model: the border to OpenBLAS.
//
// Weights stay mapped in the file's dtype. Few tokens (decode): each weight row is read once and
// converted in registers, which is bound by memory and so faster at 16 bits than at 32. Many tokens
// (prefill): panels of weight rows are converted to f32 in a small scratch and multiplied by sgemm,
// so the conversion's share falls with the number of tokens. Memory beyond the weights: one panel
// per thread.
//
// Threads: this module's own (compute_threads.h); OpenBLAS is set to one thread for the whole
// process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/dtype.h"
#include "worker/model/compute_threads.h"

namespace icecache {

// y = x W^T with W [rows, cols] as Linear layers store it. Borrows mapped memory; may be unaligned.
struct WeightMatrix {
  const std::byte* data = nullptr;
  DType dtype = DType::kF32;
  uint32_t rows = 0;  // outputs
  uint32_t cols = 0;  // inputs

  const std::byte* row(size_t r) const { return data + r * cols * DTypeBytes(dtype); }
};

// One thread at a time.
class Gemm {
 public:
  explicit Gemm(uint32_t threads);  // 0: one per core

  // y[tokens, rows] = x[tokens, cols] W^T (+ bias[rows] where bias is not null). y may not alias x.
  void Multiply(const float* x, uint32_t tokens, const WeightMatrix& w, const float* bias,
                float* y);
  ComputeThreads& threads() { return threads_; }

 private:
  void MultiplyRows(const float* x, uint32_t tokens, const WeightMatrix& w, float* y);
  void MultiplyPanels(const float* x, uint32_t tokens, const WeightMatrix& w, float* y);

  ComputeThreads threads_;
  std::vector<std::vector<float>> panels_;  // one per thread
};

// Row-major on the calling thread: c[m, n] = a[m, k] b[n, k]^T, rows lda, ldb, ldc floats apart.
void MultiplyTransposed(uint32_t m, uint32_t n, uint32_t k, const float* a, size_t lda,
                        const float* b, size_t ldb, float* c, size_t ldc);
// c[m, n] += a[m, k] b[k, n].
void MultiplyAdd(uint32_t m, uint32_t n, uint32_t k, const float* a, size_t lda, const float* b,
                 size_t ldb, float* c, size_t ldc);

}  // namespace icecache
