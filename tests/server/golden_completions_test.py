#!/usr/bin/env python3
"""/v1/completions with a token-id prompt against a golden checkpoint that has no tokenizer.

Starts `--binary serve tests/goldens/random/moe-a --dtype float32`, asks for the 24 greedy tokens of the stored prompt with
`logprobs: 20` and `return_token_ids: true`, and compares the ids and every logprob with log softmax of the stored logits.
"""
import argparse
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
MODEL = ROOT / "tests" / "goldens" / "random" / "moe-a"
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


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", default=str(ROOT / "build" / "tokenspeed"))
    binary = parser.parse_args().binary
    golden = read_tensors(MODEL / "golden.safetensors")
    tokens = list(golden["decode.tokens"])
    port = free_port()
    server = subprocess.Popen([binary, "serve", str(MODEL), "--dtype", "float32", "--port", str(port)],
                              stderr=subprocess.DEVNULL)
    try:
        answer = complete(port, {"model": "moe-a", "prompt": list(golden["decode.prompt"]), "max_tokens": len(tokens),
                                 "temperature": 0, "logprobs": 20, "return_token_ids": True, "ignore_eos": True})
    finally:
        server.terminate()
        server.wait()
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


if __name__ == "__main__":
    main()
