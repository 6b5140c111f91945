#!/usr/bin/env bash
# One server and some workers on this machine, to look at: each worker forks one shared document and
# answers a question about it, again and again, until you press Ctrl-C.
#
#   deploy/local-cluster.sh [--workers N] [--memory SIZE] [--seconds N] [--bin DIR]
#
#   --workers N     workers at a time (2)
#   --memory SIZE   of the server (512MiB)
#   --seconds N     end by itself after so long (0: never)
#   --bin DIR       folder of the programs (build/release/bin)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
workers=2 memory=512MiB seconds=0 bin="$root/build/release/bin"
while [ $# -gt 0 ]; do
  case "$1" in
    --workers) workers="${2:?--workers needs a number}"; shift 2 ;;
    --memory) memory="${2:?--memory needs a size}"; shift 2 ;;
    --seconds) seconds="${2:?--seconds needs a number}"; shift 2 ;;
    --bin) bin="${2:?--bin needs a folder}"; shift 2 ;;
    -h|--help) sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) printf "local-cluster.sh: unknown option '%s'; see --help\n" "$1" >&2; exit 2 ;;
  esac
done
[ -x "$bin/icecache-server" ] || { echo "no programs in $bin: run deploy/bootstrap.sh, or give --bin" >&2; exit 2; }

dir="$(mktemp -d)"
pids=()
stop() {
  trap - EXIT INT TERM
  for pid in "${pids[@]:1}"; do kill "$pid" 2>/dev/null || true; done
  [ ${#pids[@]} -eq 0 ] || { kill -TERM "${pids[0]}" 2>/dev/null || true; wait "${pids[0]}" 2>/dev/null || true; }
  rm -rf "$dir"
}
trap stop EXIT
trap 'exit 0' INT TERM

"$bin/icecache-server" --port 0 --http-port 0 --memory-size "$memory" --port-file "$dir/ports.json" \
  >"$dir/server.log" 2>&1 &
pids+=($!)
for _ in $(seq 100); do
  [ -s "$dir/ports.json" ] && break
  kill -0 "${pids[0]}" 2>/dev/null || { cat "$dir/server.log" >&2; exit 1; }
  sleep 0.1
done
server="127.0.0.1:$(sed 's/.*"port": \([0-9]*\).*/\1/' "$dir/ports.json")"
http="127.0.0.1:$(sed 's/.*"http_port": \([0-9]*\).*/\1/' "$dir/ports.json")"
printf 'server %s, metrics http://%s/metrics, look: %s/icecachectl contexts --server %s\n' \
  "$server" "$http" "$bin" "$server"

{ printf '<bos> '; head -c 6000 "$root/LICENSE" | tr '\n' ' '; } >"$dir/document"
"$bin/icecache-worker" generate --model "$root/tests/models/recall" --server "$server" \
  --prompt-file "$dir/document" --context shared --publish --max-new-tokens 0

work() {
  local n="$1" round=0 text
  while true; do
    round=$((round + 1))
    text="$("$bin/icecache-worker" generate --model "$root/tests/models/recall" --server "$server" \
      --fork-of shared --question 'the copyright' --max-new-tokens 32 2>>"$dir/worker-$n.log" | tr '\n' ' ')" \
      || { printf 'worker %d has failed:\n' "$n"; tail -3 "$dir/worker-$n.log"; sleep 1; continue; }
    printf 'worker %d, round %d: %.60s\n' "$n" "$round" "$text"
  done
}
for n in $(seq "$workers"); do
  work "$n" &
  pids+=($!)
done
if [ "$seconds" -gt 0 ]; then
  sleep "$seconds"
  "$bin/icecachectl" contexts --server "$server"
  "$bin/icecachectl" memory --server "$server"
else
  wait
fi
