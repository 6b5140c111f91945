// Tokenizers of every kind against ids that the tokenizers library gave
// (tests/models/tokenizer_cases.json), against a quadratic BPE written here, and against
// hand-worked splits.
#include "worker/model/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>

#include "worker/model/pretokenizer.h"
#include "worker/model/utf8.h"

namespace icecache {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Json = nlohmann::json;

std::string SourceFile(const std::string& path) {
  const char* root = std::getenv("ICECACHE_SOURCE_DIR");
  return (root == nullptr ? std::string(".") : std::string(root)) + "/" + path;
}

// name -> {"tokenizer": a whole tokenizer.json, "cases": [...]}
const Json& Fixture() {
  static const Json fixture = [] {
    std::ifstream file(SourceFile("tests/models/tokenizer_cases.json"));
    Json json = Json::parse(file);
    for (auto& [name, entry] : json["tokenizers"].items()) {
      Json& model = entry["tokenizer"]["model"];
      if (!model["vocab"].is_string()) continue;
      const Json& shared = json["shared"][model["vocab"].get<std::string>()];
      model["vocab"] = shared["vocab"];
      model["merges"] = shared["merges"];
    }
    return json["tokenizers"];
  }();
  return fixture;
}

std::unique_ptr<Tokenizer> Make(const Json& json) {
  auto tokenizer = Tokenizer::Parse(json.dump(), "test.json");
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status().ToString();
  return tokenizer.ok() ? std::move(tokenizer).value() : nullptr;
}

std::vector<int32_t> Ids(const Tokenizer& tokenizer, const std::string& text, bool add_special) {
  auto ids = tokenizer.Encode(text, add_special);
  EXPECT_TRUE(ids.ok()) << ids.status().ToString();
  return ids.ok() ? std::move(ids).value() : std::vector<int32_t>();
}

TEST(Tokenizer, GivesTheIdsOfTheTokenizersLibrary) {
  ASSERT_GE(Fixture().size(), 16u);
  for (const auto& [name, entry] : Fixture().items()) {
    const auto tokenizer = Make(entry["tokenizer"]);
    ASSERT_NE(tokenizer, nullptr) << name;
    for (const Json& c : entry["cases"]) {
      SCOPED_TRACE(name + ": " + c["text"].dump());
      const auto text = c["text"].get<std::string>();
      auto expected = c["ids"].get<std::vector<int32_t>>();
      EXPECT_EQ(Ids(*tokenizer, text, false), expected);
      const auto prefix = c["first"].get<std::vector<int32_t>>();
      expected.insert(expected.begin(), prefix.begin(), prefix.end());
      EXPECT_EQ(Ids(*tokenizer, text, true), expected);
    }
  }
}

TEST(Tokenizer, DecodesAsTheTokenizersLibrary) {
  for (const auto& [name, entry] : Fixture().items()) {
    const auto tokenizer = Make(entry["tokenizer"]);
    ASSERT_NE(tokenizer, nullptr) << name;
    for (const Json& c : entry["cases"]) {
      SCOPED_TRACE(name + ": " + c["text"].dump());
      const auto ids = c["ids"].get<std::vector<int32_t>>();
      EXPECT_EQ(tokenizer->Decode(ids, false), c["kept"].get<std::string>());
      EXPECT_EQ(tokenizer->Decode(ids, true), c["skipped"].get<std::string>());
    }
  }
}

std::string RandomText(std::mt19937_64& random) {
  static const char32_t kRanges[][2] = {{0x20, 0x7E},       {0x09, 0x0D},   {0xA0, 0x17F},
                                        {0x400, 0x44F},     {0x300, 0x340}, {0x4E00, 0x4E40},
                                        {0x1F600, 0x1F640}, {0x0, 0x10FFFF}};
  std::string text;
  for (uint64_t count = random() % 60; count > 0; --count) {
    const auto& range = kRanges[random() % 8];
    char32_t code = range[0] + static_cast<char32_t>(random() % (range[1] - range[0] + 1));
    if (code >= 0xD800 && code <= 0xDFFF) code = 0x2028;
    AppendUtf8(code, text);
  }
  return text;
}

TEST(Tokenizer, ByteLevelRoundTripsAnyText) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  for (const char* name : {"llama3", "digits", "splitContiguous"}) {
    const auto tokenizer = Make(Fixture()[name]["tokenizer"]);
    for (int round = 0; round < 300; ++round) {
      const std::string text = RandomText(random);
      EXPECT_EQ(tokenizer->Decode(Ids(*tokenizer, text, true), true), text) << name;
    }
  }
}

