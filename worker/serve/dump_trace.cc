#include "worker/serve/dump_trace.h"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "common/limits.h"
#include "worker/attention_full.h"
#include "worker/decode_loop.h"
#include "worker/prefill.h"
#include "worker/progress.h"
#include "worker/serve/interrupt.h"
#include "worker/trace_file.h"

namespace icecache {
namespace {

// Full attention that writes down what it was asked.
class RecordingAttention final : public DecodeAttention {
 public:
  RecordingAttention(const ModelShape& shape, LocalKv& kv, AttentionBackend& backend,
                     TraceWriter& writer)
      : shape_(shape), kv_(kv), full_(shape, kv, backend), writer_(writer) {}

  Status Attend(LayerId layer, TokenPos first, uint32_t tokens, const float* q, const float* k,
                const float* v, float* out) override {
    KV_RETURN_IF_ERROR(full_.Attend(layer, first, tokens, q, k, v, out));
    KV_CHECK(tokens == 1);  // DecodeLoop
    const size_t group = size_t{shape_.group()} * shape_.head_dim;
    for (uint16_t h = 0; h < shape_.kv_heads; ++h) {
      TokenRows row = kv_.rows(layer, KvHeadId(h));
      row.k += (row.count - 1) * row.row_bytes();
      row.v += (row.count - 1) * row.row_bytes();
      row.count = 1;
      KV_RETURN_IF_ERROR(writer_.WriteRows(layer, KvHeadId(h), first, row));
      KV_RETURN_IF_ERROR(writer_.WriteQueries(layer, KvHeadId(h), first, {q + h * group, group}));
    }
    return OkStatus();
  }
  bool on_device() const override { return full_.on_device(); }
  const AttentionStats& stats() const override { return full_.stats(); }
  void ResetStats() override { full_.ResetStats(); }
  uint64_t kv_bytes() const override { return full_.kv_bytes(); }

