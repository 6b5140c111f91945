#!/usr/bin/env bash
# A cache server and workers on the hosts of an inventory (deploy/cluster.example), over ssh.
#
#   deploy/cluster.sh INVENTORY up               programs, secrets and settings to every host; start; check from every worker
#   deploy/cluster.sh INVENTORY status           a line a host
#   deploy/cluster.sh INVENTORY run HOST ARGS    icecache-worker ARGS on a worker's host, as the cluster's tenant
#   deploy/cluster.sh INVENTORY ctl ARGS         icecachectl ARGS on the server's host: contexts, memory, explain NAME
#   deploy/cluster.sh INVENTORY logs [LINES]     the end of the server's log
#   deploy/cluster.sh INVENTORY down             drain and stop the server; contexts that are durable stay on its disk
#
# All of it is in ~/.icecache of each host; nothing needs root there but the packages of deploy/runtime-packages.txt.
# `up` makes one tenant, "cluster", with all rights, and a certificate of its own; both stay in INVENTORY.secrets here.
# Variables: ICECACHE_BIN_DIR (build/release/bin) the programs; ICECACHE_SSH (ssh -o BatchMode=yes) how to reach a host.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bin="${ICECACHE_BIN_DIR:-$root/build/release/bin}"
read -r -a ssh <<<"${ICECACHE_SSH:-ssh -o BatchMode=yes -o ConnectTimeout=10}"

say() { printf '%s\n' "$*"; }
fail() { printf 'cluster.sh: %s\n' "$*" >&2; exit 1; }
usage() { printf 'cluster.sh: %s; see deploy/cluster.sh --help\n' "$*" >&2; exit 2; }

case "${1:-}" in
  -h|--help) sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
  "") usage "no inventory given" ;;
esac
inventory="$1" command="${2:-}"
[ -r "$inventory" ] || usage "cannot read the inventory '$inventory'"
[ -n "$command" ] || usage "no command given"
shift 2

server="" server_options=() workers=() line=0
while read -r role host options || [ -n "${role:-}" ]; do
  line=$((line + 1))
  role="${role%%#*}"
  [ -n "$role" ] || continue
  [[ "${host:-}" =~ ^[A-Za-z0-9_][A-Za-z0-9_.@:-]*$ ]] || fail "$inventory:$line: '${host:-}' is not a host"
  case "$role" in
    server)
      [ -z "$server" ] || fail "$inventory:$line: a second server; an inventory has one"
      server="$host"
      read -r -a server_options <<<"${options%%#*}" ;;
    worker) workers+=("$host") ;;
    *) fail "$inventory:$line: '$role' is neither server nor worker" ;;
  esac