TEST(Tokenizer, AnyBytesEncodeAndComeBackAsPythonReplacesThem) {
  const auto tokenizer = Make(Fixture()["llama3"]["tokenizer"]);
  const std::string bytes =
      "a\xff"
      "b\xe4\xbd"
      "c\xf0\x9f\x99\x82\xed\xa0\x80";
  const std::string replaced =
      "a\ufffd"
      "b\ufffd"
      "c\U0001F642\ufffd\ufffd\ufffd";
  EXPECT_EQ(tokenizer->Decode(Ids(*tokenizer, bytes, false), false), replaced);
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  for (int round = 0; round < 300; ++round) {
    std::string noise(random() % 40, ' ');
    for (char& c : noise) c = static_cast<char>(random());
    EXPECT_EQ(tokenizer->Decode(Ids(*tokenizer, noise, false), false), ReplaceBadUtf8(noise));
  }
}

bool IsWholeUtf8(const std::string& text) { return ReplaceBadUtf8(text) == text; }

TEST(StreamDecoder, PiecesAreWholeCharactersAndJoinToTheDecodedText) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  for (const auto& [name, entry] : Fixture().items()) {
    const auto tokenizer = Make(entry["tokenizer"]);
    StreamDecoder stream(*tokenizer, false);
    for (int round = 0; round < 60; ++round) {
      std::vector<int32_t> ids = Ids(*tokenizer, RandomText(random), false);
      if (round % 3 == 0) {  // any ids, so that bytes join to nonsense too
        for (int32_t& id : ids) id = static_cast<int32_t>(random() % tokenizer->vocab_size());
      }
      std::string joined;
      for (const int32_t id : ids) {
        const std::string piece = stream.Push(id);
        EXPECT_TRUE(IsWholeUtf8(piece));
        joined += piece;
      }
      joined += stream.Finish();
      EXPECT_EQ(joined, tokenizer->Decode(ids, false)) << name;
    }
  }
}

TEST(StreamDecoder, HoldsACharacterBackUntilItsLastByte) {
  Json json = Fixture()["llama2"]["tokenizer"];
  const auto tokenizer = Make(json);
  StreamDecoder stream(*tokenizer);
  const auto byte = [&](const char* text) { return *tokenizer->TokenId(text); };
  EXPECT_EQ(stream.Push(*tokenizer->TokenId("▁")), "");  // the space in front is stripped
  EXPECT_EQ(stream.Push(byte("<0xF0>")), "");
  EXPECT_EQ(stream.Push(byte("<0x9F>")), "");
  EXPECT_EQ(stream.Push(byte("<0x99>")), "");
  EXPECT_EQ(stream.Push(byte("<0x82>")), "🙂");
  EXPECT_EQ(stream.Push(byte("<0xC3>")), "");
  EXPECT_EQ(stream.Push(*tokenizer->TokenId("a")),
            "\ufffd"
            "a");  // the rest never came
  EXPECT_EQ(stream.Push(byte("<0xE4>")), "");
  EXPECT_EQ(stream.Finish(), "\ufffd");
  EXPECT_EQ(stream.Push(*tokenizer->TokenId("▁")), "");  // as new
}

// ---- BPE against its definition

Json ByteLevelModel(const std::vector<std::pair<std::string, std::string>>& merges,
                    const std::string& alphabet) {
  Json vocab = Json::object();
  for (const char c : alphabet) vocab[std::string(1, c)] = vocab.size();
  Json list = Json::array();
  for (const auto& [left, right] : merges) {
    if (!vocab.contains(left + right)) vocab[left + right] = vocab.size();
    list.push_back({left, right});
  }
  return {{"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", list}}}};
}

std::vector<std::string> Texts(const Tokenizer& tokenizer, const std::string& text) {
  std::vector<std::string> texts;
  for (const int32_t id : Ids(tokenizer, text, false)) texts.emplace_back(tokenizer.TokenText(id));
  return texts;
}

TEST(Bpe, LowestRankFirstThenLeftmost) {
  const auto ranks = Make(ByteLevelModel({{"b", "c"}, {"a", "b"}}, "abc"));
  EXPECT_THAT(Texts(*ranks, "abc"), ElementsAre("a", "bc"));
  EXPECT_THAT(Texts(*ranks, "abab"), ElementsAre("ab", "ab"));
  const auto runs = Make(ByteLevelModel({{"a", "a"}, {"aa", "aa"}}, "a"));
  EXPECT_THAT(Texts(*runs, "aaa"), ElementsAre("aa", "a"));
  EXPECT_THAT(Texts(*runs, "aaaaaaa"), ElementsAre("aaaa", "aa", "a"));
}

