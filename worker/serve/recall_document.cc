#include "worker/serve/recall_document.h"

#include <algorithm>
#include <array>
#include <filesystem>
#include <string_view>
#include <utility>

#include "worker/serve/options.h"

namespace icecache {
namespace {

constexpr const char* kDefaultTexts = "/usr/share/common-licenses";
constexpr uint64_t kTextBytesMax = 64u << 20;

constexpr std::array<std::string_view, 16> kAdjectives = {
    "amber",  "azure",  "bronze", "cobalt", "copper", "coral", "crimson", "ebony",
    "golden", "indigo", "ivory",  "jade",   "olive",  "pearl", "ruby",    "silver"};
constexpr std::array<std::string_view, 16> kNouns = {
    "badger", "condor", "dolphin", "falcon",  "ferret", "gazelle", "heron", "jackal",
    "lemur",  "marten", "otter",   "panther", "raven",  "salmon",  "tapir", "walrus"};
constexpr std::array<std::string_view, 64> kCities = {
    "oslo",     "lima",    "cairo",   "paris",   "delhi",    "tokyo",    "quito",    "sofia",
    "minsk",    "accra",   "dakar",   "hanoi",   "kabul",    "kyiv",     "lagos",    "lusaka",
    "malta",    "milan",   "miami",   "osaka",   "perth",    "porto",    "prague",   "riga",
    "rome",     "seoul",   "sydney",  "tallinn", "tbilisi",  "tehran",   "tunis",    "turin",
    "vienna",   "vilnius", "warsaw",  "yerevan", "zagreb",   "zurich",   "athens",   "baghdad",
    "bangkok",  "beirut",  "berlin",  "bern",    "bogota",   "adelaide", "brussels", "bucharest",
    "budapest", "caracas", "chicago", "dallas",  "denver",   "dhaka",    "doha",     "dubai",
    "dublin",   "geneva",  "glasgow", "havana",  "helsinki", "houston",  "jakarta",  "karachi"};

// splitmix64: the same numbers with every library, unlike <random>'s distributions.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t Next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  size_t Below(size_t count) { return static_cast<size_t>(Next() % count); }
  template <typename T>
  void Shuffle(std::vector<T>* items) {
    for (size_t i = items->size(); i > 1; --i) std::swap((*items)[i - 1], (*items)[Below(i)]);
  }

 private:
  uint64_t state_;
};

Result<std::vector<std::string>> TextFiles(const RecallDocumentOptions& options) {
  if (!options.text_files.empty()) return options.text_files;
  std::vector<std::string> files;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(kDefaultTexts, error)) {
    // Links are second names of the same licence.
    if (entry.is_regular_file() && !entry.is_symlink()) files.push_back(entry.path().string());
  }
  if (files.empty()) {
    return NotFound(std::string("no text in ") + kDefaultTexts +
                    "; name files with --text-files a.txt,b.txt");
  }
  std::sort(files.begin(), files.end());
  return files;
}

Result<std::vector<int32_t>> ReadCorpus(const Tokenizer& tokenizer,
                                        const RecallDocumentOptions& options) {
  KV_ASSIGN_OR_RETURN(const std::vector<std::string> files, TextFiles(options));
  std::string text;
  for (const std::string& file : files) {
    KV_ASSIGN_OR_RETURN(const std::string content, ReadTextFile(file));
    text += content + "\n";
    if (text.size() > kTextBytesMax) {
      return InvalidArgument("more than 64 MiB of text; name fewer --text-files");
    }
  }
  KV_ASSIGN_OR_RETURN(std::vector<int32_t> tokens, tokenizer.Encode(text, false));
  if (tokens.empty()) return InvalidArgument("the --text-files hold no text");
  return tokens;
}

struct Fact {
  std::vector<int32_t> tokens;
  RecallQuestion question;
};