 private:
  const ModelShape shape_;
  LocalKv& kv_;
  AttentionFull full_;
  TraceWriter& writer_;
};

Result<std::vector<int32_t>> ReadPrompt(const DumpTraceOptions& options,
                                        const Tokenizer& tokenizer) {
  if (options.prompt.empty() == options.prompt_file.empty()) {
    return InvalidArgument("give either --prompt-file FILE or --prompt TEXT");
  }
  std::string text = options.prompt;
  if (text.empty()) {
    KV_ASSIGN_OR_RETURN(text, ReadTextFile(options.prompt_file));
  }
  KV_ASSIGN_OR_RETURN(std::vector<int32_t> tokens, tokenizer.Encode(text, true));
  if (tokens.empty()) return InvalidArgument("the prompt is empty");
  if (options.prompt_tokens > 0) {
    const size_t length = tokens.size();
    tokens.reserve(options.prompt_tokens);
    for (size_t i = length; i < options.prompt_tokens; ++i) tokens.push_back(tokens[i % length]);
    tokens.resize(options.prompt_tokens);
  }
  return tokens;
}

Status WriteLayer(TraceWriter& writer, const FinishedLayer& layer) {
  const ModelShape& shape = layer.rows->shape();
  const size_t per_head = layer.queries.size() / shape.kv_heads;
  const size_t count = per_head / shape.group() / shape.head_dim;
  const TokenPos query_first(layer.rows->tokens() - static_cast<uint32_t>(count));
  for (uint16_t h = 0; h < shape.kv_heads; ++h) {
    const KvHeadId head(h);
    KV_RETURN_IF_ERROR(
        writer.WriteRows(layer.layer, head, layer.rows->first(), layer.rows->view(head)));
    KV_RETURN_IF_ERROR(writer.WriteQueries(layer.layer, head, query_first,
                                           {layer.queries.data() + h * per_head, per_head}));
  }
  return OkStatus();
}

}  // namespace

void AddDumpTraceCommand(ConfigParser& parser, DumpTraceOptions* o) {
  ConfigParser& command = parser.AddCommand(
      "dump-trace", "Record the keys, values and queries that a model computes on a text",
      "icecache-worker dump-trace --model tests/models/recall --prompt-file book.txt --out "
      "book.ickv\n"
      "icecache-worker dump-trace --model DIR --prompt-file book.txt --prompt-tokens 32768 "
      "--new-tokens 2000 --queries 2000 --out long.ickv\n"
      "icecache-bench select --trace file:book.ickv@2.1 --json   # layer 2, kv head 1");
  AddModelOptions(command, &o->worker);
  command.Section("Text");
  command.Add("prompt_file", &o->prompt_file, "File with the text");
  command.Add("prompt", &o->prompt, "The text itself");
  command.Add("prompt_tokens", &o->prompt_tokens,
              "Cut the text to so many tokens, or repeat it until there are; 0: as it is", 0,
              limits::kContextTokensMax);
  command.Add("new_tokens", &o->new_tokens, "Tokens the model writes after it", 0,
              limits::kContextTokensMax);
  command.Add("temperature", &o->temperature, "Of what it writes; 0: greedy", 0, 10);
  command.Add("seed", &o->seed, "Seed of what it writes");
  command.Section("Trace");
  command.Add("out", &o->out, "File to write", true);
  command.Add("queries", &o->queries, "Record the queries of so many last positions", 1,
              limits::kContextTokensMax);
}

Status RunDumpTrace(const DumpTraceOptions& options) {
  KV_ASSIGN_OR_RETURN(const LoadedModel loaded, LoadModelAndTokenizer(options.worker));
  KV_ASSIGN_OR_RETURN(const std::vector<int32_t> prompt, ReadPrompt(options, *loaded.tokenizer));
  const ModelShape& shape = loaded.model->shape();
  // The last token written is not fed back, so it has no K and V.
  const uint32_t fed = options.new_tokens > 0 ? options.new_tokens - 1 : 0;
  const auto prompt_tokens = static_cast<uint32_t>(prompt.size());
  const TraceExtent extent{shape, prompt_tokens + fed,
                           std::min(options.queries, prompt_tokens + fed)};
  KV_ASSIGN_OR_RETURN(TraceWriter writer, TraceWriter::Create(options.out, extent));

  const bool progress = options.worker.progress || ProgressBar::OnTerminal();
  const auto pump = [] { return Interrupted() ? Cancelled("interrupted") : OkStatus(); };
  LocalKv kv(shape);
  PrefillOptions prefill;
  prefill.threads = options.worker.threads;
  prefill.query_tokens = extent.query_count > fed ? extent.query_count - fed : 0;
  prefill.pump = pump;
  std::vector<float> hidden;
  {
    ProgressBar bar("prefill", progress);
    prefill.progress = [&bar](uint64_t done, uint64_t total) { bar.Update(done, total); };
    KV_ASSIGN_OR_RETURN(
        hidden, Prefill(*loaded.model, prompt, prefill, [&](const FinishedLayer& layer) -> Status {
          if (fed > 0) kv.Append(layer.layer, *layer.rows);
          return WriteLayer(writer, layer);
        }));
  }
  if (fed > 0) {
    const std::unique_ptr<AttentionBackend> backend = MakeCpuAttention();
    RecordingAttention attention(shape, kv, *backend, writer);
    DecodeLoop loop(*loaded.model, attention, pump);
    loop.Begin(prompt_tokens, hidden);
    Sampler sampler({.temperature = options.temperature, .seed = options.seed});
    ProgressBar bar("writing", progress);
    uint32_t written = 0;
    KV_RETURN_IF_ERROR(loop.Generate(sampler, options.new_tokens, {}, [&](int32_t) {
      bar.Update(++written, options.new_tokens);
      return true;
    }));
  }
  KV_RETURN_IF_ERROR(writer.Finish());
  std::printf("%s: %s, %u tokens, queries of the last %u\n", options.out.c_str(),
              shape.ToString().c_str(), extent.tokens, extent.query_count);
  return OkStatus();
}

}  // namespace icecache
