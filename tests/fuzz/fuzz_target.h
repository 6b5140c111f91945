// What a fuzz target provides. One target = one program = one parser of bytes that come from
// outside: a message type or a file format. Two engines run it: libFuzzer, where a compiler with it
// is at hand (clang++ -fsanitize=fuzzer,address; the target's file without driver.cc), and the
// driver here, which needs only g++: it replays the corpus and then mutates it for a given time
// from a printed seed.
//
// A target must never crash, hang, allocate without bound or accept what it cannot re-encode.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

// libFuzzer's entry: runs one input. Always returns 0; a finding is a crash.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace icecache::fuzz {

// Valid inputs that mutation starts from. The corpus in tests/fuzz/corpus/<target> is these,
// written by --write-corpus, plus every input that ever found something.
std::vector<std::string> Seeds();

// Aborts with the words: an input broke a promise that is not a memory error.
[[noreturn]] void Broken(const char* promise);

}  // namespace icecache::fuzz
