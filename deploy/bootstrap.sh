#!/usr/bin/env bash
# Makes a fresh clone ready on Debian 12: installs the packages that are missing, configures and builds.
#
#   deploy/bootstrap.sh [--preset release|dev|asan|tsan] [--packages-only | --no-build | --programs] [--jobs N] [-- CMAKE OPTIONS]
#
#   --preset NAME     a preset of CMakePresets.json; release by default. Programs end up in build/NAME/bin.
#   --packages-only   install packages, nothing else
#   --no-build        install packages and configure
#   --programs        build the programs without the tests: a third of the work
#   --jobs N          compile N files at a time; by default what cores and memory allow
#   -- OPTIONS        go to cmake, for example: -- -DICECACHE_CUDA=OFF
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"

say() { printf '%s\n' "$*"; }
fail() { printf 'bootstrap: %s\n' "$*" >&2; exit 1; }

preset=release packages_only=0 build=1 jobs="" targets=() cmake_options=()
while [ $# -gt 0 ]; do
  case "$1" in
    --preset) preset="${2:?--preset needs a name}"; shift 2 ;;
    --packages-only) packages_only=1; shift ;;
    --no-build) build=0; shift ;;
    --programs) targets=(--target icecache-server icecache-worker icecachectl); shift ;;
    --jobs) jobs="${2:?--jobs needs a number}"; shift 2 ;;
    --) shift; cmake_options=("$@"); break ;;
    -h|--help) sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) fail "unknown option '$1'; see deploy/bootstrap.sh --help" ;;
  esac
done
case "$jobs" in *[!0-9]*|0) fail "--jobs $jobs is not a number of jobs" ;; esac

# ---- packages ----

packages() { sed -e 's/#.*//' -e 's/[[:space:]]//g' -e '/^$/d' deploy/packages.txt; }

missing_packages() {
  local package
  for package in $(packages); do
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)" = installed ] || printf '%s ' "$package"
  done
}

# Runs a command quietly; on failure shows the end of what it said.
quietly() {
  local log
  log="$(mktemp)"
  if ! "$@" >"$log" 2>&1 </dev/null; then
    tail -n 40 "$log" >&2
    rm -f "$log"
    fail "'$*' failed; its last lines are above"
  fi
  rm -f "$log"
}

install_packages() {
  if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
    fail "this machine has no apt. The packages are named for Debian 12 (deploy/packages.txt); install their
           counterparts, then run: cmake --preset $preset && cmake --build --preset $preset"
  fi
  local os_id="" os_version=""
  os_id="$(. /etc/os-release && printf '%s' "${ID:-}")"
  os_version="$(. /etc/os-release && printf '%s' "${VERSION_ID:-}")"
  [ "$os_id $os_version" = "debian 12" ] ||
    say "Note: this is $os_id $os_version; the packages are known to fit together on debian 12."
  local missing
  missing="$(missing_packages)"
  missing="${missing% }"
  if [ -z "$missing" ]; then
    say "Packages: all installed."
    return
  fi
  if [ "$(id -u)" != 0 ]; then
    say "These packages are missing. Run this, then deploy/bootstrap.sh again:" >&2
    say >&2
    say "  sudo apt-get update && sudo apt-get install -y --no-install-recommends $missing" >&2
    exit 1
  fi
  say "Packages: installing $missing"
  export DEBIAN_FRONTEND=noninteractive
  quietly apt-get update
  # shellcheck disable=SC2086  # a list of words
  quietly apt-get install -y --no-install-recommends $missing
}

# ---- build ----

# One job per core, and 1.5 GB of memory for each: template-heavy files take that much.
default_jobs() {
  local cores by_memory
  cores="$(nproc)"
  by_memory="$(awk '/^MemAvailable:/ { print int($2 / 1500000) }' /proc/meminfo)"
  [ "$by_memory" -ge 1 ] || by_memory=1
  [ "$cores" -le "$by_memory" ] && printf '%s' "$cores" || printf '%s' "$by_memory"
}

# Runs the build with its output in a file, and shows how far it is: one line that is rewritten on a terminal,
# one line every 30 seconds elsewhere.
run_build() {
  local log="$1" builder="" last="" progress="" ticks=0
  shift
  "$@" >"$log" 2>&1 </dev/null &
  builder=$!
  trap 'kill "$builder" 2>/dev/null || true' EXIT
  trap 'exit 130' INT TERM
  while kill -0 "$builder" 2>/dev/null; do
    sleep 0.5
    ticks=$((ticks + 1))
    progress="$(grep -oE '^\[[0-9]+/[0-9]+\]' "$log" | tail -n 1 || true)"
    if [ -t 1 ]; then
      printf '\rBuilding %s ' "$progress"
    elif [ $((ticks % 60)) = 0 ] && [ "$progress" != "$last" ]; then
      say "Building $progress"
      last="$progress"
    fi
  done
  trap - EXIT INT TERM
  [ ! -t 1 ] || printf '\r\033[K'
  wait "$builder"
}

started=$SECONDS
install_packages
[ "$packages_only" = 0 ] || exit 0

quietly cmake --preset "$preset" "${cmake_options[@]}"
say "Configured: preset $preset."
[ "$build" = 1 ] || exit 0

log="build/$preset/build.log"
if ! run_build "$log" cmake --build --preset "$preset" --parallel "${jobs:-$(default_jobs)}" "${targets[@]}"; then
  grep -n -m 1 -A 60 '^FAILED:' "$log" >&2 || tail -n 60 "$log" >&2
  fail "the build failed; the first failure is above, everything is in $log"
fi
say "Built in $((SECONDS - started)) s: build/$preset/bin."
