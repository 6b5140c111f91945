#!/usr/bin/env python3
"""Trains a model for tests/models/recall: a small Llama that answers questions about facts in a long real text.

  train_recall.py --out DIR --minutes 90                       4 layers, width 256, words; 2 CPU cores
  train_recall.py --out DIR --minutes 120 --size large         8 layers, width 384, byte-level BPE, all tasks; a GPU
  train_recall.py --out DIR --evaluate                         first-city accuracy of what DIR holds

Needs PyTorch 1.13 or later with NumPy (Debian: python3-torch) and text that Debian packages install (recall_training/
text.py). Writes config.json, model.safetensors (f16) and tokenizer.json, after every stage and at the end. One run is
not bit for bit the next, since it stops by the clock and the text is the machine's own.

How it learns: the length of the documents grows stage by stage; the next stage starts when 93 % of the answers are right,
and after the last a mix of lengths goes on until time is up. Positions jump at random places up to the maximum, so that
distances far beyond the documents' length are seen. The answers of a document weigh about three times as much as all
its text. Small: the first stage takes about 2 M tokens, the whole about 10 M. OpenBLAS of Debian 12 does not know recent
processors; where they have AVX-512, OPENBLAS_CORETYPE=SkylakeX makes this up to three times faster.
"""
import argparse
import json
import os
import random
import sys
import time

import torch
import torch.nn.functional as F

from recall_training import files, text, vocabulary
from recall_training.network import Llama
from recall_training.tasks import Batches, Tasks

# size: network, vocabulary, bytes of text, learning rate, tasks, stages and mix of (documents, tokens, facts, positions).
SMALL = {
    "network": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
                "num_key_value_heads": 2, "head_dim": 64, "rope_theta": 100000.0, "rms_norm_eps": 1e-5,
                "max_position_embeddings": 32768},
    "vocabulary": vocabulary.Words, "text_bytes": 12_000_000, "rate": 1e-3, "kinds": ("single",),
    "stages": [(24, 64, 4, 64), (32, 128, 6, 512), (24, 192, 6, 4096), (12, 384, 10, 16384), (6, 768, 16, 32768)],
    "mix": [(6, 768, 16, 32768), (3, 1536, 24, 32768), (2, 2560, 32, 32768), (1, 4096, 40, 32768)],
}
LARGE = {
    "network": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 12,
                "num_key_value_heads": 4, "head_dim": 64, "rope_theta": 1000000.0, "rms_norm_eps": 1e-5,
                "max_position_embeddings": 65536},
    "vocabulary": vocabulary.BytePairs, "text_bytes": 60_000_000, "rate": 6e-4, "kinds": Tasks.KINDS,
    "stages": [(128, 256, 4, 1024), (96, 384, 8, 8192), (48, 768, 12, 32768), (24, 1536, 16, 65536)],
    "mix": [(24, 1536, 16, 65536), (8, 4096, 32, 65536), (3, 12288, 64, 65536), (1, 32768, 96, 65536)],
}
SIZES = {"small": SMALL, "large": LARGE}
STAGE_DONE = 0.93
RATE_LAST = 0.03  # share of the learning rate at the end


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="DIR", help="model directory to write, or to evaluate")
    parser.add_argument("--minutes", type=float, default=90, help="training time (default 90)")
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--evaluate", action="store_true", help="do not train; score the model in DIR")
    args = parser.parse_args()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def autocast(device):
    on_gpu = device.startswith("cuda")
    return torch.autocast("cuda" if on_gpu else "cpu", dtype=torch.bfloat16, enabled=on_gpu)


