#include "common/config.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdlib>
#include <map>
#include <utility>

#include "common/config_file.h"
#include "common/config_values.h"

namespace icecache {

using config::Assign;
using config::DidYouMean;
using config::FileEntry;
using config::FlagName;
using config::Setting;
using config::ValueKind;
using config::VariableName;

namespace {

// Handled here and not by settings; in the order of --help.
constexpr const char* kReserved[] = {"help", "version", "config", "print_config", "check_config"};

std::vector<std::string> FromText(const Setting& setting, const std::string& text) {
  return setting.kind == ValueKind::kList ? config::SplitList(text)
                                          : std::vector<std::string>{text};
}

// What --help shows behind a flag.
std::string TypeName(ValueKind kind) {
  switch (kind) {
    case ValueKind::kString:
      return "TEXT";
    case ValueKind::kBool:
      return "";
    case ValueKind::kUnsigned:
      return "N";
    case ValueKind::kReal:
      return "X";
    case ValueKind::kSize:
      return "SIZE";
    case ValueKind::kMillis:
      return "TIME";
    case ValueKind::kList:
      return "A,B,...";
  }
  return "";
}

// The value as --help shows it: as it would be typed.
std::string Shown(const Setting& setting) {
  std::string text = setting.print();
  if (text.front() == '"' || text.front() == '[') text = text.substr(1, text.size() - 2);
  return text;
}

// CLI11 shows a negative flag as --no-x{false}.
class HelpFormatter final : public CLI::Formatter {
  std::string make_option_name(const CLI::Option* option, bool is_positional) const override {
    std::string name = CLI::Formatter::make_option_name(option, is_positional);
    const size_t at = name.find("{false}");
    return at == std::string::npos ? name : name.erase(at, sizeof "{false}" - 1);
  }
};

}  // namespace

struct ConfigParser::Impl {
  // Constant after construction.
  std::string name, description, examples;
  // Filled by Add*, changed by Parse only.
  std::string section = "Options";
  std::vector<Setting> settings;
  std::vector<std::unique_ptr<ConfigParser>> commands;
  Impl* parent = nullptr;
  Impl* chosen = nullptr;  // command

  // Lives during Parse.
  CLI::App* app = nullptr;
  std::map<std::string, CLI::Option*> options;

