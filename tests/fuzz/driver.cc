// A fuzzing engine for any compiler: replays a corpus, then mutates it.
//
//   fuzz_NAME [--target NAME] [--seconds N] [--seed S] [--corpus DIR] [--write-corpus DIR]
//             [FILE...]
//
// Without --target all of them, one after the other, for so long each. DIR has a folder for each
// target. With FILEs: runs these and nothing else (to reproduce). On a crash the input is in
// ./crash-fuzz_NAME-TARGET.
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

// No input takes seconds: a hang is a finding. Set for some inputs together, since it is a system
// call.
void Limit() { alarm(10); }

void RunOne(const Target& target, std::string input) {
  g_current = std::move(input);
  target.run(g_current);
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
  static constexpr uint64_t kNumbers[] = {0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0xffff, 0x7fffffff,
                                          0xffffffff, ~0ull, 1ull << 62,
                                          // of floats: infinity, the largest, -1
                                          0x7f800000, 0x7f7fffff, 0xbf800000};
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

void Fuzz(const Target& target, const std::vector<std::string>& corpus, double seconds,
          uint64_t seed) {
  std::mt19937_64 random(seed);
  for (const std::string& input : corpus) {
    Limit();
    RunOne(target, input);
  }
  uint64_t runs = corpus.size();
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  while (std::chrono::steady_clock::now() < end) {
    Limit();
    for (int i = 0; i < 16; ++i, ++runs)
      RunOne(target, Mutate(corpus[random() % corpus.size()], corpus, random));
  }
  alarm(0);
  std::printf("%s: %llu runs over %zu seeds, seed %llu, nothing found\n", target.name.c_str(),
              static_cast<unsigned long long>(runs), corpus.size(),
              static_cast<unsigned long long>(seed));
}

void WriteCorpus(const Target& target, const std::string& dir) {
  std::filesystem::create_directories(dir + "/" + target.name);
  int n = 0;
  for (const std::string& s : target.seeds)
    std::ofstream(dir + "/" + target.name + "/seed-" + std::to_string(n++), std::ios::binary) << s;
}

// Seeds and files, sorted: the same order on every file system. A target without a folder was
// forgotten.
std::vector<std::string> CorpusOf(const Target& target, const std::string& dir) {
  std::vector<std::string> corpus = target.seeds;
  if (!dir.empty()) {
    for (const auto& entry : std::filesystem::directory_iterator(dir + "/" + target.name))
      corpus.push_back(ReadAll(entry.path()));
  }
  std::sort(corpus.begin(), corpus.end());
  return corpus;
}

struct Options {
  double seconds = 15;
  uint64_t seed = std::random_device{}();
  std::string target, corpus, write_corpus;
  std::vector<std::string> files;
};

Options Parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const auto value = [&]() -> std::string { return i + 1 < argc ? argv[++i] : ""; };
    if (word == "--seconds") {
      options.seconds = std::stod(value());
    } else if (word == "--seed") {
      options.seed = std::stoull(value());
    } else if (word == "--target") {
      options.target = value();
    } else if (word == "--corpus") {
      options.corpus = value();
    } else if (word == "--write-corpus") {
      options.write_corpus = value();
    } else {
      options.files.push_back(word);
    }
  }
  return options;
}

}  // namespace

void Broken(const char* promise) {
  std::fprintf(stderr, "broken promise: %s\n", promise);
  std::abort();
}

int Main(int argc, char** argv) {
  const Options options = Parse(argc, argv);
  const std::string program = std::filesystem::path(argv[0]).filename().string();
  for (const int s : {SIGABRT, SIGALRM, SIGSEGV, SIGFPE, SIGILL, SIGBUS}) signal(s, OnCrash);
  std::printf("seed %llu\n", static_cast<unsigned long long>(options.seed));
  bool found = false;
  for (const Target& target : Targets()) {
    if (!options.target.empty() && options.target != target.name) continue;
    found = true;
    g_crash_file = "crash-" + program + "-" + target.name;
    std::fflush(stdout);
    for (const std::string& file : options.files) {
      Limit();
      RunOne(target, ReadAll(file));
    }
    if (!options.write_corpus.empty()) WriteCorpus(target, options.write_corpus);
    if (!options.files.empty() || !options.write_corpus.empty()) continue;
    Fuzz(target, CorpusOf(target, options.corpus), options.seconds, options.seed);
  }
  if (!found)
    std::fprintf(stderr, "%s has no target '%s'\n", program.c_str(), options.target.c_str());
  return found ? 0 : 2;
}

}  // namespace icecache::fuzz

#ifdef ICECACHE_LIBFUZZER
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const auto targets = icecache::fuzz::Targets();
  const char* name = std::getenv("ICECACHE_FUZZ_TARGET");
  for (const auto& target : targets) {
    if (name == nullptr || target.name == name)
      target.run(std::string(reinterpret_cast<const char*>(data), size));
  }
  return 0;
}
#else
int main(int argc, char** argv) { return icecache::fuzz::Main(argc, argv); }
#endif
