// Files of a model directory, and traces.
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <sstream>

#include "tests/fuzz/fuzz_target.h"
#include "worker/model/model_config.h"
#include "worker/model/safetensors.h"
#include "worker/model/tokenizer.h"
#include "worker/trace_file.h"

namespace icecache::fuzz {
namespace {

std::string Safetensors(const std::string& header, size_t data_bytes) {
  const uint64_t length = header.size();
  std::string out(8, '\0');
  std::memcpy(out.data(), &length, 8);
  return out + header + std::string(data_bytes, '\2');
}

void CheckSafetensors(const std::string& bytes) {
  static const std::string path = "/tmp/fuzz-model-files-" + std::to_string(getpid());
  std::ofstream(path, std::ios::binary) << bytes;
  const auto file = SafetensorsFile::Open(path);
  unlink(path.c_str());
  if (!file.ok()) return;
  unsigned sum = 0;
  for (const auto& [name, entry] : (*file)->entries()) {
    for (uint64_t i = entry.begin; i < entry.end; ++i)
      sum += static_cast<unsigned>(*((*file)->data(entry) + (i - entry.begin)));
  }
  [[maybe_unused]] static volatile unsigned sink;
  sink = sum;
}

void CheckTokenizer(std::string_view json) {
  const auto tokenizer = Tokenizer::Parse(json, "fuzz");
  if (!tokenizer.ok()) return;
  const auto ids =
      (*tokenizer)->Encode("The 12 caf\xc3\xa9s don't <ask> \xf0\x9f\x8d\x84\n \xff!", true);
  if (ids.ok()) (void)(*tokenizer)->Decode(ids.value(), false);
}

void CheckTrace(const std::string& bytes) {
  static const std::string path = "/tmp/fuzz-trace-" + std::to_string(getpid());
  std::ofstream(path, std::ios::binary) << bytes;
  auto trace = TraceReader::Open(path);
  if (trace.ok()) (void)trace->Read(LayerId(0), KvHeadId(0));
  unlink(path.c_str());
}

std::string Trace() {
  const std::string path = "/tmp/fuzz-trace-seed-" + std::to_string(getpid());
  const TraceExtent extent{{.layers = 1, .kv_heads = 1, .query_heads = 2, .head_dim = 32}, 4, 2};
  auto writer = TraceWriter::Create(path, extent);
  if (!writer.ok() || !writer->Finish().ok()) Broken("an empty trace can be written");
  std::ifstream file(path, std::ios::binary);
  std::ostringstream bytes;
  bytes << file.rdbuf();
  unlink(path.c_str());
  return bytes.str();
}

}  // namespace

std::vector<Target> Targets() {
  return {
      {"safetensors",
       {Safetensors(
           R"({"a":{"dtype":"F16","shape":[2,3],"data_offsets":[0,12]},"b":{"dtype":"F32",)"
           R"("shape":[1],"data_offsets":[12,16]}})",
           16)},
       CheckSafetensors},
      {"model_config",
       {R"({"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_size":64,)"
        R"("intermediate_size":128,"num_hidden_layers":2,"num_attention_heads":4,)"
        R"("num_key_value_heads":2,"vocab_size":100,"rope_theta":10000.0,"rms_norm_eps":1e-5,)"
        R"("max_position_embeddings":4096,"rope_scaling":{"rope_type":"llama3","factor":8.0,)"
        R"("low_freq_factor":1.0,"high_freq_factor":4.0,)"
        R"("original_max_position_embeddings":1024}})",
        R"({"architectures":["Qwen3ForCausalLM"],"model_type":"qwen3","hidden_size":64,)"
        R"("intermediate_size":128,"num_hidden_layers":2,"num_attention_heads":4,)"
        R"("num_key_value_heads":2,"head_dim":32,"vocab_size":100,"tie_word_embeddings":true})"},
       [](const std::string& json) { (void)ParseModelConfig(json, "", "fuzz"); }},
      {"tokenizer",
       {R"({"version":"1.0","added_tokens":[{"id":0,"content":"<unk>","special":true,)"
        R"("single_word":false,"lstrip":false,"rstrip":false,"normalized":false},{"id":1,)"
        R"("content":"<ask>","special":true,"single_word":false,"lstrip":false,"rstrip":false,)"
        R"("normalized":false}],"normalizer":{"type":"Lowercase"},)"
        R"("pre_tokenizer":{"type":"WhitespaceSplit"},"model":{"type":"WordLevel",)"
        R"("vocab":{"<unk>":0,"<ask>":1,"the":2},"unk_token":"<unk>"}})",
        R"({"version":"1.0","added_tokens":[],"normalizer":null,)"
        R"("pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"use_regex":true},)"
        R"("decoder":{"type":"ByteLevel"},"model":{"type":"BPE","vocab":{"a":0,"b":1,"ab":2,)"
        R"("T":3,"h":4,"e":5,"he":6},"merges":["a b","h e"]}})"},
       [](const std::string& json) { CheckTokenizer(json); }},
      {"trace", {Trace()}, CheckTrace},
  };
}

}  // namespace icecache::fuzz
