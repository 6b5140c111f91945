#!/usr/bin/env python3
"""Line plots from the JSON lines of icecache-bench, as SVG, with nothing but the standard library.

usage: plot.py --x keys --y query_us_p50 [--series policy] [--where trace=clustered ...] [--log-x] [--log-y]
               [--title T] [--x-label L] [--y-label L] [--guide 1.0] --out FILE.svg RESULTS.jsonl...

One line per value of --series; points of equal x are averaged, with a bar from the smallest to the largest.
"""
import argparse
import json
import math
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 78, 190, 44, 56
COLOURS = ["#1f6fb2", "#d1582a", "#2f8f4e", "#8a4fb0", "#b0862a", "#c23b6e", "#3aa6a6", "#666666", "#6b8e23", "#7a4a2a"]


def ticks(low, high, log):
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        steps = [1] if last - first > 3 else [1, 2, 5]
        found = [s * 10.0**e for e in range(first, last + 1) for s in steps if low * 0.999 <= s * 10.0**e <= high * 1.001]
        return found or [low, high]
    span = high - low or 1
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= 6)
    start = math.ceil(low / step) * step
    return [start + i * step for i in range(int((high - start) / step + 1e-9) + 1)]


def label(v):
    if v >= 1 << 20 and v % (1 << 20) == 0:
        return f"{int(v) >> 20}M"
    if v >= 1e6:
        return f"{v / 1e6:g}M"
    if v >= 1000:
        return f"{v / 1000:g}k"
    return f"{v:.4g}"


class Axis:
    def __init__(self, values, log, begin, end):
        self.log, self.begin, self.end = log, begin, end
        low, high = min(values), max(values)
        if log:
            self.low, self.high = low, high if high > low else low * 10
        else:
            pad = 0.04 * ((high - low) or abs(high) or 1)
            self.low, self.high = (0 if 0 <= low <= 0.5 * high else low - pad), high + pad

    def at(self, v):
        f = math.log if self.log else float
        share = (f(v) - f(self.low)) / ((f(self.high) - f(self.low)) or 1)
        return self.begin + share * (self.end - self.begin)


def collect(args):
    wanted = dict(w.split("=", 1) for w in args.where)
    series = {}
    for path in args.results:
        for line in open(path):
            line = line.strip()
            if not line.startswith("{"):
                continue
            row = json.loads(line)
            if any(str(row.get(k)) != v for k, v in wanted.items()) or args.x not in row or args.y not in row:
                continue
            name = " ".join(str(row.get(s, "")) for s in args.series.split(",")) if args.series else args.y
            series.setdefault(name, {}).setdefault(float(row[args.x]), []).append(float(row[args.y]))
    return {k: sorted(v.items()) for k, v in series.items()}


def draw(series, args):
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, v in points for y in v] + ([args.guide] if args.guide is not None else [])
    x_axis = Axis(xs, args.log_x, LEFT, WIDTH - RIGHT)
    y_axis = Axis(ys, args.log_y, HEIGHT - BOTTOM, TOP)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12" fill="#222">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="15" font-weight="bold">{escape(args.title or args.y)}</text>',
    ]
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    for v in ticks(y_axis.low, y_axis.high, args.log_y):
        y = y_axis.at(v)
        out.append(f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e4e4"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label(v)}</text>')
    for v in sorted(set(xs)) if len(set(xs)) <= 9 else ticks(x_axis.low, x_axis.high, args.log_x):
        x = x_axis.at(v)
        out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}" stroke="#888"/>')
        out.append(f'<text x="{x:.1f}" y="{bottom + 19}" text-anchor="middle">{label(v)}</text>')
    out.append(f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="#888"/>')
    out.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 14}" text-anchor="middle">{escape(args.x_label or args.x)}</text>')
    out.append(f'<text transform="translate(18 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">{escape(args.y_label or args.y)}</text>')
    if args.guide is not None:
        y = y_axis.at(args.guide)
        out.append(f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#222" stroke-dasharray="5 4"/>')
    for i, (name, points) in enumerate(sorted(series.items())):
        colour = COLOURS[i % len(COLOURS)]
        path = []
        for x, values in points:
            px, py = x_axis.at(x), y_axis.at(sum(values) / len(values))
            path.append(f"{px:.1f} {py:.1f}")
            out.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.2" fill="{colour}"/>')
            if len(values) > 1:
                out.append(f'<line x1="{px:.1f}" x2="{px:.1f}" y1="{y_axis.at(min(values)):.1f}" y2="{y_axis.at(max(values)):.1f}" stroke="{colour}"/>')
        out.append(f'<path d="M{"L".join(path)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        y = TOP + 8 + 20 * i
        out.append(f'<line x1="{right + 14}" x2="{right + 36}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="3"/>')
        out.append(f'<text x="{right + 42}" y="{y + 4}">{escape(name)}</text>')
    return "\n".join(out + ["</svg>", ""])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--x", required=True)
    p.add_argument("--y", required=True)
    p.add_argument("--series", default="")
    p.add_argument("--where", action="append", default=[])
    p.add_argument("--log-x", action="store_true")
    p.add_argument("--log-y", action="store_true")
    p.add_argument("--title", default="")
    p.add_argument("--x-label", default="")
    p.add_argument("--y-label", default="")
    p.add_argument("--guide", type=float)
    p.add_argument("--out", required=True)
    p.add_argument("results", nargs="+")
    args = p.parse_args()
    series = collect(args)
    if not series:
        raise SystemExit(f"plot.py: no line of {', '.join(args.results)} has both '{args.x}' and '{args.y}' and matches --where")
    with open(args.out, "w") as f:
        f.write(draw(series, args))


if __name__ == "__main__":
    main()
