#!/usr/bin/env python3
"""The dense peer of `icecache-bench attention`: decode attention over a whole context by PyTorch's
scaled_dot_product_attention, with whatever backend it finds fastest, at the same shapes.

One JSON object a line, with the fields of icecache-bench: context, batch, p50_us, p99_us. Where
there is no PyTorch or no GPU it says so in one object and ends with 0.

  tests/bench/sdpa_peer.py --context 8192 32768 131072 --batch 1 8 32
"""
import argparse
import json
import statistics
import sys

KV_HEADS, GROUP, DIM = 8, 4, 128


def skip(why):
    print(json.dumps({'bench': 'sdpa_peer', 'skipped': why}))
    sys.exit(0)


def timed(torch, call, rounds):
    """Microseconds per call, one value per round of as many calls as take about a millisecond."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def once(calls):
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / calls
    calls = max(1, min(200, int(1000 / max(once(1), 1e-3))))
    return sorted(once(calls) for _ in range(rounds))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--context', type=int, nargs='+', default=[8192, 32768, 131072])
    parser.add_argument('--batch', type=int, nargs='+', default=[1, 8, 32])
    parser.add_argument('--dtype', choices=['bf16', 'f16'], default='bf16')
    parser.add_argument('--rounds', type=int, default=50)
    parser.add_argument('--seed', type=int, default=1)
    args = parser.parse_args()
    try:
        import torch
        from torch.nn.functional import scaled_dot_product_attention
    except ImportError as error:
        skip(f'PyTorch is not there: {error}')
    if not torch.cuda.is_available():
        skip('PyTorch finds no GPU')
    torch.manual_seed(args.seed)
    dtype = torch.bfloat16 if args.dtype == 'bf16' else torch.float16
    for context in args.context:
        for batch in args.batch:
            point = {'bench': 'sdpa_peer', 'device': torch.cuda.get_device_name(), 'torch': torch.__version__,
                     'dtype': args.dtype, 'context': context, 'batch': batch, 'seed': args.seed}
            try:
                q = torch.randn(batch, KV_HEADS * GROUP, 1, DIM, device='cuda', dtype=dtype)
                k = torch.randn(batch, KV_HEADS, context, DIM, device='cuda', dtype=dtype)
                v = torch.randn_like(k)
                # Decode: one query row. Two ways to say grouped heads; the faster one is the peer.
                grouped = q.view(batch, KV_HEADS, GROUP, DIM)
                ways = {'group_as_rows': lambda: scaled_dot_product_attention(grouped, k, v),
                        'enable_gqa': lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True)}
                best = None
                for name, way in ways.items():
                    try:
                        times = timed(torch, way, args.rounds)
                    except (RuntimeError, TypeError) as error:
                        point[f'{name}_failed'] = str(error).splitlines()[0]
                        continue
                    if best is None or statistics.median(times) < statistics.median(best):
                        best = times
                        point['way'] = name
                if best is None:
                    point['skipped'] = 'no way worked'
                else:
                    point['p50_us'] = statistics.median(best)
                    point['p99_us'] = best[min(len(best) - 1, int(0.99 * len(best)))]
                    point['bytes'] = 2 * k.numel() * k.element_size()
            except torch.cuda.OutOfMemoryError:
                point['skipped'] = 'out of GPU memory'
            print(json.dumps(point), flush=True)
            q = k = v = None
            torch.cuda.empty_cache()


if __name__ == '__main__':
    main()
