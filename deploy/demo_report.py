#!/usr/bin/env python3
"""Joins what the demo's two workers and the server reported into one table and one JSON file.

usage: demo_report.py A.json B.json STATUS.json [--json FILE] [--commit C] [--machine M]
"""
import argparse
import json

METHODS = ["full_kv", "exact", "icecache", "sink_window"]
LABELS = {
    "full_kv": "full KV in the worker",
    "exact": "exact top-k",
    "icecache": "icecache",
    "sink_window": "sink + window only",
}


def size(n):
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if n >= 100 or n == int(n) else f"{n:.1f} {unit}"
        n /= 1024


def row(m):
    right = round(m["accuracy"] * m["questions"])
    return [
        LABELS[m["name"]],
        "all" if m["name"] == "full_kv" else str(m["budget"]),
        f'{100 * m["accuracy"]:.1f} % ({right}/{m["questions"]})',
        f'{m["tokens_attended_per_head"]:.0f}',
        size(m["bytes_per_token"]),
        size(m["worker_kv_bytes"]),
        f'{m["ms_per_token"]:.1f}',
    ]


def table(header, rows):
    widths = [max(len(r[i]) for r in [header] + rows) for i in range(len(header))]
    line = lambda r: "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths)))
    return "\n".join([line(header), "  ".join("-" * w for w in widths)] + [line(r) for r in rows])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("a")
    p.add_argument("b")
    p.add_argument("status")
    p.add_argument("--json")
    p.add_argument("--commit", default="unknown")
    p.add_argument("--machine", default="unknown")
    args = p.parse_args()
    a, b, status = (json.load(open(f)) for f in (args.a, args.b, args.status))
    by_name = {m["name"]: m for m in a["methods"]}
    keep = ("name", "budget", "accuracy", "questions", "tokens_attended_per_head", "bytes_per_token",
            "worker_kv_bytes", "ms_per_token")
    methods = [{k: by_name[n][k] for k in keep} for n in METHODS]
    sharing = {
        "document_tokens": a["document_tokens"],
        "prefill_tokens_a": a["prefill_tokens"],
        "prefill_tokens_b": b["prefill_tokens"],
        "server_kv_bytes": status["memory"]["used_bytes"],
    }
    print()
    print(table(["method", "budget", "accuracy", "tokens/head", "moved/token", "worker KV", "ms/token"],
                [row(m) for m in methods]))
    shared_b = next(m for m in b["methods"] if m["name"] == "icecache")
    print(f"""
Worker A prefilled {sharing['prefill_tokens_a']:,} tokens and published them as one sealed context.
Worker B, another process, forked it without prefilling ({sharing['prefill_tokens_b']} tokens) and answered {shared_b['questions']} other
questions at the same time: {100 * shared_b['accuracy']:.1f} % right, {shared_b['ms_per_token']:.1f} ms/token.
The server holds the document once: {size(sharing['server_kv_bytes'])} of pages and rows for both.""")
    if args.json:
        with open(args.json, "w") as f:
            json.dump({"methods": methods, "sharing": sharing, "commit": args.commit, "machine": args.machine}, f, indent=1)
            f.write("\n")
        print(f"\nThe same numbers: {args.json}")


if __name__ == "__main__":
    main()
