// Registry: one file per tenant that its workers append to and everybody reads: what was published,
// what was dropped, and when. The lines of one name, in this order:
//
//   ? MS DOCUMENT   will be asked to be published: from now on it may be there
//   + MS DOCUMENT   is published; MS is from before it was asked, so that a server which started
//                   later has not done it
//   - MS NAME       will be dropped: from now on it may be gone
//   x MS NAME       is dropped: must be gone
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>
#include <string>

#include "tests/chaos/document.h"

namespace icecache::chaos {

// What a worker says on stderr once SIGTERM ends its work, and no longer its life.
inline constexpr char kWorkerReady[] = "CHAOS: ready";

inline uint64_t NowMs() {
  return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch() /
                               std::chrono::milliseconds(1));
}

struct Entry {
  Document document;
  uint64_t asked_ms = 0;
  bool published = false;
  bool dropping = false;
  bool dropped = false;
};

class Registry {
 public:
  explicit Registry(std::string path) : path_(std::move(path)) {}

  // The time to give to Published.
  uint64_t Publishing(const Document& document) {
    const uint64_t now = NowMs();
    Append('?', now, document.ToLine());
    return now;
  }
  void Published(const Document& document, uint64_t asked_ms) {
    Append('+', asked_ms, document.ToLine());
  }
  void Dropping(const std::string& name) { Append('-', NowMs(), name); }
  void Dropped(const std::string& name) { Append('x', NowMs(), name); }

  std::map<std::string, Entry> Entries() const {
    std::map<std::string, Entry> all;
    std::ifstream file(path_);
    for (std::string line; std::getline(file, line);) {
      std::istringstream words(line);
      char sign = 0;
      uint64_t ms = 0;
      std::string rest;
      words >> sign >> ms >> std::ws;
      std::getline(words, rest);
      if (sign == '?' || sign == '+') {
        const auto document = Document::Parse(rest);
        if (!document) continue;  // half a line: its writer was killed
        Entry& entry = all[document->name];
        entry.document = *document;
        entry.asked_ms = ms;
        entry.published |= sign == '+';
      } else if (sign == '-' || sign == 'x') {
        (sign == '-' ? all[rest].dropping : all[rest].dropped) = true;
      }
    }
    return all;
  }

 private:
  // One write: lines of several processes do not mix.
  void Append(char sign, uint64_t ms, const std::string& text) {
    const std::string line = std::string(1, sign) + " " + std::to_string(ms) + " " + text + "\n";
    const int fd = open(path_.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0 || write(fd, line.data(), line.size()) != static_cast<ssize_t>(line.size())) {
      std::fprintf(stderr, "CHAOS: cannot write %s\n", path_.c_str());
      std::_Exit(3);
    }
    close(fd);
  }
  const std::string path_;
};

}  // namespace icecache::chaos
