// A decode step on a device: what it says is what the CPU says, and the host waits for the device
// once per layer.
#include <gtest/gtest.h>

#include <memory>
#include <string>

#include "kernels/gpu/attention_gpu.h"
#include "kernels/gpu/device_frames.h"
#include "tests/conformance/device_suite.h"
#include "tests/models/tiny_model.h"
#include "worker/batch_loop.h"
#include "worker/decode_loop.h"
#include "worker/model/device_model.h"
#include "worker/test_served.h"

namespace icecache {
namespace {

constexpr uint32_t kSinks = 4, kWindow = 8, kDocument = 70;

struct Ask {
  uint32_t budget = 1000000;
  uint32_t count = 2;
  bool prefetch = false;
};

class DeviceStepSuite : public gpu::DeviceSuite {
 protected:
  void SetUp() override {
    DeviceSuite::SetUp();
    if (IsSkipped()) return;
    TinySpec spec;
    spec.architecture = "Qwen3ForCausalLM";
    spec.seed = 41;
    spec.hidden = spec.inner = 32;  // the emulator is slow
    spec.vocab = 31;
    WriteTinyModel(MakeTinyModel(spec), directory_.path());
    ModelOptions options;
    options.kv_dtype = DType::kF32;
    cpu_ = LoadModel(directory_.path(), options).value();
    model_ = LoadDeviceModel(directory_.path(), options, *device_).value();
    frames_ = std::make_unique<gpu::DeviceFrames>(*device_);
    attention_ = gpu::MakeGpuAttention(*device_, frames_.get());
    std::mt19937_64 rng(42);
    for (uint32_t i = 0; i < kDocument; ++i) document_.push_back(static_cast<int32_t>(rng() % 31));
  }
  void TearDown() override {
    attention_.reset();
    frames_.reset();
    model_.reset();
    DeviceSuite::TearDown();
  }

  IceCacheOptions Options(const Ask& ask, bool on_device) const {
    IceCacheOptions options;
    options.budget = {ask.budget, kSinks, kWindow};
    options.prefetch = ask.prefetch;
    options.frames = on_device ? frames_.get() : nullptr;
    return options;
  }

  // Contexts of one server with the same document, one per question, that decode together.
  std::vector<std::vector<int32_t>> Say(std::span<const Ask> asks, bool on_device) {
    test::ServedDocument served(cpu_->shape(), kSinks, kWindow, kDocument, 0, 2, 1);
    const auto cpu_attention = MakeCpuAttention();
    BatchLoop loop(on_device ? *model_ : *cpu_, *served.client,
                   on_device ? *attention_ : *cpu_attention);
    std::vector<std::unique_ptr<AttentionIceCache>> attentions;
    std::vector<std::vector<int32_t>> said(asks.size());
    for (uint32_t i = 0; i < asks.size(); ++i) {
      served.handle.id = served.grant.context.id = ContextId(5 + i);
      EXPECT_TRUE(served.PrefillFrom(*cpu_, document_).ok());
      attentions.push_back(std::make_unique<AttentionIceCache>(
          cpu_->shape(), *served.client, on_device ? *attention_ : *cpu_attention,
          Options(asks[i], on_device)));
      attentions[i]->Begin(served.handle, served.window_state, served.grant.context.segments);
      BatchSequence sequence;
      sequence.attention = attentions[i].get();
      sequence.position = kDocument;
      sequence.feed = {static_cast<int32_t>(7 + i)};
      sequence.max_new_tokens = asks[i].count;
      sequence.on_token = [&said, i](int32_t token) {
        said[i].push_back(token);
        return true;
      };
      sequence.on_end = [](const Status& status) { EXPECT_TRUE(status.ok()) << status.ToString(); };
      EXPECT_TRUE(loop.Join(std::move(sequence)).ok());
    }
    while (loop.size() > 0) EXPECT_TRUE(loop.Step().ok());
    for (const auto& attention : attentions) EXPECT_EQ(attention->stats().degraded_steps, 0u);
    return said;
  }

  TempDirectory directory_;
  std::unique_ptr<Model> cpu_, model_;
  std::unique_ptr<gpu::DeviceFrames> frames_;
  std::unique_ptr<AttentionBackend> attention_;
  std::vector<int32_t> document_;
};

// All tokens in pages; few of them, so that residuals carry the rest and frames are used again;
// asked ahead, so that pages come while others are on their way to the device.
TEST_P(DeviceStepSuite, SequencesSayTokenForTokenWhatTheySayOnTheCpu) {
  const Ask asks[] = {{}, {44, 4}, {44, 3, true}};
  EXPECT_EQ(Say(asks, true), Say(asks, false));
}

TEST_P(DeviceStepSuite, TheHostWaitsOncePerLayerAndOnceForTheToken) {
  test::ServedDocument served(cpu_->shape(), kSinks, kWindow, kDocument, 0, 2, 1);
  ASSERT_TRUE(served.PrefillFrom(*cpu_, document_).ok());
  AttentionIceCache attention(cpu_->shape(), *served.client, *attention_, Options({44}, true));
  attention.Begin(served.handle, served.window_state, served.grant.context.segments);
  DecodeLoop loop(*model_, attention, {});
  loop.Begin(kDocument);
  Sampler sampler({});
  for (int32_t token = 3, i = 0; i < 2; ++i) {
    const uint64_t before = device_->synchronize_count();
    ASSERT_TRUE(loop.Feed(token).ok());
    EXPECT_EQ(device_->synchronize_count() - before, cpu_->shape().layers);
    const Result<int32_t> next = loop.Next(sampler);
    ASSERT_TRUE(next.ok());
    token = *next;
    EXPECT_EQ(device_->synchronize_count() - before, cpu_->shape().layers + 1);
  }
  EXPECT_GT(attention.stats().page_misses, 0u);
}

INSTANTIATE_DEVICES(DeviceStepSuite);

}  // namespace
}  // namespace icecache