TEST(Bpe, EqualsTheQuadraticDefinition) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  for (int round = 0; round < 60; ++round) {
    std::vector<std::string> entries = {"a", "b", "c"};
    std::vector<std::pair<std::string, std::string>> merges;
    std::map<std::pair<std::string, std::string>, size_t> ranks;
    while (merges.size() < 12) {
      const std::pair pair(entries[random() % entries.size()], entries[random() % entries.size()]);
      if (!ranks.emplace(pair, merges.size()).second) continue;
      merges.push_back(pair);
      entries.push_back(pair.first + pair.second);
    }
    const auto tokenizer = Make(ByteLevelModel(merges, "abc"));
    for (int word = 0; word < 40; ++word) {
      std::string text(random() % 40, 'a');
      for (char& c : text) c = static_cast<char>('a' + random() % 3);
      std::vector<std::string> symbols;
      for (const char c : text) symbols.emplace_back(1, c);
      while (true) {
        size_t best = SIZE_MAX, at = 0;
        for (size_t i = 0; i + 1 < symbols.size(); ++i) {
          const auto it = ranks.find({symbols[i], symbols[i + 1]});
          if (it != ranks.end() && it->second < best) best = it->second, at = i;
        }
        if (best == SIZE_MAX) break;
        symbols[at] += symbols[at + 1];
        symbols.erase(symbols.begin() + static_cast<ptrdiff_t>(at) + 1);
      }
      ASSERT_EQ(Texts(*tokenizer, text), symbols) << text;
    }
  }
}

// ---- Splits, worked out by hand from the patterns

constexpr char kLlama3[] =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr char kQwen2[] =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

std::vector<std::string> Split(const char* regex, const std::string& text) {
  const Json json = {{"type", "Split"},
                     {"pattern", {{"Regex", regex}}},
                     {"behavior", "Isolated"},
                     {"invert", false}};
  auto pre_tokenizer = PreTokenizer::Parse(json.dump(), "test");
  EXPECT_TRUE(pre_tokenizer.ok()) << pre_tokenizer.status().ToString();
  std::vector<std::string> pieces;
  EXPECT_TRUE(pre_tokenizer->Run(text, true, pieces).ok());
  return pieces;
}

TEST(PreTokenizer, Llama3Pattern) {
  EXPECT_THAT(
      Split(kLlama3, "I'LL pay 12345 €, ok?\n\n  done"),
      ElementsAre("I", "'LL", " pay", " ", "123", "45", " €,", " ok", "?\n\n", " ", " done"));
  EXPECT_THAT(Split(kLlama3, "'tis O'Reilly's"),
              ElementsAre("'t", "is", " O", "'Re", "illy", "'s"));
  EXPECT_THAT(Split(kLlama3, "你好世界abc，🙂"), ElementsAre("你好世界abc", "，🙂"));
  EXPECT_THAT(Split(kLlama3, "\t\tx_y  \n z  "),
              ElementsAre("\t", "\tx", "_y", "  \n", " z", "  "));
  EXPECT_THAT(Split(kLlama3, "x²٣٤٥٦"), ElementsAre("x", "²٣٤", "٥٦"));
}

TEST(PreTokenizer, Qwen2PatternTakesDigitsOneByOne) {
  EXPECT_THAT(Split(kQwen2, "in 2024: 3.14"),
              ElementsAre("in", " ", "2", "0", "2", "4", ":", " ", "3", ".", "1", "4"));
}

TEST(PreTokenizer, ByteAlphabetIsOneToOne) {
  for (int byte = 0; byte < 256; ++byte)
    EXPECT_EQ(SymbolToByte(ByteToSymbol(static_cast<uint8_t>(byte))), byte);
  EXPECT_EQ(ByteToSymbol(' '), U'Ġ');
  EXPECT_EQ(ByteToSymbol('\n'), U'Ċ');
  EXPECT_EQ(ByteToSymbol(0xAD), U'Ń');
  EXPECT_EQ(SymbolToByte(U' '), -1);
}

TEST(PreTokenizer, LongRunsNeitherFailNorTakeQuadraticTime) {
  std::string text;
  for (int i = 0; i < 50; ++i)
    text += std::string(4000, ' ') + "x" + std::string(4000, '\n') + std::string(4000, '!');
  std::string joined;
  for (const std::string& piece : Split(kLlama3, text)) joined += piece;
  EXPECT_EQ(joined, text);
}

