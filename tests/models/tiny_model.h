// Tiny models with random weights in Hugging Face layout, written to a directory of the test's own.
//
// One spec says everything; the tensors' values are those that the file holds after rounding to its
// dtype, so a reference that computes with them differs from the loader under test by arithmetic
// only.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "common/dtype.h"

namespace icecache {

struct TinyTensor {
  std::vector<uint64_t> shape;
  std::vector<double> values;  // row-major, as rounded to the file's dtype
};

struct TinySpec {
  std::string architecture = "LlamaForCausalLM";
  uint32_t layers = 2;
  uint32_t hidden = 64;
  uint32_t inner = 96;
  uint32_t query_heads = 4;
  uint32_t kv_heads = 2;
  uint32_t head_dim = 32;
  uint32_t vocab = 101;
  uint32_t max_positions = 4096;
  double eps = 1e-5;
  double rope_theta = 10000;
  std::string rope_scaling = "null";  // JSON
  bool tied = false;
  bool attention_bias = false;  // the key; Qwen2 has q, k, v biases without it
  bool mlp_bias = false;
  DType dtype = DType::kF32;
  uint32_t shards = 1;
  uint64_t seed = 1;

  bool has_qkv_bias() const { return attention_bias || architecture == "Qwen2ForCausalLM"; }
  bool has_qk_norm() const { return architecture == "Qwen3ForCausalLM"; }
};

struct TinyModel {
  TinySpec spec;
  std::map<std::string, TinyTensor> tensors;
};

TinyModel MakeTinyModel(const TinySpec& spec);

std::string TinyConfigJson(const TinySpec& spec);

// One safetensors file of the tensors named. Aborts the test program on a failing write.
void WriteSafetensors(const std::string& path, const std::map<std::string, TinyTensor>& tensors,
                      DType dtype);
void WriteText(const std::string& path, const std::string& text);

// config.json and the weights, in spec.shards files.
void WriteTinyModel(const TinyModel& model, const std::string& directory);

// A new empty directory, removed with all it holds at the end of its scope.
class TempDirectory {
 public:
  TempDirectory();
  ~TempDirectory();
  TempDirectory(const TempDirectory&) = delete;
  TempDirectory& operator=(const TempDirectory&) = delete;

  const std::string& path() const { return path_; }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

}  // namespace icecache
