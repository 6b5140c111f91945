#include "tests/chaos/store_disk.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <random>

namespace icecache::chaos {
namespace {

namespace fs = std::filesystem;

std::vector<fs::path> StoreFiles(const std::string& directory) {
  std::vector<fs::path> files;
  std::error_code none;
  for (const auto& entry : fs::directory_iterator(directory, none)) {
    const std::string name = entry.path().filename();
    // LOG is RocksDB's diary, LOCK is empty, IDENTITY and OPTIONS are not read when it opens.
    const bool read = name.ends_with(".sst") || name.ends_with(".log") || name == "CURRENT" ||
                      name.starts_with("MANIFEST");
    if (read && entry.file_size() > 0) files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  return files;
}

}  // namespace

std::vector<std::string> StoreDisk::Environment() const {
  const fs::path beside = fs::read_symlink("/proc/self/exe").parent_path();
  const char* asan = std::getenv("ASAN_OPTIONS");
  return {"LD_PRELOAD=" + (beside / "libchaos_full_disk.so").string(), "CHAOS_DISK=" + data_dir(),
          "CHAOS_DISK_FULL=" + dir_ + "/full",
          std::string("ASAN_OPTIONS=verify_asan_link_order=0:") + (asan == nullptr ? "" : asan)};
}

void StoreDisk::SetFull(bool full) {
  if (full) {
    test::WriteFile(dir_ + "/full", "");
  } else {
    fs::remove(dir_ + "/full");
  }
}

std::string StoreDisk::Damage(uint64_t detail) {
  std::mt19937_64 random(detail);
  std::vector<fs::path> files = StoreFiles(data_dir());
  // Mostly tables: there is where the bytes are.
  std::vector<fs::path> tables = files;
  std::erase_if(tables, [](const fs::path& file) { return file.extension() != ".sst"; });
  if (random() % 4 != 0 && !tables.empty()) files = tables;
  if (files.empty()) return "";
  const fs::path file = files[random() % files.size()];
  const uint64_t size = fs::file_size(file);
  const uint64_t bytes = std::min<uint64_t>(size, 1 + random() % 8),
                 at = random() % (size - bytes + 1);
  std::fstream stream(file, std::ios::in | std::ios::out | std::ios::binary);
  stream.seekg(static_cast<std::streamoff>(at));
  std::string old(bytes, '\0');
  stream.read(old.data(), static_cast<std::streamsize>(bytes));
  for (char& c : old) c = static_cast<char>(c ^ static_cast<char>(1 + random() % 255));
  stream.seekp(static_cast<std::streamoff>(at));
  stream.write(old.data(), static_cast<std::streamsize>(bytes));
  if (file.extension() != ".sst") beyond_tables_ = true;
  test::WriteFile(damage_file(), "");
  return std::to_string(bytes) + " bytes at " + std::to_string(at) + " of " + std::to_string(size) +
         " in " + file.filename().string();
}

bool StoreDisk::damaged() const { return fs::exists(damage_file()); }

void StoreDisk::Replace() {
  // Kept until the end of the run, out of the way of the next.
  std::error_code none;
  fs::rename(data_dir(), dir_ + "/damaged-" + std::to_string(replaced_++), none);
  beyond_tables_ = false;
}

}  // namespace icecache::chaos
