// Cublas: matrix products of a library that may be absent. libcublas is opened when a device is
// made, never linked, so the program starts on machines without it.
#pragma once

#include <memory>

#include "common/status.h"
#include "kernels/gpu/gemm.h"

namespace icecache::gpu {

class Cublas {
 public:
  ~Cublas();
  Cublas(const Cublas&) = delete;
  Cublas& operator=(const Cublas&) = delete;

  // Null when there is no usable libcublas. `stream` is a cudaStream_t, borrowed.
  static std::unique_ptr<Cublas> Load(void* stream);

  // args.y = or += x W^T with x [tokens, cols] in the weights' type; bias is not looked at. f32
  // sums; f32 weights are multiplied in f32 proper, not in TF32.
  Status Multiply(const GemmArgs& args, const void* x, bool add);

 private:
  struct Library;
  explicit Cublas(std::unique_ptr<Library> library);
  const std::unique_ptr<Library> library_;
};

}  // namespace icecache::gpu
