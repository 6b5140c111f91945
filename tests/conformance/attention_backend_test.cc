#include "tests/conformance/attention_backend_suite.h"

namespace icecache {
namespace {

INSTANTIATE_TEST_SUITE_P(Cpu, AttentionBackendSuite,
                         testing::Values(BackendCase{"cpu", MakeCpuAttention}));
// The reference runs its own suite too: pages, rows and merges must agree with each other.
INSTANTIATE_TEST_SUITE_P(Reference, AttentionBackendSuite,
                         testing::Values(BackendCase{"reference", MakeReferenceAttention}));

}  // namespace
}  // namespace icecache
