#!/usr/bin/env python3
"""/v1/completions against goldens, in float32.

First `--binary serve tests/goldens/random/moe-a`, which has no tokenizer: the 24 greedy tokens of the stored token-id
prompt with `logprobs: 20` and `return_token_ids: true`; ids, and every logprob with log softmax of the stored logits.
Then `serve models/demo`: the answers to the 128 rendered prompts of demo-calls.jsonl, 8 at a time, must be token for
token those of transformers (demo-calls-greedy.jsonl, confirmed by tests/goldens/confirm_demo_calls.py).
"""
import argparse
import concurrent.futures
import contextlib
import json
import math
import pathlib
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "tests" / "goldens"
MODEL = GOLDENS / "random" / "moe-a"
DEMO = ROOT / "models" / "demo"
DEMO_MAX_TOKENS = 220
CONCURRENCY = 8
TOLERANCE = 4e-4  # of a logprob: twice that of a logit


def read_tensors(path):
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + size])
    tensors = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        begin, end = info["data_offsets"]
        kind = {"F32": "f", "I32": "i"}[info["dtype"]]
        tensors[name] = struct.unpack(f"<{(end - begin) // 4}{kind}", data[8 + size + begin:8 + size + end])
    return tensors


def log_softmax(logits):
    top = max(logits)
    total = top + math.log(sum(math.exp(x - top) for x in logits))
    return [x - total for x in logits]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def complete(port, body):
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    for _ in range(600):
        try:
            return json.load(urllib.request.urlopen(request))
        except urllib.error.URLError as error:
            if isinstance(error, urllib.error.HTTPError):
                sys.exit(error.read().decode())
            time.sleep(0.1)
    sys.exit("the server did not start")


@contextlib.contextmanager
def serving(binary, model):
    port = free_port()
    server = subprocess.Popen([binary, "serve", str(model), "--dtype", "float32", "--port", str(port)],
                              stderr=subprocess.DEVNULL)
    try:
        yield port
    finally:
        server.terminate()
        server.wait()


def check_logprobs(binary):
    golden = read_tensors(MODEL / "golden.safetensors")
    tokens = list(golden["decode.tokens"])
    with serving(binary, MODEL) as port:
        answer = complete(port, {"model": "moe-a", "prompt": list(golden["decode.prompt"]), "max_tokens": len(tokens),
                                 "temperature": 0, "logprobs": 20, "return_token_ids": True, "ignore_eos": True})
    choice = answer["choices"][0]
    assert choice["token_ids"] == tokens, (choice["token_ids"], tokens)
    vocabulary = len(golden["decode.logits"]) // (len(tokens) + 1)
    worst = 0.0
    for i, token in enumerate(tokens):
        expected = log_softmax(golden["decode.logits"][i * vocabulary:(i + 1) * vocabulary])
        worst = max(worst, abs(choice["logprobs"]["token_logprobs"][i] - expected[token]))
        best = sorted(expected, reverse=True)[:20]
        returned = sorted(choice["logprobs"]["top_logprobs"][i].values(), reverse=True)[:20]
        assert len(returned) == 20, len(returned)
        worst = max(worst, *(abs(a - b) for a, b in zip(returned, best)))
    assert worst <= TOLERANCE, worst
    print(f"golden completions: {len(tokens)} tokens equal, logprobs within {worst:.1e}")


def read_lines(name):
    return [json.loads(line) for line in (GOLDENS / name).read_text(encoding="utf-8").splitlines()]


def check_demo_calls(binary):
    requests = read_lines("demo-calls.jsonl")
    expected = read_lines("demo-calls-greedy.jsonl")
    with serving(binary, DEMO) as port:
        def answer(request):
            return complete(port, {"model": "demo", "prompt": request["rendered"], "max_tokens": DEMO_MAX_TOKENS,
                                   "temperature": 0, "return_token_ids": True})
        with concurrent.futures.ThreadPoolExecutor(CONCURRENCY) as pool:
            answers = list(pool.map(answer, requests))
    assert len(answers) == len(expected) == 128
    for i, (got, want) in enumerate(zip(answers, expected)):
        assert got["usage"]["prompt_tokens"] == want["prompt_tokens"], i
        assert got["choices"][0]["token_ids"] == want["token_ids"], (i, got["choices"][0]["text"])
    total = sum(len(want["token_ids"]) for want in expected)
    print(f"demo calls: {len(answers)} answers, {total} tokens, all equal to transformers' greedy tokens")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", default=str(ROOT / "build" / "tokenspeed"))
    binary = parser.parse_args().binary
    check_logprobs(binary)
    check_demo_calls(binary)


if __name__ == "__main__":
    main()
