// What a fuzz program provides. One program = one family of parsers of bytes that come from
// outside; one target = one message type or file format of it, with a corpus of its own in
// tests/fuzz/corpus/PROGRAM/TARGET. Two engines run it: libFuzzer, where a compiler with it is at
// hand (clang++ -fsanitize=fuzzer,address -DICECACHE_LIBFUZZER, the target by name in
// ICECACHE_FUZZ_TARGET), and the driver here, which needs only g++: it replays the corpus and then
// mutates it for a given time from a printed seed.
//
// A target must never crash, hang, allocate without bound or accept what it cannot re-encode.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace icecache::fuzz {

struct Target {
  std::string name;
  // Valid inputs that mutation starts from. The corpus is these, written by --write-corpus, plus
  // every input that ever found something.
  std::vector<std::string> seeds;
  // Runs one input. A finding is a crash.
  std::function<void(const std::string& input)> run;
};

// Of this program. Called once.
std::vector<Target> Targets();

// Aborts with the words: an input broke a promise that is not a memory error.
[[noreturn]] void Broken(const char* promise);

}  // namespace icecache::fuzz