Result<Fact> MakeFact(const Tokenizer& tokenizer, const std::string& name, std::string_view first,
                      std::string_view second) {
  Fact fact;
  const std::string begin = "<fact> " + name;
  const std::string with_first = begin + " " + std::string(first);
  KV_ASSIGN_OR_RETURN(const std::vector<int32_t> name_tokens, tokenizer.Encode(begin, false));
  KV_ASSIGN_OR_RETURN(const std::vector<int32_t> first_tokens, tokenizer.Encode(with_first, false));
  KV_ASSIGN_OR_RETURN(fact.tokens,
                      tokenizer.Encode(with_first + " " + std::string(second) + " <end>", false));
  KV_ASSIGN_OR_RETURN(fact.question.tokens, tokenizer.Encode("<ask> " + name, false));
  const bool nested = name_tokens.size() < first_tokens.size() &&
                      first_tokens.size() < fact.tokens.size() &&
                      std::equal(first_tokens.begin(), first_tokens.end(), fact.tokens.begin()) &&
                      std::equal(name_tokens.begin(), name_tokens.end(), first_tokens.begin());
  if (!nested) return InvalidArgument("the tokenizer joins the words of '" + with_first + "'");
  fact.question.name = name;
  fact.question.answer.assign(first_tokens.begin() + static_cast<ptrdiff_t>(name_tokens.size()),
                              first_tokens.end());
  return fact;
}

// `alike`: those with one adjective, or with one noun.
std::vector<std::string> AllNames(bool alike, Random* random) {
  const bool by_adjective = alike && random->Below(2) == 0;
  const size_t half = alike ? random->Below(kNouns.size()) : 0;
  std::vector<std::string> names;
  for (size_t a = 0; a < kAdjectives.size(); ++a) {
    for (size_t n = 0; n < kNouns.size(); ++n) {
      if (alike && (by_adjective ? a : n) != half) continue;
      names.push_back(std::string(kAdjectives[a]) + std::string(kNouns[n]));
    }
  }
  return names;
}

Result<std::vector<Fact>> MakeFacts(const Tokenizer& tokenizer, uint32_t count, bool alike,
                                    Random* random) {
  std::vector<std::string> names = AllNames(alike, random);
  if (count == 0 || count > names.size()) {
    return InvalidArgument("--facts " + std::to_string(count) + ": expected 1 to " +
                           std::to_string(names.size()));
  }
  random->Shuffle(&names);
  std::vector<Fact> facts;
  for (uint32_t i = 0; i < count; ++i) {
    const std::string_view first = kCities[random->Below(kCities.size())];
    const std::string_view second = kCities[random->Below(kCities.size())];
    KV_ASSIGN_OR_RETURN(Fact fact, MakeFact(tokenizer, names[i], first, second));
    facts.push_back(std::move(fact));
  }
  return facts;
}

}  // namespace

Result<RecallDocument> MakeRecallDocument(const Tokenizer& tokenizer,
                                          const RecallDocumentOptions& options) {
  for (const char* token : {"<bos>", "<fact>", "<ask>", "<end>"}) {
    if (tokenizer.TokenId(token)) continue;
    return InvalidArgument(std::string("the tokenizer has no '") + token +
                           "': this model was not trained for recall; use tests/models/recall");
  }
  Random random(options.seed);
  KV_ASSIGN_OR_RETURN(const std::vector<int32_t> corpus, ReadCorpus(tokenizer, options));
  KV_ASSIGN_OR_RETURN(std::vector<Fact> facts,
                      MakeFacts(tokenizer, options.facts, options.alike, &random));
  size_t fact_tokens = 1;  // <bos>
  for (const Fact& fact : facts) fact_tokens += fact.tokens.size();
  if (fact_tokens > options.tokens) {
    return InvalidArgument("--tokens " + std::to_string(options.tokens) + ": " +
                           std::to_string(options.facts) + " facts take " +
                           std::to_string(fact_tokens) + "; give more tokens or fewer --facts");
  }
  const size_t body = options.tokens - fact_tokens;
  std::vector<size_t> cuts(facts.size());
  for (size_t& cut : cuts) cut = random.Below(body + 1);
  std::sort(cuts.begin(), cuts.end());

  RecallDocument document;
  document.tokens.push_back(*tokenizer.TokenId("<bos>"));
  size_t from = random.Below(corpus.size());
  size_t taken = 0;
  const auto take_until = [&](size_t end) {
    for (; taken < end; ++taken) document.tokens.push_back(corpus[from++ % corpus.size()]);
  };
  for (size_t i = 0; i < facts.size(); ++i) {
    take_until(cuts[i]);
    facts[i].question.fact_position = static_cast<uint32_t>(document.tokens.size());
    document.tokens.insert(document.tokens.end(), facts[i].tokens.begin(), facts[i].tokens.end());
    document.questions.push_back(std::move(facts[i].question));
  }
  take_until(body);
  KV_CHECK(document.tokens.size() == options.tokens);
  random.Shuffle(&document.questions);
  return document;
}

}  // namespace icecache
