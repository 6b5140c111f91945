#include "kernels/gpu/cublas.h"

#include <dlfcn.h>

#include <string>
#include <utility>

namespace icecache::gpu {
namespace {

// What is used of cuBLAS's C interface, stable since version 11 (cublas_api.h, library_types.h).
using Handle = void*;
constexpr int kNoTranspose = 0, kTranspose = 1;
constexpr int kTypeF32 = 0, kTypeF16 = 2, kTypeBF16 = 14;
constexpr int kComputeF32 = 68, kComputeF32Pedantic = 69;
constexpr int kAlgorithmDefault = -1;

using CreateFn = int (*)(Handle*);
using DestroyFn = int (*)(Handle);
using SetStreamFn = int (*)(Handle, void*);
using GemmExFn = int (*)(Handle, int trans_a, int trans_b, int m, int n, int k, const void* alpha,
                         const void* a, int a_type, int lda, const void* b, int b_type, int ldb,
                         const void* beta, void* c, int c_type, int ldc, int compute, int algo);

int TypeOf(DType dtype) {
  return dtype == DType::kF32 ? kTypeF32 : dtype == DType::kF16 ? kTypeF16 : kTypeBF16;
}

}  // namespace

struct Cublas::Library {
  void* file = nullptr;
  Handle handle = nullptr;
  DestroyFn destroy = nullptr;
  GemmExFn gemm = nullptr;

  ~Library() {
    if (handle != nullptr) (void)destroy(handle);
    if (file != nullptr) (void)dlclose(file);
  }
};

Cublas::Cublas(std::unique_ptr<Library> library) : library_(std::move(library)) {}
Cublas::~Cublas() = default;

std::unique_ptr<Cublas> Cublas::Load(void* stream) {
  auto library = std::make_unique<Library>();
  for (const char* name :
       {"libcublas.so.13", "libcublas.so.12", "libcublas.so.11", "libcublas.so"}) {
    library->file = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (library->file != nullptr) break;
  }
  if (library->file == nullptr) return nullptr;
  const auto create = reinterpret_cast<CreateFn>(dlsym(library->file, "cublasCreate_v2"));
  const auto set_stream = reinterpret_cast<SetStreamFn>(dlsym(library->file, "cublasSetStream_v2"));
  library->destroy = reinterpret_cast<DestroyFn>(dlsym(library->file, "cublasDestroy_v2"));
  library->gemm = reinterpret_cast<GemmExFn>(dlsym(library->file, "cublasGemmEx"));
  const bool found = create != nullptr && set_stream != nullptr && library->destroy != nullptr &&
                     library->gemm != nullptr;
  if (!found || create(&library->handle) != 0) return nullptr;
  if (set_stream(library->handle, stream) != 0) return nullptr;
  return std::unique_ptr<Cublas>(new Cublas(std::move(library)));
}

// Row-major y[tokens, rows] is column-major [rows, tokens], and W, x are [cols, rows], [cols,
// tokens].
Status Cublas::Multiply(const GemmArgs& args, const void* x, bool add) {
  const float one = 1.0f;
  const float beta = add ? 1.0f : 0.0f;
  const int rows = static_cast<int>(args.rows);
  const int tokens = static_cast<int>(args.tokens);
  const int cols = static_cast<int>(args.cols);
  const int type = TypeOf(args.w_dtype);
  const int error = library_->gemm(
      library_->handle, kTranspose, kNoTranspose, rows, tokens, cols, &one, args.w, type, cols, x,
      type, cols, &beta, args.y, kTypeF32, rows,
      args.w_dtype == DType::kF32 ? kComputeF32Pedantic : kComputeF32, kAlgorithmDefault);
  if (error == 0) return OkStatus();
  return Internal("cublasGemmEx of [" + std::to_string(tokens) + ", " + std::to_string(cols) +
                  "] x [" + std::to_string(cols) + ", " + std::to_string(rows) + "]: status " +
                  std::to_string(error));
}

}  // namespace icecache::gpu
