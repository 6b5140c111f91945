// How answers are scored: the metrics that the benchmarks publish, 0 to 1, over UTF-8 bytes.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace icecache {

enum class Metric {
  kTokens,     // exactly the expected tokens
  kAll,        // share of the references that stand in the answer (RULER: string match, all)
  kAny,        // any reference stands in the answer (RULER: string match, part)
  kF1,         // best word F1 over references, articles and punctuation aside (SQuAD, LongBench QA)
  kRougeL,     // best ROUGE-L F over references (LongBench summaries)
  kClass,      // share among the labels named, when the right one is named (LongBench TREC)
  kCount,      // share of the numbers in the answer that are the reference (LongBench PCount)
  kRetrieval,  // the same with the reference's paragraph number (LongBench PRe)
  kCode,       // edit similarity of the first line of code (LongBench LCC, RepoBench-P)
  kAgreement,  // the same token as full attention gives (set by the runner)
};

// Lower case, no punctuation, no articles, single spaces.
std::string NormalizeAnswer(std::string_view text);
double WordF1(std::string_view answer, std::string_view reference);
// F measure of the longest common subsequence of words, recall and precision alike.
double RougeL(std::string_view answer, std::string_view reference);
// 2 * longest common subsequence of bytes / sum of lengths.
double EditSimilarity(std::string_view a, std::string_view b);
// The first line that is no comment and no code fence.
std::string_view FirstCodeLine(std::string_view text);
double ClassScore(std::string_view answer, std::string_view reference,
                  const std::vector<std::string>& classes);
double CountScore(std::string_view answer, std::string_view reference);
double RetrievalScore(std::string_view answer, std::string_view reference);

// Best over references, where the metric works on text. REQUIRES: not kTokens, not kAgreement.
double Score(Metric metric, std::string_view answer, const std::vector<std::string>& references,
             const std::vector<std::string>& classes);

}  // namespace icecache