done <"$inventory"
[ -n "$server" ] || fail "$inventory names no server"
address="${server##*@}"  # what workers dial
port=7400
for ((i = 0; i < ${#server_options[@]}; ++i)); do
  [ "${server_options[i]}" != --port ] || port="${server_options[i + 1]:-}"
done
[[ "$port" =~ ^[1-9][0-9]*$ ]] || fail "$inventory: --port '$port': workers need a fixed one"
secrets="$inventory.secrets"

# on HOST SCRIPT [ARGS]: runs a bash script in ~/.icecache of a host; standard input is the script's.
on() {
  local host="$1" script="$2"
  shift 2
  "${ssh[@]}" "$host" "bash -c $(printf '%q' 'umask 077; mkdir -p ~/.icecache && cd ~/.icecache && '"$script") cluster$(
    [ $# -eq 0 ] || printf ' %q' "$@")"
}

# One tenant's secret, and a certificate for the address that workers dial. Made once; deleting the folder renews them.
make_secrets() {
  [ ! -s "$secrets/server.pem" ] || return 0
  command -v openssl >/dev/null || fail "openssl is not installed here"
  (umask 077 && mkdir -p "$secrets")
  local secret salt hash name=DNS
  [[ ! "$address" =~ ^[0-9.]+$|: ]] || name=IP
  secret="$(openssl rand -hex 32)" salt="$(openssl rand -hex 16)"
  hash="$(printf '%s%s' "$salt" "$secret" | sha256sum | cut -d' ' -f1)"
  (
    umask 077
    printf 'ICECACHE_TENANT=cluster\nICECACHE_SECRET=%s\nICECACHE_SERVER=%s:%s\n' "$secret" "$address" "$port" \
      >"$secrets/worker.env"
    printf '[[tenant]]\nname = "cluster"\nsecret_sha256 = "%s:%s"\nrights = ["read", "write", "share", "admin"]\n' \
      "$salt" "$hash" >"$secrets/tokens.toml"
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 -subj /CN=icecache \
      -addext "subjectAltName=$name:$address" -keyout "$secrets/server.key" -out "$secrets/server.pem.new" 2>/dev/null
    mv "$secrets/server.pem.new" "$secrets/server.pem"
  )
}

# Programs and the files named to a host, which must have the libraries that they link.
install_on() {
  local host="$1" missing
  shift
  tar -c -C "$bin" icecache-server icecache-worker icecachectl | on "$host" 'mkdir -p bin && tar -x -C bin' ||
    fail "$host: cannot reach it, or write ~/.icecache there: try ${ssh[*]} $host true"
  tar -c -C "$secrets" "$@" | on "$host" 'tar -x'
  missing="$(on "$host" 'ldd bin/icecache-* bin/icecachectl | sed -n "s/ => not found//p" | sort -u | tr -d "\n\t"' </dev/null)"
  [ -z "$missing" ] || fail "$host: $missing not there. Install on it: apt-get install -y --no-install-recommends $(
    sed 's/#.*//' "$root/deploy/runtime-packages.txt" | xargs)"
}

# In a script of the server's host: does the process of server.pid live, and is it ours? A dead one has no exe.
alive='alive() { [[ -s server.pid && "$(readlink "/proc/$(cat server.pid)/exe")" = */icecache-server* ]]; }; '

start_server() {
  on "$server" "$alive"'
    if alive; then exit 0; fi
    rm -f ports.json
    setsid nohup bin/icecache-server --host "$1" --token-file tokens.toml --tls-cert server.pem --tls-key server.key \
      --port-file ports.json "${@:2}" >>server.log 2>&1 </dev/null &
    echo $! >server.pid
    for _ in $(seq 600); do
      [ ! -s ports.json ] || exit 0
      kill -0 "$(cat server.pid)" 2>/dev/null || break
      sleep 0.1
    done
    tail -n 20 server.log >&2
    exit 1' "$address" "${server_options[@]}" </dev/null || fail "$server: the server did not start; its last lines are above"
}

with_settings='set -a; . ./worker.env; ICECACHE_TLS_CA="$PWD/server.pem"; set +a; '

case "$command" in
  up)
    for program in icecache-server icecache-worker icecachectl; do
      [ -x "$bin/$program" ] || fail "$bin/$program is not there: run deploy/bootstrap.sh --programs, or set ICECACHE_BIN_DIR"
    done
    make_secrets
    say "$server: server at $address:$port"
    install_on "$server" tokens.toml server.pem server.key worker.env
    start_server
    for host in "${workers[@]}"; do
      [ "$host" = "$server" ] || install_on "$host" server.pem worker.env
      on "$host" "$with_settings"'bin/icecachectl bench smoke' </dev/null >/dev/null ||
        fail "$host: no answer from $address:$port. Are its ports open to this host? Data ports are any free ones"
      say "$host: worker, reaches the server"
    done
    say "Look: deploy/cluster.sh $inventory ctl contexts" ;;
  status)
    code=0
    for host in "$server" "${workers[@]}"; do
      if [ "$host" = "$server" ]; then what=server; else what=worker; fi
      if on "$host" "$with_settings"'bin/icecachectl memory' </dev/null >/dev/null 2>&1; then
        say "$host $what ok"
      else
        say "$host $what: no answer from $address:$port"
        code=1
      fi
    done
    exit "$code" ;;
  run)
    host="${1:-}"
    [[ " ${workers[*]} " = *" ${host:-/} "* ]] || usage "run: '$host' is not a worker of $inventory (${workers[*]})"
    shift
    # From the home folder, where a user's files are.
    on "$host" "$with_settings"'cd && exec .icecache/bin/icecache-worker "$@"' "$@" ;;
  ctl) on "$server" "$with_settings"'exec bin/icecachectl "$@"' "$@" </dev/null ;;
  logs) on "$server" 'tail -n "$1" server.log' "${1:-100}" </dev/null ;;
  down)
    on "$server" "$alive"'
      if ! alive; then echo "not running"; exit 0; fi
      kill -TERM "$(cat server.pid)"
      for _ in $(seq 600); do
        alive || { rm -f server.pid; echo "stopped"; exit 0; }
        sleep 0.1
      done
      echo "still draining after a minute; a second SIGTERM ends it at once: kill $(cat server.pid)" >&2
      exit 1' </dev/null ;;
  *) usage "unknown command '$command'" ;;
esac
