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
#
# With nothing, all of it is to take 25 minutes at the most on two cores. Fuzz targets come last and share what the build and
# the other tests have left, 2 to 15 s each; elsewhere nobody waits and they have 15 s.
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
    -h|--help) sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) printf "run.sh: unknown option '%s'; see tests/run.sh --help\n" "$1" >&2; exit 2 ;;
  esac
done
[ ${#presets[@]} -gt 0 ] || presets=(release)

# Before each stage: what it is, and how long all before it took.
stage() { printf '== %02d:%02d %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"; }

# ThreadSanitizer needs addresses where it expects them; kernels with much randomisation put them elsewhere.
fixed_addresses=()
if setarch "$(uname -m)" -R true 2>/dev/null; then fixed_addresses=(setarch "$(uname -m)" -R); fi

# How long each of $2 fuzz targets runs, $1 of them at a time. 30 s are for what starts and ends beside them: with two
# jobs 51 targets take 51 s at the least and 383 s at the most.
seconds_max=1500
fuzz_seconds() {
  local each=15
  if [ "$preset" = release ] && [ "$nightly" = 0 ]; then
    each=$(((seconds_max - 30 - SECONDS) * $1 / $2))
    [ "$each" -le 15 ] || each=15
    [ "$each" -ge 2 ] || each=2
  fi
  printf '%d' "$each"
}

failed=()
for preset in "${presets[@]}"; do
  stage "build $preset"
  bash deploy/bootstrap.sh --preset "$preset" ${jobs:+--jobs "$jobs"}
  at_once="${jobs:-$(nproc)}" ok=1
  runner=(ctest --preset "$preset" --parallel "$at_once" --no-tests=error)
  [ "$preset" != tsan ] || runner=("${fixed_addresses[@]}" "${runner[@]}")
  if [ ${#ctest_options[@]} -gt 0 ]; then
    stage "test $preset: ${ctest_options[*]}"
    "${runner[@]}" "${ctest_options[@]}" </dev/null || ok=0
  else
    fuzz='^fuzz_.*[.]'  # PROGRAM.TARGET
    stage "test $preset"
    "${runner[@]}" -E "$fuzz" </dev/null || ok=0
    targets="$(ctest --preset "$preset" -N -R "$fuzz" | grep -c '^ *Test *#')"
    each="$(fuzz_seconds "$at_once" "$targets")"
    cmake -DICECACHE_FUZZ_SECONDS="$each" "build/$preset" >/dev/null
    stage "test $preset: $targets fuzz targets, $each s each"
    "${runner[@]}" -R "$fuzz" </dev/null || ok=0
  fi
  [ "$ok" = 1 ] || failed+=("$preset")
done
if [ "$nightly" = 1 ]; then
  stage "test nightly"
  ctest --preset nightly --no-tests=error </dev/null || failed+=(nightly)
fi
if [ ${#failed[@]} -gt 0 ]; then
  stage "failed: ${failed[*]}" >&2
  exit 1
fi
