#!/usr/bin/env bash
# Everything a change must pass: packages, build and tests, from a fresh clone. Needs no terminal.
#
#   tests/run.sh [--all] [--preset NAME]... [--jobs N] [-- CTEST OPTIONS]
#
#   (nothing)         release build; unit, conformance, integration and fuzz tests
#   --all             release, then AddressSanitizer and ThreadSanitizer builds, then the nightly tests (labelled long)
#   --preset NAME     these presets instead; ICECACHE_TEST_PRESETS="asan tsan" does the same
#   --jobs N          compile and test N at a time
#   -- OPTIONS        go to ctest, for example: -- -R cluster_tree
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"

read -r -a presets <<<"${ICECACHE_TEST_PRESETS:-}"
jobs="" nightly=0 ctest_options=()
while [ $# -gt 0 ]; do
  case "$1" in
    --all) presets=(release asan tsan); nightly=1; shift ;;
    --preset) presets+=("${2:?--preset needs a name}"); shift 2 ;;
    --jobs) jobs="${2:?--jobs needs a number}"; shift 2 ;;
    --) shift; ctest_options=("$@"); break ;;
    -h|--help) sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) printf "run.sh: unknown option '%s'; see tests/run.sh --help\n" "$1" >&2; exit 2 ;;
  esac
done
[ ${#presets[@]} -gt 0 ] || presets=(release)

# Before each stage: what it is, and how long all before it took.
stage() { printf '== %02d:%02d %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"; }

# ThreadSanitizer needs addresses where it expects them; kernels with much randomisation put them elsewhere.
fixed_addresses=()
if setarch "$(uname -m)" -R true 2>/dev/null; then fixed_addresses=(setarch "$(uname -m)" -R); fi

failed=()
for preset in "${presets[@]}"; do
  stage "build $preset"
  bash deploy/bootstrap.sh --preset "$preset" ${jobs:+--jobs "$jobs"}
  # Each fuzz target runs 15 s where the build has left the time for it: all of this is to take 25 minutes at the most.
  fuzz_seconds=15
  [ "$SECONDS" -lt 600 ] || fuzz_seconds=4
  cmake -DICECACHE_FUZZ_SECONDS="$fuzz_seconds" "build/$preset" >/dev/null
  stage "test $preset, $fuzz_seconds s for each fuzz target"
  runner=()
  [ "$preset" != tsan ] || runner=("${fixed_addresses[@]}")
  "${runner[@]}" ctest --preset "$preset" --parallel "${jobs:-$(nproc)}" --no-tests=error \
    "${ctest_options[@]}" </dev/null || failed+=("$preset")
done
if [ "$nightly" = 1 ]; then
  stage "test nightly"
  ctest --preset nightly --no-tests=error </dev/null || failed+=(nightly)
fi
if [ ${#failed[@]} -gt 0 ]; then
  stage "failed: ${failed[*]}" >&2
  exit 1
fi
