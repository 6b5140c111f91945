#include "worker/serve/summary.h"

#include <cstdarg>
#include <cstdio>

#include "common/size.h"

namespace icecache {
namespace {

[[gnu::format(printf, 2, 3)]] void Add(std::string* text, const char* format, ...) {
  char line[512];
  va_list args;
  va_start(args, format);
  std::vsnprintf(line, sizeof(line), format, args);
  va_end(args);
  *text += line;
}

}  // namespace

std::string FormatSummary(const GenerateSummary& s) {
  std::string text = "\n";
  const double seconds = std::chrono::duration<double>(s.prepare).count();
  if (s.prefill_tokens > 0) {
    Add(&text, "prefill    %llu tokens in %.1f s (%.0f tokens/s)\n",
        static_cast<unsigned long long>(s.prefill_tokens), seconds,
        static_cast<double>(s.prefill_tokens) / seconds);
  } else if (s.matched_tokens > 0) {
    Add(&text, "match      %llu tokens of the prompt were there, after %.1f ms\n",
        static_cast<unsigned long long>(s.matched_tokens), 1000 * seconds);
  } else {
    Add(&text, "fork       ready after %.1f ms, nothing prefilled\n", 1000 * seconds);
  }
  const DecodeStats& d = s.decode;
  if (d.tokens == 0) return text;
  const AttentionStats& a = d.attention;
  Add(&text,
      "decode     %llu tokens, %.2f ms/token: model %.2f, select %.2f, transfer %.2f, "
      "attention %.2f\n",
      static_cast<unsigned long long>(d.tokens), d.ms_per_token(d.total), d.ms_per_token(d.model()),
      d.ms_per_token(a.select_wait), d.ms_per_token(a.transfer), d.ms_per_token(a.attention));
  Add(&text, "attended   %.1f tokens per head (%s, budget %u)\n", a.tokens_per_head(),
      s.method.c_str(), s.budget);
  if (a.bytes_moved > 0) {
    Add(&text, "moved      %s per token, %.1f %% of selected pages were here already\n",
        FormatSize(static_cast<uint64_t>(d.bytes_per_token())).c_str(), 100 * a.hit_rate());
  }
  if (a.mapped_pages > 0 || a.pushed_pages > 0 || a.remote_pages > 0) {
    Add(&text,
        "pages      %llu sent, %llu read in the server's memory, %llu pushed by it, %llu attended "
        "to by the server\n",
        static_cast<unsigned long long>(a.page_misses - a.mapped_pages - a.pushed_pages -
                                        a.worker_pages),
        static_cast<unsigned long long>(a.mapped_pages),
        static_cast<unsigned long long>(a.pushed_pages),
        static_cast<unsigned long long>(a.remote_pages));
  }
  const uint64_t fetched = a.worker_missed + a.worker_replaced + a.worker_damaged;
  if (a.worker_pages + fetched > 0) {
    Add(&text,
        "shared     %llu pages copied from other workers; %llu fetched instead: %llu gone before, "
        "%llu replaced while they were copied, %llu damaged\n",
        static_cast<unsigned long long>(a.worker_pages), static_cast<unsigned long long>(fetched),
        static_cast<unsigned long long>(a.worker_missed),
        static_cast<unsigned long long>(a.worker_replaced),
        static_cast<unsigned long long>(a.worker_damaged));
  }
  if (a.grown_steps > 0) {
    Add(&text, "grown      %llu layer steps took more than the budget to reach --min-mass\n",
        static_cast<unsigned long long>(a.grown_steps));
  }
  if (a.coded_pages > 0) {
    Add(&text, "int8       %llu pages came coded\n",
        static_cast<unsigned long long>(a.coded_pages));
  }
  if (a.asked_ahead > 0) {
    Add(&text, "prefetch   %.1f %% of heads were asked again, since their queries had moved\n",
        100 * static_cast<double>(a.asked_again) / static_cast<double>(a.asked_ahead));
  }
  Add(&text, "worker KV  %s; full KV would take %s\n", FormatSize(d.kv_bytes).c_str(),
      FormatSize(d.full_kv_bytes).c_str());
  if (a.degraded_steps > 0 || a.bad_pages > 0) {
    Add(&text,
        "caution    %llu layer steps without the whole answer, %llu pages failed verification\n",
        static_cast<unsigned long long>(a.degraded_steps),
        static_cast<unsigned long long>(a.bad_pages));
  }
  return text;
}

void PrintSummary(const GenerateSummary& summary) {
  std::fputs(FormatSummary(summary).c_str(), stderr);
}

}  // namespace icecache
