// A fuzzing engine for any compiler: replays a corpus, then mutates it.
//
//   fuzz_NAME [--seconds N] [--seed S] [--corpus DIR] [--write-corpus DIR] [FILE...]
//
// With FILEs: runs these and nothing else (to reproduce). On a crash the input is in
// ./crash-fuzz_NAME.
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>

#include "tests/fuzz/fuzz_target.h"

namespace icecache::fuzz {
namespace {

constexpr size_t kInputBytesMax = 1 << 16;

std::string g_current;  // the input being run, for the crash handler
std::string g_crash_file;

// Async-signal-safe: open, write, raise.
void OnCrash(int signal) {
  const int fd = open(g_crash_file.c_str(), O_CREAT | O_TRUNC | O_WRONLY, 0600);
  if (fd >= 0) {
    const ssize_t ignored = write(fd, g_current.data(), g_current.size());
    (void)ignored;
    close(fd);
  }
  ::signal(signal, SIG_DFL);
  raise(signal);
}

void RunOne(const std::string& input) {
  g_current = input;
  alarm(10);  // no single input takes seconds: a hang is a finding
  LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
  alarm(0);
}

std::string ReadAll(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

// One to eight small edits, of the kinds that parsers trip over.
std::string Mutate(std::string input, const std::vector<std::string>& corpus,
                   std::mt19937_64& random) {
  static constexpr uint64_t kNumbers[] = {0,      1,          0x7f,       0x80,  0xff,      0x7fff,
                                          0xffff, 0x7fffffff, 0xffffffff, ~0ull, 1ull << 62};
  const auto at = [&] { return input.empty() ? 0 : random() % input.size(); };
  for (uint64_t edits = 1 + random() % 8; edits > 0; --edits) {
    switch (random() % 8) {
      case 0:
        if (!input.empty()) input[at()] ^= static_cast<char>(1u << (random() % 8));
        break;
      case 1:
        if (!input.empty()) input[at()] = static_cast<char>(random());
        break;
      case 2:
        input.insert(at(), 1 + random() % 8, static_cast<char>(random()));
        break;
      case 3:
        if (!input.empty()) input.erase(at(), 1 + random() % 16);
        break;
      case 4:
        input.resize(at());
        break;   // truncate
      case 5: {  // an interesting number over some bytes
        const uint64_t number = kNumbers[random() % std::size(kNumbers)];
        const size_t bytes = size_t{1} << (random() % 4);
        if (input.size() >= bytes)
          std::memcpy(&input[random() % (input.size() - bytes + 1)], &number, bytes);
        break;
      }
      case 6: {  // a piece of itself again
        if (input.empty()) break;
        const size_t from = at();
        const std::string piece = input.substr(from, 1 + random() % 64);
        input.insert(at(), piece);
        break;
      }
      default: {  // the head of this, the tail of another
        const std::string& other = corpus[random() % corpus.size()];
        if (other.empty()) break;
        input = input.substr(0, at()) + other.substr(random() % other.size());
      }
    }
    if (input.size() > kInputBytesMax) input.resize(kInputBytesMax);
  }
  return input;
}

int Fuzz(std::vector<std::string> corpus, double seconds, uint64_t seed) {
  std::mt19937_64 random(seed);
  for (const std::string& input : corpus) RunOne(input);
  uint64_t runs = corpus.size();
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  while (std::chrono::steady_clock::now() < end) {
    for (int i = 0; i < 16; ++i, ++runs)
      RunOne(Mutate(corpus[random() % corpus.size()], corpus, random));
  }
  std::printf("%llu runs over %zu seeds, seed %llu, nothing found\n",
              static_cast<unsigned long long>(runs), corpus.size(),
              static_cast<unsigned long long>(seed));
  return 0;
}

}  // namespace

void Broken(const char* promise) {
  std::fprintf(stderr, "broken promise: %s\n", promise);
  std::abort();
}

int Main(int argc, char** argv) {
  double seconds = 15;
  uint64_t seed = std::random_device{}();
  std::vector<std::string> corpus, files;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const auto value = [&]() -> std::string { return i + 1 < argc ? argv[++i] : ""; };
    if (word == "--seconds") {
      seconds = std::stod(value());
    } else if (word == "--seed") {
      seed = std::stoull(value());
    } else if (word == "--corpus") {
      for (const auto& entry : std::filesystem::directory_iterator(value()))
        corpus.push_back(ReadAll(entry.path()));
      std::sort(corpus.begin(), corpus.end());  // the same order on every file system
    } else if (word == "--write-corpus") {
      const std::string dir = value();
      std::filesystem::create_directories(dir);
      int n = 0;
      for (const std::string& s : Seeds())
        std::ofstream(dir + "/seed-" + std::to_string(n++), std::ios::binary) << s;
      return 0;
    } else {
      files.push_back(word);
    }
  }
  g_crash_file = "crash-" + std::filesystem::path(argv[0]).filename().string();
  for (const int s : {SIGABRT, SIGALRM, SIGSEGV, SIGFPE, SIGILL, SIGBUS}) signal(s, OnCrash);
  for (const std::string& f : files) RunOne(ReadAll(f));
  if (!files.empty()) return 0;
  for (const std::string& s : Seeds()) corpus.push_back(s);
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  std::fflush(stdout);
  return Fuzz(std::move(corpus), seconds, seed);
}

}  // namespace icecache::fuzz

int main(int argc, char** argv) { return icecache::fuzz::Main(argc, argv); }
