#!/usr/bin/env python3
"""Confirms demo-calls-greedy.jsonl with transformers (5.17 or later, and torch): each stored token must be the greatest
logit of a float32 forward pass over the prompt and the stored tokens before it, which makes the whole answer the greedy
one. Needs no GPU, is faster with one. Prints one line; exits 0 when all 128 agree.
"""
import json
import pathlib
import sys

import torch
import transformers

GOLDENS = pathlib.Path(__file__).resolve().parent
DEMO = GOLDENS.parents[1] / "models" / "demo"


def read_lines(name):
    return [json.loads(line) for line in (GOLDENS / name).read_text(encoding="utf-8").splitlines()]


def main():
    torch.backends.cuda.matmul.allow_tf32 = False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32, attn_implementation="eager")
    model = model.to(device).eval()
    agree, margin = 0, float("inf")
    answers = read_lines("demo-calls-greedy.jsonl")
    for request, answer in zip(read_lines("demo-calls.jsonl"), answers, strict=True):
        prompt = tokenizer(request["rendered"], add_special_tokens=False)["input_ids"]
        tokens = answer["token_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens], device=device)).logits[0]
        best = logits[len(prompt) - 1:-1].topk(2)
        margin = min(margin, (best.values[:, 0] - best.values[:, 1]).min().item())
        agree += len(prompt) == answer["prompt_tokens"] and best.indices[:, 0].tolist() == tokens
    print(f"transformers {transformers.__version__}: {agree} of {len(answers)} answers are greedy, "
          f"least margin {margin:.2e}")
    return 0 if agree == len(answers) else 1


if __name__ == "__main__":
    sys.exit(main())