class Trainer:
    def __init__(self, args, recipe, words, network, config):
        self.args, self.recipe, self.words, self.network, self.config = args, recipe, words, network, config
        self.limit = args.minutes * 60
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=recipe["rate"], betas=(0.9, 0.98),
                                           weight_decay=0.01)
        self.stage = self.step = self.tokens = 0
        self.right = 0.0  # running share of answer tokens guessed

    def plan(self):
        stages, mix = self.recipe["stages"], self.recipe["mix"]
        return stages[self.stage] if self.stage < len(stages) else mix[self.step % len(mix)]

    def update(self, batches, elapsed):
        size, length, facts, position_max = self.plan()
        ids, weights, positions = (t.to(self.args.device) for t in batches.make(size, length, facts, position_max))
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe["rate"] * min(1.0, (self.step + 1) / 100) * max(RATE_LAST, 1 - elapsed / self.limit)
        wanted, weight = ids[:, 1:], weights[:, 1:]
        rows = weight > 0  # the rest would only fill memory with logits
        with autocast(self.args.device):
            logits = self.network.logits(self.network(ids[:, :-1], positions)[rows])
        each = F.cross_entropy(logits.float(), wanted[rows], reduction="none")
        loss = (each * weight[rows]).sum() / weight.sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        answers = weight[rows] == 1
        hit = (logits.argmax(-1) == wanted[rows])[answers].float().mean().item()
        self.right = 0.97 * self.right + 0.03 * hit
        self.step += 1
        self.tokens += size * length
        return loss.item(), length

    def run(self, batches):
        start = reported = time.time()
        while time.time() - start < self.limit:
            loss, length = self.update(batches, time.time() - start)
            if self.right > STAGE_DONE and self.stage < len(self.recipe["stages"]):
                self.stage, self.right = self.stage + 1, 0.0
                files.export(self.args.out, self.network, self.config, self.words)
            if time.time() - reported > 10:
                reported = time.time()
                print("%5.0f s  step %d  stage %d  length %d  %.2f M tokens  loss %.3f  answers right %.3f" % (
                    reported - start, self.step, self.stage, length, self.tokens / 1e6, loss, self.right), flush=True)
        files.export(self.args.out, self.network, self.config, self.words)


def train(args):
    recipe = SIZES[args.size]
    documents = text.read_text(recipe["text_bytes"], args.seed)
    words = recipe["vocabulary"](documents)
    corpus = [i for one in documents for i in words.encode(one)]
    torch.manual_seed(args.seed)
    config = dict(recipe["network"], vocab_size=words.size)
    network = Llama(config).to(args.device)
    print("%s: %d documents, %.1f M tokens of text, vocabulary %d, %.2f M parameters" % (
        args.device, len(documents), len(corpus) / 1e6, words.size,
        sum(p.numel() for p in network.parameters()) / 1e6), flush=True)
    Trainer(args, recipe, words, network, config).run(Batches(words, corpus, recipe["kinds"], args.seed))


def evaluate(args, lengths=(512, 2048, 4096), rounds=8):
    """Share of questions whose first answer token is right, at contiguous positions; 16 facts per document."""
    with open(os.path.join(args.out, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    with open(os.path.join(args.out, "tokenizer.json"), encoding="utf-8") as file:
        words = vocabulary.from_tokenizer_json(json.load(file))
    network = Llama(config).to(args.device)
    network.load_state_dict({k: v.float() for k, v in
                             files.read_safetensors(os.path.join(args.out, "model.safetensors")).items()})
    network.eval()
    documents = text.read_text(3_000_000, args.seed + 1000)
    batches = Batches(words, [i for one in documents for i in words.encode(one)], ("single",), args.seed + 1000)
    random.seed(args.seed)
    for length in lengths:
        right = asked = 0
        for _ in range(rounds):
            ids, weights, _ = batches.make(1, length, 16, length)
            with torch.no_grad():
                hidden = network(ids[:, :-1].to(args.device), torch.arange(length, device=args.device)[None])
                guess = network.logits(hidden)[0].argmax(-1).cpu()
            answer = weights[0] == 1
            first = [i for i in range(1, length + 1) if answer[i] and not answer[i - 1]]
            right += sum(int(guess[i - 1] == ids[0, i]) for i in first)
            asked += len(first)
        print("%5d tokens: first city right %d of %d (%.2f)" % (length, right, asked, right / asked), flush=True)


def main():
    args = arguments()
    if not args.evaluate:
        train(args)
    evaluate(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
