#!/usr/bin/env python3
"""The tables of docs/index.md, as markdown, from runs of icecache-bench select.

usage: select_tables.py [--bench BIN] [--results FILE.jsonl] [--wrap "CMD"] [--heads DUMP] PART...

Runs what FILE does not hold yet, adds each result to it and prints the tables of the parts: single, group, seeds, others,
grow, error, near, heads. The plots come from the same file, by plot.py. --wrap goes in front of every run, for a machine that
must be made quiet first. heads needs a dump of the recall model (icecache-worker dump-trace, see docs/index.md).
"""
import argparse
import json
import os
import shlex
import subprocess
import sys

SIZES = (8192, 32768, 131072)
CLASSES = ("retrieval", "sinky", "topic", "broad", "diffuse")
MANY = {8192: 200, 32768: 200, 131072: 100}
HEADS = [(layer, head) for layer in range(4) for head in range(2)]
HEAD_WAYS = ({"layout": "content"}, {"layout": "sequential"}, {"layout": "content_value"}, {"sketch": "off"})


class Runs:
    def __init__(self, args):
        self.args, self.known = args, {}
        if os.path.exists(args.results):
            for line in open(args.results):
                row = json.loads(line)
                self.known[row["command"]] = row

    def get(self, **flags):
        command = " ".join(f"--{k.replace('_', '-')} {v}" if v is not True else f"--{k}" for k, v in flags.items())
        if command not in self.known:
            whole = shlex.split(self.args.wrap) + [self.args.bench, "select", *shlex.split(command), "--json"]
            done = subprocess.run(whole, capture_output=True, text=True)
            if done.returncode != 0:
                raise SystemExit(f"select_tables.py: {shlex.join(whole)}: {done.stderr or done.stdout}")
            row = {"command": command, **json.loads(done.stdout)}
            self.known[command] = row
            with open(self.args.results, "a") as f:
                f.write(json.dumps(row) + "\n")
            print(f"{command} ({row['commit']})", file=sys.stderr)
        return self.known[command]

    def one_head(self, keys, queries, trace="clustered", **more):
        return self.get(keys=keys, group=1, trace=trace, rank="max_token", queries=queries, **more)


def short(x):
    """Three digits or so: 123, 12, 1.2, .123."""
    if x is None:
        return ""
    if abs(x) >= 20:
        return f"{x:,.0f}"
    if abs(x) >= 1:
        return f"{x:.2g}"
    return f"{x:.3f}".replace("0.", ".", 1) if abs(x) >= 0.01 else f"{x:.2g}".replace("0.", ".", 1)


def table(title, head, rows):
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(x if isinstance(x, str) else short(x) for x in row)} |")


def single(runs):
    rows = []
    for keys in (*SIZES, 262144, 1048576):
        threads = {"threads": 2} if keys in SIZES else {}
        r = runs.one_head(keys, MANY.get(keys, 30), **threads)
        rows.append([f"{keys:,}", r["build_us_per_key"], r["build_us_per_key_first"], r.get("threads_build_us_per_key"), r.get("threads_build_wall_us_per_key"),
                     r["index_bytes_per_key"], r["page_fill"], r["query_us_p50"], r["query_per_exact_scan"],
                     r["query_strict_no_residual_us_p50"] / r["exact_scan_us_p50"], r["query_cold_us_p50"], r["coverage_top16"]])
    table("One head", ["keys", "build us/key", "first of a process", "two at once, each", "two threads, wall us/key", "index B/key", "fill", "query us",
                       "/ exact scan", "pages only / exact scan", "caches empty, us", "top-16 covered"], rows)


def group(runs):
    rows = []
    for keys in SIZES:
        one, four = runs.one_head(keys, 50), runs.get(keys=keys, group=4, trace="clustered", rank="max_token", queries=50)
        weak = runs.one_head(keys, 100, trace="weak")
        rows.append([f"{keys:,}", four["query_us_p50"], four["query_us_p50"] / one["query_us_p50"], weak["coverage_top16"],
                     weak["query_us_p50"]])
    table("A group of 4, and weak clusters", ["keys", "group us", "times one head", "weak: top-16", "weak: us"], rows)


