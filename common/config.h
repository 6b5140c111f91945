// Configuration: typed settings bound to fields, read from flags, environment, file and defaults.
//
// One setting is one key: `memory_size` is --memory-size on the command line, ICECACHE_MEMORY_SIZE
// in the environment and memory_size in the TOML file (in the table [command] when it belongs to a
// command). Precedence: flag > environment > file > default. An unknown flag or file key, a value
// of the wrong kind or out of range is an INVALID_ARGUMENT that names the source (flag, variable,
// file:line), the key, the value and what is expected, and suggests the nearest key. An empty
// variable counts as unset. CLI11 and toml++ stay behind config.cc.
//
// Used once, in main(), before other threads start.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "common/status.h"

namespace icecache {

// Binds keys to variables that hold the defaults. Add everything, then Parse once. The variables
// outlive it.
class ConfigParser {
 public:
  // `examples`: shown at the end of --help, one per line.
  ConfigParser(std::string program, std::string description, std::string examples);
  ~ConfigParser();
  ConfigParser(const ConfigParser&) = delete;
  ConfigParser& operator=(const ConfigParser&) = delete;

  // A subcommand; keys added to it are its own, its parent's keys may stand before or after its
  // name. Valid as long as the parser. Keys of two commands may have the same name, keys of parser
  // and command may not (KV_CHECK).
  ConfigParser& AddCommand(std::string name, std::string description, std::string examples);

  // Keys added from here on stand under this heading in --help.
  void Section(std::string heading);

  // key is snake_case and new (KV_CHECK). A required key has no default and must come from
  // somewhere.
  void Add(std::string key, std::string* field, std::string help, bool required = false);
  void Add(std::string key, bool* field, std::string help);  // --key / --no-key / --key=true
  void Add(std::string key, uint32_t* field, std::string help, uint32_t min = 0,
           uint32_t max = ~0u);
  void Add(std::string key, uint64_t* field, std::string help);
  void Add(std::string key, double* field, std::string help, double min, double max);
  void AddSize(std::string key, uint64_t* bytes, std::string help);  // "4GiB"
  void AddMillis(std::string key, uint32_t* ms, std::string help);   // "250", "250ms", "2s"
  void AddList(std::string key, std::vector<std::string>* field, std::string help);  // a,b,c
  // Like a string; its value appears in no help, message or printed configuration.
  void AddSecret(std::string key, std::string* field, std::string help);
  // From the command line only, in the order added.
  void AddPositional(std::string name, std::string* field, std::string help, bool required);
  // Runs after everything is merged, when `key` has a value from any source but its default; its
  // Status is reported with that source. REQUIRES: the key was added.
  void AddCheck(std::string key, std::function<Status()> check);

  struct Outcome {
    std::string command;  // chosen subcommand, "" if none
    bool exit =
        false;  // --help, --version, --print-config, --check-config: text is printed, exit now
    int exit_code = 0;
    std::string text;  // to stdout
  };
  // Handles --config FILE (or ICECACHE_CONFIG), --print-config (merged result as TOML with the
  // source of each value as a comment), --check-config, --version and --help itself. `environment`:
  // getenv by default; tests give their own. NOT_FOUND when the file cannot be read.
  using Environment = std::function<const char*(const char*)>;
  Result<Outcome> Parse(int argc, const char* const* argv, std::string version,
                        Environment environment = {});

  // The merged settings as TOML, after Parse: those of the parser and of the chosen command. Read
  // back as a file it gives the same values (secrets excepted).
  std::string Print() const;

  // Where the value of `key` came from, after Parse: "default", "flag --key", "variable
  // ICECACHE_KEY", "file:line". Looks in the chosen command, too. REQUIRES: the key was added.
  std::string SourceOf(const std::string& key) const;

 private:
  struct Impl;
  explicit ConfigParser(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace icecache
