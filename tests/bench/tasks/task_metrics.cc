#include "tests/bench/tasks/task_metrics.h"

#include <algorithm>
#include <cctype>
#include <map>

#include "common/status.h"

namespace icecache {
namespace {

std::string Lower(std::string_view text) {
  std::string lower(text);
  for (char& c : lower) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return lower;
}

std::vector<std::string> Words(std::string_view text) {
  std::vector<std::string> words;
  std::string word;
  for (const char c : text) {
    if (!std::isspace(static_cast<unsigned char>(c))) {
      word += c;
    } else if (!word.empty()) {
      words.push_back(std::move(word));
      word.clear();
    }
  }
  if (!word.empty()) words.push_back(std::move(word));
  return words;
}

// Length of the longest common subsequence; O(|a| |b|) time, O(|b|) memory.
template <typename Sequence>
size_t CommonLength(const Sequence& a, const Sequence& b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t i = 0; i < a.size(); ++i) {
    size_t diagonal = 0;
    for (size_t j = 0; j < b.size(); ++j) {
      const size_t above = row[j + 1];
      row[j + 1] = a[i] == b[j] ? diagonal + 1 : std::max(above, row[j]);
      diagonal = above;
    }
  }
  return row[b.size()];
}

double Harmonic(double precision, double recall) {
  return precision + recall > 0 ? 2 * precision * recall / (precision + recall) : 0;
}

std::vector<std::string> Numbers(std::string_view text) {
  std::vector<std::string> numbers;
  std::string digits;
  for (size_t i = 0; i <= text.size(); ++i) {
    if (i < text.size() && std::isdigit(static_cast<unsigned char>(text[i]))) {
      digits += text[i];
    } else if (!digits.empty()) {
      numbers.push_back(std::move(digits));
      digits.clear();
    }
  }
  return numbers;
}

double ShareOf(const std::vector<std::string>& numbers, const std::string& wanted) {
  if (numbers.empty()) return 0;
  return static_cast<double>(std::count(numbers.begin(), numbers.end(), wanted)) /
         static_cast<double>(numbers.size());
}

double One(Metric metric, std::string_view answer, const std::string& reference,
           const std::vector<std::string>& classes) {
  switch (metric) {
    case Metric::kAll:
    case Metric::kAny:
      return Lower(answer).find(Lower(reference)) != std::string::npos ? 1 : 0;
    case Metric::kF1:
      return WordF1(answer, reference);
    case Metric::kRougeL:
      return RougeL(answer, reference);
    case Metric::kClass:
      return ClassScore(answer, reference, classes);
    case Metric::kCount:
      return CountScore(answer, reference);
    case Metric::kRetrieval:
      return RetrievalScore(answer, reference);
    case Metric::kCode:
      return EditSimilarity(FirstCodeLine(answer), reference);
    case Metric::kTokens:
    case Metric::kAgreement:
      break;
  }
  KV_CHECK(false && "not a metric of text");
  return 0;
}

}  // namespace

std::string NormalizeAnswer(std::string_view text) {
  std::string plain;
  for (const char c : Lower(text)) {
    if (!std::ispunct(static_cast<unsigned char>(c))) plain += c;
  }
  std::string normal;
  for (const std::string& word : Words(plain)) {
    if (word == "a" || word == "an" || word == "the") continue;
    if (!normal.empty()) normal += ' ';
    normal += word;
  }
  return normal;
}

double WordF1(std::string_view answer, std::string_view reference) {
  const std::vector<std::string> said = Words(NormalizeAnswer(answer));
  const std::vector<std::string> right = Words(NormalizeAnswer(reference));
  std::map<std::string, int> left;
  for (const std::string& word : right) ++left[word];
  size_t common = 0;
  for (const std::string& word : said) common += left[word]-- > 0;
  if (common == 0) return 0;
  return Harmonic(static_cast<double>(common) / static_cast<double>(said.size()),
                  static_cast<double>(common) / static_cast<double>(right.size()));
}

double RougeL(std::string_view answer, std::string_view reference) {
  const std::vector<std::string> said = Words(Lower(answer)), right = Words(Lower(reference));
  if (said.empty() || right.empty()) return 0;
  const auto common = static_cast<double>(CommonLength(said, right));
  return Harmonic(common / static_cast<double>(said.size()),
                  common / static_cast<double>(right.size()));
}

double EditSimilarity(std::string_view a, std::string_view b) {
  if (a.empty() && b.empty()) return 1;
  return 2.0 * static_cast<double>(CommonLength(a, b)) / static_cast<double>(a.size() + b.size());
}

std::string_view FirstCodeLine(std::string_view text) {
  while (!text.empty() && text.front() == '\n') text.remove_prefix(1);
  while (!text.empty()) {
    const std::string_view line = text.substr(0, text.find('\n'));
    if (line.find('`') == std::string_view::npos && line.find('#') == std::string_view::npos &&
        line.find("//") == std::string_view::npos) {
      return line;
    }
    text.remove_prefix(std::min(text.size(), line.size() + 1));
  }
  return {};
}

double ClassScore(std::string_view answer, std::string_view reference,
                  const std::vector<std::string>& classes) {
  size_t named = 0;
  bool right = false;
  for (const std::string& label : classes) {
    if (answer.find(label) == std::string_view::npos) continue;
    // A label that is part of the right one is no answer of its own.
    if (label != reference && reference.find(label) != std::string_view::npos) continue;
    ++named;
    right |= label == reference;
  }
  return right ? 1.0 / static_cast<double>(named) : 0;
}

double CountScore(std::string_view answer, std::string_view reference) {
  return ShareOf(Numbers(answer), std::string(reference));
}

double RetrievalScore(std::string_view answer, std::string_view reference) {
  const std::vector<std::string> wanted = Numbers(reference);
  return wanted.empty() ? 0 : ShareOf(Numbers(answer), wanted.front());
}

double Score(Metric metric, std::string_view answer, const std::vector<std::string>& references,
             const std::vector<std::string>& classes) {
  if (references.empty()) return 0;
  double best = 0, sum = 0;
  for (const std::string& reference : references) {
    const double score = One(metric, answer, reference, classes);
    best = std::max(best, score);
    sum += score;
  }
  return metric == Metric::kAll ? sum / static_cast<double>(references.size()) : best;
}

}  // namespace icecache