def seeds(runs):
    rows = []
    for keys in SIZES:
        for trace in ("clustered", "weak"):
            got = [runs.one_head(keys, MANY[keys] // 2, trace=trace, seed=s) for s in (21, 22, 23)]
            rows.append([f"{keys:,}", trace, *(", ".join(short(r[k]) for r in got) for k in ("coverage_top16", "query_per_exact_scan"))])
    table("Held out: seeds 21, 22, 23", ["keys", "trace", "top-16 covered", "query / exact scan"], rows)


def others(runs):
    rows = []
    for keys in SIZES:
        dci, exact = runs.one_head(keys, 50, policy="dci_tree"), runs.one_head(keys, 10, policy="exact")
        tree = runs.one_head(keys, 50)
        rows.append([f"{keys:,}", dci["build_us_per_key"], dci["query_us_p50"], dci["query_per_exact_scan"], dci["coverage_top16"],
                     dci["query_us_p50"] / tree["query_us_p50"], exact["query_us_p50"]])
    table("Others", ["keys", "dci_tree build us/key", "query us", "/ exact scan", "top-16 covered", "cluster_tree is faster by",
                     "exact with residual, us"], rows)


def grow(runs):
    rows = []
    for fraction in (0.25, 1):
        for keys in SIZES:
            r = runs.one_head(keys, 100, insert_fraction=fraction)
            rows.append([f"{keys:,}, {fraction:.0%}", r["insert_us_mean"], r["insert_us_p999"], r["insert_us_max"],
                         r["insert_us_mean_of_two"], r["insert_us_max_of_two"],
                         r["grown_page_fill"], f"{short(r['grown_coverage_top16'])}, {short(r['fresh_coverage_top16'])}"])
    table("Growing", ["keys, grown by", "insert mean us", "p99.9", "worst", "mean, the lesser of two", "worst so", "fill", "top-16 after, fresh build"], rows)


def error(runs):
    rows = []
    for name in CLASSES:
        got = [runs.get(keys=32768, trace=f"calibrated:{name}", budget_pages=pages, queries=64) for pages in (12, 4)]
        names = ("output_error_strict_mean", "oracle_output_error_mean", "page_oracle_output_error_mean", "output_error_mean",
                 "tokens_read_mean", "oracle_equal_reads_output_error_mean", "build_us_per_key", "index_bytes_per_key")
        rows.append([name, *(", ".join(short(r[k]) for r in got) for k in names)])
    table("Output error at 12, 4 pages", ["head class", "strict", "oracle of the budget", "page oracle", "service", "tokens read",
                                          "equal reads: oracle", "build us/key", "index B/key"], rows)


def near(runs):
    rows = []
    for name in CLASSES:
        r = runs.get(keys=32768, trace=f"calibrated:{name}", budget_pages=12, queries=64)
        n = runs.get(keys=32768, trace=f"calibrated:{name}", budget_pages=12, queries=64, near=224)
        rows.append([name, r["query_us_p50"], r["query_per_exact_scan"], r["query_cold_us_p50"], n["query_us_p50"],
                     n["query_cold_us_p50"], n["output_error_mean"]])
    table("Cost of a query of sketched heads", ["head class", "query", "/ exact scan", "caches empty", "near", "near, caches empty",
                                                "service error near"], rows)


def heads(runs):
    if not runs.args.heads:
        raise SystemExit("select_tables.py: heads needs --heads DUMP")
    rows = []
    for layer, head in HEADS:
        trace = f"file:{runs.args.heads}@{layer}.{head}"
        got = [runs.get(trace=trace, queries=64, repeats=1, **way) for way in HEAD_WAYS]
        auto = runs.get(trace=trace, queries=64, repeats=1)
        rows.append([f"{layer}.{head}", *(", ".join(short(r[k]) for r in (*got, auto)) for k in ("output_error_strict_mean", "output_error_mean",
                                                                              "mass_coverage_strict_mean")),
                     "yes" if auto.get("sketched") else "no"])
    table("Real heads: errors of content, sequential, content + value, no sketch, and of the defaults",
          ["layer.head", "strict error", "service error", "mass in the pages", "sketched by default"], rows)


def main():
    parts = {f.__name__: f for f in (single, group, seeds, others, grow, error, near, heads)}
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bench", default="build/release/bin/icecache-bench")
    p.add_argument("--results", default="select.jsonl")
    p.add_argument("--wrap", default="")
    p.add_argument("--heads", default="")
    p.add_argument("parts", nargs="+", choices=sorted(parts), metavar="PART")
    args = p.parse_args()
    runs = Runs(args)
    for part in args.parts:
        parts[part](runs)


if __name__ == "__main__":
    main()