  Setting* Find(std::string_view key) {
    for (Setting& s : settings) {
      if (s.key == key) return &s;
    }
    return nullptr;
  }
  std::vector<std::string> Keys(bool flags) const;
  void Add(Setting setting, std::string key, std::string help);
  void Build(CLI::App* into);
  std::string Footer() const;
  Status ApplyFlags();
  Status ApplyEnvironment(const Environment& environment);
  Status ApplyEntries(const std::vector<FileEntry>& entries);
  Status Check();
  void Print(std::string* out) const;
  Result<Outcome> Merge(const std::string& file, const Environment& environment);
  Status RefuseExtras() const;
};

std::vector<std::string> ConfigParser::Impl::Keys(bool flags) const {
  std::vector<std::string> keys;
  for (const Impl* impl : {this, static_cast<const Impl*>(parent)}) {
    if (impl == nullptr || (!flags && impl != this)) continue;
    for (const Setting& s : impl->settings) {
      if (!s.positional) keys.push_back(flags ? FlagName(s.key) : s.key);
    }
  }
  if (!flags) return keys;
  for (const char* key : kReserved) keys.push_back(FlagName(key));
  return keys;
}

void ConfigParser::Impl::Add(Setting setting, std::string key, std::string help) {
  KV_CHECK(config::IsSnakeCase(key) && Find(key) == nullptr);
  KV_CHECK(parent == nullptr || parent->Find(key) == nullptr);
  for (const auto& command : commands) KV_CHECK(command->impl_->Find(key) == nullptr);
  for (const char* reserved : kReserved) KV_CHECK(key != reserved);
  setting.key = std::move(key);
  setting.help = std::move(help);
  setting.section = section;
  settings.push_back(std::move(setting));
}

std::string ConfigParser::Impl::Footer() const {
  std::string text =
      "Every option is also a variable (--log-level: ICECACHE_LOG_LEVEL) and a key of the TOML "
      "file\n(log_level";
  text += parent == nullptr ? "" : ", in the table [" + name + "]";
  text += "). Flags go before variables, variables before the file.";
  if (parent != nullptr) text += "\nOptions of all commands: " + parent->name + " --help";
  if (!examples.empty()) {
    text += "\n\nExamples:";
    for (size_t at = 0; at < examples.size();) {
      const size_t end = std::min(examples.find('\n', at), examples.size());
      if (end > at) text += "\n  " + examples.substr(at, end - at);
      at = end + 1;
    }
  }
  return text;
}

void ConfigParser::Impl::Build(CLI::App* into) {
  app = into;
  options.clear();
  app->allow_extras();
  app->footer(Footer());
  for (Setting& s : settings) {
    std::string help = s.help + (s.required ? " (required)" : "");
    if (s.positional) {
      options[s.key] = app->add_option(s.key)->description(help)->type_name("")->expected(1);
      continue;
    }
    const std::string flag = FlagName(s.key);
    if (s.kind == ValueKind::kBool) {
      options[s.key] = app->add_flag(flag + ",--no-" + flag.substr(2) + "{false}");
    } else {
      options[s.key] = app->add_option(flag)->type_name(TypeName(s.kind))->expected(1);
    }
    CLI::Option* option = options[s.key];
    if (!s.required && !s.secret) {
      const std::string value = Shown(s);
      if (!value.empty()) help += " [" + value + "]";
    }
    option->description(help)->group(s.section);
    option->multi_option_policy(s.kind == ValueKind::kList ? CLI::MultiOptionPolicy::TakeAll
                                                           : CLI::MultiOptionPolicy::TakeLast);
  }
  for (const auto& command : commands) {
    Impl& child = *command->impl_;
    child.Build(app->add_subcommand(child.name, child.description)->fallthrough());
  }
}

Status ConfigParser::Impl::ApplyFlags() {
  for (Setting& s : settings) {
    const CLI::Option* option = options.at(s.key);
    if (option->count() == 0) continue;
    std::vector<std::string> values;
    if (s.kind == ValueKind::kList) {
      for (const std::string& text : option->results()) {
        for (std::string& item : config::SplitList(text)) values.push_back(std::move(item));
      }
    } else {
      values = {option->results().back()};
    }
    KV_RETURN_IF_ERROR(
        Assign(s, s.positional ? "argument " + s.key : "flag " + FlagName(s.key), values));
  }
  return OkStatus();
}

Status ConfigParser::Impl::ApplyEnvironment(const Environment& environment) {
  for (Setting& s : settings) {
    if (s.positional) continue;
    const std::string variable = VariableName(s.key);
    const char* value = environment(variable.c_str());
    if (value == nullptr || *value == '\0') continue;
    KV_RETURN_IF_ERROR(Assign(s, "variable " + variable, FromText(s, value)));
  }
  return OkStatus();
}

Status ConfigParser::Impl::ApplyEntries(const std::vector<FileEntry>& entries) {
  for (const FileEntry& entry : entries) {
    const bool is_table = entry.kind == FileEntry::Kind::kTable;
    if (Setting* s = Find(entry.key); s != nullptr && !s->positional) {
      KV_RETURN_IF_ERROR(config::AssignFromFile(*s, entry));
      continue;
    }
    const auto command = std::find_if(commands.begin(), commands.end(), [&](const auto& c) {
      return is_table && c->impl_->name == entry.key;
    });
    if (command != commands.end()) {
      KV_RETURN_IF_ERROR((*command)->impl_->ApplyEntries(entry.children));
      continue;
    }
    std::vector<std::string> known = Keys(false);
    for (const auto& c : commands) known.push_back("[" + c->impl_->name + "]");
    return InvalidArgument(entry.where + ": unknown key " + entry.key +
                           (parent == nullptr ? "" : " in [" + name + "]") +
                           DidYouMean(is_table ? "[" + entry.key + "]" : entry.key, known));
  }
  return OkStatus();
}

Status ConfigParser::Impl::Check() {
  for (Setting& s : settings) {
    if (s.source.empty()) {
      if (!s.required) continue;
      if (s.positional) return InvalidArgument("argument " + s.key + " is missing: " + s.help);
      return InvalidArgument(s.key + " is missing: " + s.help + "; give " + FlagName(s.key) + ", " +
                             VariableName(s.key) + " or " + s.key + " in the file");
    }
    for (const auto& check : s.checks) {
      KV_RETURN_IF_ERROR(check().WithContext(s.source + ": " + s.key));
    }
  }
  return OkStatus();
}

void ConfigParser::Impl::Print(std::string* out) const {
  for (const Setting& s : settings) {
    if (s.positional) continue;
    const std::string line = s.key + " = " + (s.secret ? "(hidden)" : s.print());
    // What has no value must not be read back as an empty one.
    const bool absent = s.secret || (s.required && s.source.empty());
    *out += (absent ? "# " : "") + line + "  # " + (s.source.empty() ? "default" : s.source) + "\n";
  }
}

Status ConfigParser::Impl::RefuseExtras() const {
  const Impl& innermost = chosen != nullptr ? *chosen : *this;
  std::vector<std::string> extras = app->remaining(true);
  // A flag that nobody knows explains the stray value behind it.
  std::stable_partition(extras.begin(), extras.end(),
                        [](const auto& e) { return e.size() > 1 && e[0] == '-'; });
  for (const std::string& extra : extras) {
    if (extra == "--") continue;
    if (extra.size() > 1 && extra[0] == '-') {
      const std::string flag = extra.substr(0, extra.find('='));
      return InvalidArgument("unknown flag " + flag + DidYouMean(flag, innermost.Keys(true)) +
                             " (--help lists all)");
    }
    if (!commands.empty() && chosen == nullptr) {
      std::vector<std::string> names;
      for (const auto& c : commands) names.push_back(c->impl_->name);
      return InvalidArgument("unknown command '" + extra + "'" + DidYouMean(extra, names) +
                             " (--help lists all)");
    }
    return InvalidArgument("unexpected argument '" + extra + "' (--help shows the usage)");
  }
  return OkStatus();
}

// Lowest precedence first, each overwriting the one before; every source is checked, also where it
// is overruled.
Result<ConfigParser::Outcome> ConfigParser::Impl::Merge(const std::string& file,
                                                        const Environment& environment) {
  if (!file.empty()) {
    KV_ASSIGN_OR_RETURN(const auto entries, config::ReadConfigFile(file));
    KV_RETURN_IF_ERROR(ApplyEntries(entries));
  }
  for (Impl* impl : {this, chosen}) {
    if (impl != nullptr) KV_RETURN_IF_ERROR(impl->ApplyEnvironment(environment));
  }
  for (Impl* impl : {this, chosen}) {
    if (impl != nullptr) KV_RETURN_IF_ERROR(impl->ApplyFlags());
  }
  for (Impl* impl : {this, chosen}) {
    if (impl != nullptr) KV_RETURN_IF_ERROR(impl->Check());
  }
  Outcome outcome;
  if (chosen != nullptr) outcome.command = chosen->name;
  return outcome;
}

ConfigParser::ConfigParser(std::string program, std::string description, std::string examples)
    : ConfigParser(std::make_unique<Impl>()) {
  impl_->name = std::move(program);
  impl_->description = std::move(description);
  impl_->examples = std::move(examples);
}
ConfigParser::ConfigParser(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
ConfigParser::~ConfigParser() = default;

ConfigParser& ConfigParser::AddCommand(std::string name, std::string description,
                                       std::string examples) {
  KV_CHECK(impl_->parent == nullptr && impl_->Find(name) == nullptr);
  auto impl = std::make_unique<Impl>();
  impl->name = std::move(name);
  impl->description = std::move(description);
  impl->examples = std::move(examples);
  impl->parent = impl_.get();
  impl_->commands.emplace_back(new ConfigParser(std::move(impl)));
  return *impl_->commands.back();
}

void ConfigParser::Section(std::string heading) { impl_->section = std::move(heading); }

void ConfigParser::Add(std::string key, std::string* field, std::string help, bool required) {
  Setting s = config::StringSetting(field);
  s.required = required;
  impl_->Add(std::move(s), std::move(key), std::move(help));
}
void ConfigParser::Add(std::string key, bool* field, std::string help) {
  impl_->Add(config::BoolSetting(field), std::move(key), std::move(help));
}
void ConfigParser::Add(std::string key, uint32_t* field, std::string help, uint32_t min,
                       uint32_t max) {
  impl_->Add(config::UnsignedSetting(field, min, max), std::move(key), std::move(help));
}
void ConfigParser::Add(std::string key, uint64_t* field, std::string help) {
  impl_->Add(config::UnsignedSetting(field), std::move(key), std::move(help));
}
void ConfigParser::Add(std::string key, double* field, std::string help, double min, double max) {
  impl_->Add(config::RealSetting(field, min, max), std::move(key), std::move(help));
}
void ConfigParser::AddSize(std::string key, uint64_t* bytes, std::string help) {
  impl_->Add(config::SizeSetting(bytes), std::move(key), std::move(help));
}
void ConfigParser::AddMillis(std::string key, uint32_t* ms, std::string help) {
  impl_->Add(config::MillisSetting(ms), std::move(key), std::move(help));
}
void ConfigParser::AddList(std::string key, std::vector<std::string>* field, std::string help) {
  impl_->Add(config::ListSetting(field), std::move(key), std::move(help));
}
void ConfigParser::AddSecret(std::string key, std::string* field, std::string help) {
  Setting s = config::StringSetting(field);
  s.secret = true;
  impl_->Add(std::move(s), std::move(key), std::move(help));
}
void ConfigParser::AddPositional(std::string name, std::string* field, std::string help,
                                 bool required) {
  Setting s = config::StringSetting(field);
  s.required = required;
  s.positional = true;
  impl_->Add(std::move(s), std::move(name), std::move(help));
}
void ConfigParser::AddCheck(std::string key, std::function<Status()> check) {
  Setting* s = impl_->Find(key);
  KV_CHECK(s != nullptr);
  s->checks.push_back(std::move(check));
}

Result<ConfigParser::Outcome> ConfigParser::Parse(int argc, const char* const* argv,
                                                  std::string version, Environment environment) {
  if (!environment) environment = [](const char* name) { return std::getenv(name); };
  CLI::App app(impl_->description, impl_->name);
  app.formatter(std::make_shared<HelpFormatter>());
  app.set_help_flag("-h,--help", "Print this help");
  const auto* show_version = app.add_flag("--version")->description("Print the version");
  const auto* file = app.add_option("--config", "Read settings from this TOML file")
                         ->type_name("FILE")
                         ->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  const auto* print =
      app.add_flag("--print-config")->description("Print the merged settings and their sources");
  const auto* check = app.add_flag("--check-config")->description("Check the settings and exit");
  impl_->Build(&app);

  std::vector<std::string> arguments;  // CLI11 wants them from the last to the first
  for (int i = argc - 1; i > 0; --i) {
    const std::string argument = argv[i];
    const bool empty_value = argument.starts_with("--") && argument.ends_with("=");
    if (empty_value) arguments.emplace_back();  // else CLI11 takes the next argument as the value
    arguments.push_back(empty_value ? argument.substr(0, argument.size() - 1) : argument);
  }
  Outcome early{.exit = true};
  try {
    app.parse(arguments);
  } catch (const CLI::CallForHelp&) {
    early.text = app.help();
    return early;
  } catch (const CLI::ParseError& e) {
    return InvalidArgument(std::string(e.what()) + " (--help lists all flags)");
  }
  if (show_version->count() > 0) {
    early.text = version + "\n";
    return early;
  }
  impl_->chosen = nullptr;
  for (const auto& command : impl_->commands) {
    if (app.got_subcommand(command->impl_->name)) impl_->chosen = command->impl_.get();
  }
  KV_RETURN_IF_ERROR(impl_->RefuseExtras());

  const char* variable = environment(VariableName("config").c_str());
  std::string path = variable == nullptr ? "" : variable;
  if (file->count() > 0) path = file->results().back();
  KV_ASSIGN_OR_RETURN(Outcome outcome, impl_->Merge(path, environment));
  outcome.exit = print->count() > 0 || check->count() > 0;
  if (check->count() > 0) outcome.text = "The configuration is valid.\n";
  if (print->count() > 0) outcome.text = Print();
  return outcome;
}

std::string ConfigParser::Print() const {
  std::string out;
  impl_->Print(&out);
  if (impl_->chosen == nullptr) return out;
  out += "\n[" + impl_->chosen->name + "]\n";
  impl_->chosen->Print(&out);
  return out;
}

std::string ConfigParser::SourceOf(const std::string& key) const {
  const Setting* s = impl_->Find(key);
  if (s == nullptr && impl_->chosen != nullptr) s = impl_->chosen->Find(key);
  KV_CHECK(s != nullptr);
  return s->source.empty() ? "default" : s->source;
}

}  // namespace icecache
