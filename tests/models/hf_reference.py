#!/usr/bin/env python3
"""Checks the float64 reference of this directory against Hugging Face transformers, on the tiny models of the tests.

  hf_reference.py --models DIR --write hf_logits.json    writes the logits that transformers gives in float64
  hf_reference.py --models DIR --check hf_logits.json    compares transformers with a file written earlier

DIR holds model directories in Hugging Face layout; ICECACHE_KEEP_TINY_MODELS=DIR makes llama_model_test leave its own there,
each with tokens.json (the ids it was asked) and logits.json (what reference_model.cc gives for the last token).
Every run also compares transformers with that logits.json.

Needs PyTorch and transformers 4.51 or later (Qwen3). Neither transformers nor a file it wrote was at hand when this script
was written: it has been run up to the import and no further, and no fixture of it is in the repository.
"""
import argparse
import json
import os
import sys

TOLERANCE = 1e-3  # what the worker promises; transformers' RoPE tables are f32, which alone costs up to 1e-4


def last_logits(directory, first, tokens):
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float64, attn_implementation="eager")
    model.eval()
    ids = torch.tensor([tokens])
    positions = torch.arange(first, first + len(tokens))[None]
    with torch.no_grad():
        return model(input_ids=ids, position_ids=positions).logits[0, -1].tolist()


def worst(a, b):
    return max(abs(x - y) for x, y in zip(a, b)) if len(a) == len(b) else float("inf")


def read(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", required=True, metavar="DIR")
    parser.add_argument("--write", metavar="FILE")
    parser.add_argument("--check", metavar="FILE")
    args = parser.parse_args()
    try:
        import transformers
    except ImportError:
        raise SystemExit("transformers is not installed: pip install 'transformers>=4.51' torch safetensors")
    earlier = read(args.check) if args.check else {}
    results, failures = {}, 0
    for name in sorted(os.listdir(args.models)):
        directory = os.path.join(args.models, name)
        asked = read(os.path.join(directory, "tokens.json"))
        logits = results[name] = last_logits(directory, asked["first"], asked["tokens"])
        errors = {"reference_model.cc": worst(logits, read(os.path.join(directory, "logits.json")))}
        if args.check:
            errors[args.check] = worst(logits, earlier.get(name, []))
        failures += any(error > TOLERANCE for error in errors.values())
        print(name, ", ".join("%s: %.2e" % item for item in errors.items()))
    if args.write:
        with open(args.write, "w", encoding="utf-8") as file:
            json.dump(results, file)
    print("transformers %s, %d models, %d beyond %g" % (transformers.__version__, len(results), failures, TOLERANCE))
    return 1 if failures or not results else 0


if __name__ == "__main__":
    sys.exit(main())
