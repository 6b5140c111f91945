// The disk under the server's --data-dir: it can become full, and its files can be damaged or taken
// away while no server uses them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tests/support/process.h"

namespace icecache::chaos {

class StoreDisk {
 public:
  // dir: an existing folder for the store and what belongs to it.
  explicit StoreDisk(const std::string& dir) : dir_(dir) {}

  std::string data_dir() const { return dir_ + "/data"; }
  // Exists while a damaged store is in use.
  std::string damage_file() const { return dir_ + "/damaged"; }
  // What a server's process needs in its environment, so that the disk can be full for it.
  std::vector<std::string> Environment() const;

  void SetFull(bool full);

  // REQUIRES: no server runs. Changes 1 to 8 bytes of one file, as `detail` has it, and says what
  // it did; "" when there is no file yet.
  std::string Damage(uint64_t detail);
  bool damaged() const;
  // Of tables RocksDB checks every byte that it reads, so that nothing can vanish in silence. From
  // its manifest and the end of its log it may take damage for the place where they stopped.
  bool damaged_beyond_tables() const { return beyond_tables_; }
  // REQUIRES: no server runs. The folder is moved away: the next server starts with an empty one.
  void Replace();

 private:
  const std::string dir_;
  uint32_t replaced_ = 0;
  bool beyond_tables_ = false;
};

}  // namespace icecache::chaos
