#!/usr/bin/env python3
"""deploy/cluster.sh with real programs; a stand-in for ssh gives every host a home folder of its own on this machine."""
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SSH = """#!/bin/sh
host="$1"; shift
[ "$host" != unreachable ] || { echo "ssh: no route to host" >&2; exit 255; }
export HOME="$HOSTS/$host"; mkdir -p "$HOME"; cd "$HOME"
exec bash -c "$*"
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class ClusterScript(unittest.TestCase):
    def setUp(self):
        self.temp = tempfile.TemporaryDirectory()
        self.dir = Path(self.temp.name)
        (self.dir / "ssh").write_text(SSH)
        (self.dir / "ssh").chmod(0o755)
        self.inventory = self.dir / "hosts"
        self.port = free_port()
        self.write(f"# a comment\nserver 127.0.0.1 --port {self.port} --http-port 0 --memory-size 256MiB --threads 1\n"
                   "worker gpu-1  # another\nworker user@gpu-2\n")

    def tearDown(self):
        if self.pid_file().exists():
            try:
                os.kill(int(self.pid_file().read_text()), signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.temp.cleanup()

    def write(self, text):
        self.inventory.write_text(text)

    def pid_file(self):
        return self.dir / "127.0.0.1" / ".icecache" / "server.pid"

    def cluster(self, *args, code=0, **environment):
        env = dict(os.environ, ICECACHE_SSH=str(self.dir / "ssh"), HOSTS=str(self.dir), **environment)
        run = subprocess.run(["bash", ROOT / "deploy/cluster.sh", self.inventory, *args], env=env, text=True,
                             stdin=subprocess.DEVNULL, capture_output=True, timeout=100)
        self.assertEqual(run.returncode, code, f"{args}:\n{run.stdout}\n{run.stderr}")
        return run.stdout, run.stderr

    def test_life_of_a_cluster(self):
        out, _ = self.cluster("up")
        self.assertIn(f"127.0.0.1: server at 127.0.0.1:{self.port}", out)
        self.assertIn("user@gpu-2: worker, reaches the server", out)
        for secret in [*(self.dir / "hosts.secrets").iterdir(), *self.pid_file().parent.glob("*.*")]:
            self.assertEqual(stat.S_IMODE(secret.stat().st_mode) & 0o077, 0, f"{secret} is open to others")

        model = str(ROOT / "tests/models/recall")
        self.cluster("run", "gpu-1", "generate", "--model", model, "--prompt", "the licence of the source code it's under",
                     "--context", "notes", "--publish", "--max-new-tokens", "0")
        out, _ = self.cluster("ctl", "contexts", "--json")
        self.assertEqual([c["name"] for c in json.loads(out)["contexts"]], ["notes"])
        out, _ = self.cluster("run", "user@gpu-2", "generate", "--model", model, "--fork-of", "notes",
                              "--question", "copyright", "--max-new-tokens", "8")
        self.assertTrue(out.strip())

        pid = int(self.pid_file().read_text())
        self.cluster("up")
        self.assertEqual(int(self.pid_file().read_text()), pid, "a server that runs is left running")
        os.kill(pid, signal.SIGKILL)
        out, _ = self.cluster("status", code=1)
        self.assertIn("gpu-1 worker: no answer", out)
        self.cluster("up")
        out, _ = self.cluster("status")
        self.assertEqual(out.count(" ok"), 3)
        self.assertIn("ready", self.cluster("logs", "50")[0])
        self.assertIn("stopped", self.cluster("down")[0])
        self.assertIn("not running", self.cluster("down")[0])

    def test_mistakes_are_named(self):
        self.assertIn("unknown command 'start'", self.cluster("start", code=2)[1])
        self.assertIn("'gpu-9' is not a worker", self.cluster("run", "gpu-9", code=2)[1])
        self.assertIn("deploy/bootstrap.sh", self.cluster("up", code=1, ICECACHE_BIN_DIR="/nowhere")[1])
        self.write(f"server unreachable --port {self.port}\n")
        self.assertIn("unreachable: cannot reach it", self.cluster("up", code=1)[1])
        self.write(f"server 127.0.0.1 --port {self.port} --memory-size 900TiB\n")
        out, err = self.cluster("up", code=1)
        self.assertIn("--memory-size", err, "the server's own refusal is shown")
        for text, problem in [("worker a\n", "names no server"), ("server a\nserver b\n", ":2: a second server"),
                              ("sevrer a\n", "'sevrer' is neither"), ("server a;rm\n", "'a;rm' is not a host"),
                              ("server a --port 0\n", "fixed one")]:
            self.write(text)
            self.assertIn(problem, self.cluster("status", code=1)[1])


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
