#!/usr/bin/env bash
# The main job, end to end, on one machine: a cache server, worker A that reads a long document and shares it, and
# worker B, another process, that answers questions about it without ever reading it.
#
#   deploy/demo.sh [--json FILE] [--tokens 16384] [--questions 64] [--no-bootstrap]
set -euo pipefail
cd "$(dirname "$0")/.."

json="" tokens=16384 questions=64 bootstrap=1
while [ $# -gt 0 ]; do
  case "$1" in
    --json) json="${2:?--json needs a file}"; shift 2 ;;
    --tokens) tokens="${2:?--tokens needs a number}"; shift 2 ;;
    --questions) questions="${2:?--questions needs a number}"; shift 2 ;;
    --no-bootstrap) bootstrap=0; shift ;;
    -h|--help) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "demo.sh: unknown option '$1'; see deploy/demo.sh --help" >&2; exit 2 ;;
  esac
done
[ "$bootstrap" = 0 ] || bash deploy/bootstrap.sh --preset release --programs
bin="${ICECACHE_BIN_DIR:-build/release/bin}"
for program in icecache-server icecache-worker; do
  [ -x "$bin/$program" ] || { echo "demo.sh: $bin/$program is not there; run it without --no-bootstrap" >&2; exit 1; }
done

work="$(mktemp -d)"
server=""
worker_b=""
finish() {
  [ -z "$worker_b" ] || kill "$worker_b" 2>/dev/null || true
  [ -z "$server" ] || { kill "$server" 2>/dev/null && wait "$server" 2>/dev/null; } || true
  rm -rf "$work"
}
trap finish EXIT
# Waits until `file` is there, as long as process `pid` lives: wait_for FILE PID SECONDS WHAT LOG
wait_for() {
  for _ in $(seq $(($3 * 20))); do
    [ ! -s "$1" ] || return 0
    kill -0 "$2" 2>/dev/null || break
    sleep 0.05
  done
  [ ! -s "$1" ] || return 0
  echo "demo.sh: $4 did not come up:" >&2
  tail -n 20 "$5" >&2
  exit 1
}

echo "Starting the cache server"
"$bin/icecache-server" --port 0 --http-port 0 --memory-size 512MiB --threads 1 --port-file "$work/ports.json" \
  >"$work/server.log" 2>&1 &
server=$!
wait_for "$work/ports.json" "$server" 30 "the server" "$work/server.log"
port="$(jq -r .port "$work/ports.json")"
http_port="$(jq -r .http_port "$work/ports.json")"

recall=("$bin/icecache-worker" recall --model tests/models/recall --server "127.0.0.1:$port" --budget 256
        --tokens "$tokens" --facts $((2 * questions)) --question-count "$questions")

# Worker B waits for the document and asks the second half of the questions while A asks the first.
(
  until [ -s "$work/published" ]; do sleep 0.05; done
  exec "${recall[@]}" --fork-of demo-document --methods icecache --question-first "$questions" \
    --json "$work/b.json" >"$work/b.log" 2>&1
) &
worker_b=$!
echo "Worker A reads $tokens tokens (the licences of this system, with $((2 * questions)) facts scattered in them), shares them, and asks $questions questions in four ways"
"${recall[@]}" --context demo-document --publish --ready-file "$work/published" \
  --methods icecache,full_kv,exact,sink_window --json "$work/a.json"
echo "Worker B answers its own $questions questions"
if ! wait "$worker_b"; then
  worker_b=""
  echo "demo.sh: worker B failed:" >&2
  tail -n 20 "$work/b.log" >&2
  exit 1
fi
worker_b=""
curl_status() { exec 3<>"/dev/tcp/127.0.0.1/$http_port"; printf 'GET /status HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n' >&3; sed '1,/^\r$/d' <&3; }
curl_status >"$work/status.json"

machine="$(sed -n 's/^model name[[:space:]]*: //p' /proc/cpuinfo | head -n 1), $(nproc) cores"
commit="$(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
python3 deploy/demo_report.py "$work/a.json" "$work/b.json" "$work/status.json" \
  --commit "$commit" --machine "$machine" ${json:+--json "$json"}
cat <<END

Look further:
  $bin/icecache-worker generate --help     ask your own model about your own text
  $bin/icecache-server --help              run the server by itself
  README.md                                what this is; docs/ has the depth
END
