// A worker on a device, as processes: the same text as on the CPU on the emulator, the right answer
// on a GPU, and a clear word where there is none.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/gpu/device.h"
#include "tests/support/process.h"

namespace icecache::test {
namespace {

using std::chrono_literals::operator""s;
using ::testing::HasSubstr;

class DeviceWorker : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string text;
    for (int i = 0; i < 6; ++i) text += " the work of others, and";
    WriteFile(dir_.path("prompt"), FactPrompt(text.substr(1)));
    WriteFile(dir_.path("question"), kFactQuestion);
  }
  std::string Answer(const std::string& device, const std::string& method,
                     const std::string& server) {
    Process worker(
        "icecache-worker",
        {"generate", "--model", SourcePath("tests/models/recall"), "--server", server, "--device",
         device, "--method", method, "--prompt-file", dir_.path("prompt"), "--question-file",
         dir_.path("question"), "--budget", "48", "--max-new-tokens", "3", "--log-level", "info"});
    const ProcessResult r = worker.Wait(500s);  // the emulator takes its time on a busy machine
    EXPECT_TRUE(r.exited && r.exit_code == 0) << worker.Err();
    if (device != "cpu") {
      EXPECT_THAT(worker.Err(), HasSubstr("computing on a device"));
    }
    return worker.Out();
  }
  TempDir dir_;
};

// Without a server, which would only make the emulator's seconds a token more.
TEST_F(DeviceWorker, EmulatedDeviceSaysWhatTheCpuSays) {
  if (gpu::kEmulatorIsSlow) GTEST_SKIP() << "kernels are not emulated under ThreadSanitizer";
  const std::string expected = Answer("cpu", "full_kv", "");
  EXPECT_THAT(expected, HasSubstr(kFactAnswer));
  EXPECT_EQ(Answer("emulated", "full_kv", ""), expected);
}

TEST_F(DeviceWorker, GpuFindsTheFact) {
  if (const auto device = gpu::MakeCudaDevice({}); !device.ok()) {
    GTEST_SKIP() << device.status().ToString();
  }
  TestServer server({"--memory-size", "512MiB"});
  EXPECT_THAT(Answer("cuda", "icecache", server.address()), HasSubstr(kFactAnswer));
}

TEST_F(DeviceWorker, WithoutAGpuAutoSaysSoAndCudaRefuses) {
  if (gpu::MakeCudaDevice({}).ok()) GTEST_SKIP() << "there is a GPU";
  const auto run = [&](const std::string& device) {
    return Process("icecache-worker", {"generate", "--model", SourcePath("tests/models/recall"),
                                       "--device", device, "--method", "sink_window", "--prompt",
                                       "<bos> a word", "--max-new-tokens", "1"});
  };
  Process automatic = run("auto");
  const ProcessResult r = automatic.Wait(60s);
  EXPECT_TRUE(r.exited && r.exit_code == 0) << automatic.Err();
  EXPECT_THAT(automatic.Err(), HasSubstr("computing on the CPU"));
  Process cuda = run("cuda");
  const ProcessResult refused = cuda.Wait(60s);
  EXPECT_TRUE(refused.exited && refused.exit_code != 0);
  EXPECT_THAT(cuda.Err(), HasSubstr("--device cuda"));
}

}  // namespace
}  // namespace icecache::test