// ---- What is refused

Status ParseError(const Json& json) {
  auto tokenizer = Tokenizer::Parse(json.dump(), "dir/tokenizer.json");
  return tokenizer.ok() ? OkStatus() : tokenizer.status();
}

TEST(TokenizerParse, UnknownComponentsAreNamedWithTheirPlace) {
  const Json good = ByteLevelModel({{"a", "b"}}, "ab");
  EXPECT_TRUE(ParseError(good).ok());
  const std::pair<const char*, Json> bad[] = {
      {"normalizer", {{"type", "NFKC"}}},
      {"pre_tokenizer", {{"type", "BertPreTokenizer"}}},
      {"decoder", {{"type", "WordPiece"}}},
      {"post_processor", {{"type", "BertProcessing"}}},
      {"model", {{"type", "Unigram"}, {"vocab", Json::array()}}}};
  for (const auto& [key, value] : bad) {
    Json json = good;
    json[key] = value;
    const Status status = ParseError(json);
    EXPECT_EQ(status.code(), StatusCode::kUnimplemented) << key;
    EXPECT_THAT(status.message(), HasSubstr("dir/tokenizer.json: " + std::string(key)));
    EXPECT_THAT(status.message(), HasSubstr(value["type"].get<std::string>()));
  }
}

TEST(TokenizerParse, DamageIsNamed) {
  const Json good = ByteLevelModel({{"a", "b"}}, "ab");
  EXPECT_THAT(Tokenizer::Parse("{", "x").status().message(), HasSubstr("x: not a JSON object"));
  Json json = good;
  json["model"]["vocab"]["a"] = -1;
  EXPECT_THAT(ParseError(json).message(), HasSubstr("id of 'a' is -1"));
  json = good;
  json["model"]["merges"].push_back("a z");
  EXPECT_THAT(ParseError(json).message(), HasSubstr("merge 1 (\"a z\")"));
  json = good;
  json["model"]["merges"].push_back("abc");
  EXPECT_THAT(ParseError(json).message(), HasSubstr("expected two parts"));
  json = good;
  json["model"]["unk_token"] = "<unk>";
  EXPECT_THAT(ParseError(json).message(), HasSubstr("'<unk>' is not in the vocabulary"));
  json = good;
  json["model"]["byte_fallback"] = true;
  EXPECT_THAT(ParseError(json).message(), HasSubstr("byte_fallback without the entry <0x00>"));
  json = good;
  json["added_tokens"] = {{{"id", 5}, {"content", "ab"}}};
  EXPECT_THAT(ParseError(json).message(),
              HasSubstr("added token 'ab' has id 5, the vocabulary says 2"));
  json = good;
  json["pre_tokenizer"] = {
      {"type", "Split"}, {"pattern", {{"Regex", "(a"}}}, {"behavior", "Isolated"}};
  EXPECT_THAT(ParseError(json).message(), HasSubstr("pattern '(a' at byte 2"));
  json["pre_tokenizer"] = {
      {"type", "Split"}, {"pattern", {{"Regex", "a"}}}, {"behavior", "Sideways"}};
  EXPECT_THAT(ParseError(json).message(), HasSubstr("'Sideways'"));
}

TEST(Tokenizer, UnknownWordWithoutATokenForItIsAnError) {
  const Json json = {{"model", {{"type", "WordLevel"}, {"vocab", {{"a", 0}}}}}};
  const auto ids = Make(json)->Encode("b", false);
  EXPECT_EQ(ids.status().code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(ids.status().message(), HasSubstr("word 'b'"));
}

TEST(Tokenizer, KnowsItsTokens) {
  const auto tokenizer = Make(Fixture()["llama3"]["tokenizer"]);
  const auto id = tokenizer->TokenId("<|eot_id|>");
  ASSERT_TRUE(id.has_value());
  EXPECT_TRUE(tokenizer->IsSpecial(*id));
  EXPECT_FALSE(tokenizer->IsSpecial(5));
  EXPECT_EQ(tokenizer->TokenText(*id), "<|eot_id|>");
  EXPECT_EQ(tokenizer->TokenText(-1), "");
  EXPECT_EQ(tokenizer->TokenText(1 << 30), "");
  EXPECT_EQ(tokenizer->TokenId("no such token"), std::nullopt);
  EXPECT_EQ(tokenizer->vocab_size(), static_cast<uint32_t>(*id) + 2);
  EXPECT_EQ(tokenizer->Decode(std::vector<int32_t>{*id, -7, 1 << 30}, true), "");
}

}  // namespace
}  // namespace icecache
