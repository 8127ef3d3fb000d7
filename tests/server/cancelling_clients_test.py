#!/usr/bin/env python3
"""Many clients at once, of whom a third hang up in the middle of an answer: nobody gets another's tokens.

`--binary serve models/demo --device DEVICE`, 32 clients at a time, greedy, on the 128 rendered prompts of
demo-calls.jsonl, whose names differ from prompt to prompt. Answers, and what was read of the given up ones, must be
those of demo-calls-greedy.jsonl: all of them in float32 (cpu), all but a few with bfloat16 activations (cuda). Then
the server must answer on and have no request left.
"""
import argparse
import concurrent.futures
import json
import pathlib
import socket
import subprocess
import sys
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "tests" / "goldens"
MAX_TOKENS = 220
CLIENTS = 32
ROUNDS = 2
READ_OF_CANCELLED = 9  # events
LEAST_EQUAL = {"cpu": 1.0, "cuda": 0.9}
SECONDS = 60


def read_lines(name):
    return [json.loads(line) for line in (GOLDENS / name).read_text(encoding="utf-8").splitlines()]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def request_body(prompt, stream):
    return json.dumps({"model": "demo", "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0,
                       "return_token_ids": True, "stream": stream}).encode()


def whole_answer(url, prompt):
    request = urllib.request.Request(url + "/v1/completions", request_body(prompt, False),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=SECONDS) as response:
        return json.load(response)["choices"][0]["token_ids"]


def cancelled_answer(url, prompt):
    """The tokens of the first events; then the connection is closed."""
    request = urllib.request.Request(url + "/v1/completions", request_body(prompt, True),
                                     {"Content-Type": "application/json"})
    tokens = []
    with urllib.request.urlopen(request, timeout=SECONDS) as response:
        events = 0
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            tokens += json.loads(line[6:])["choices"][0].get("token_ids") or []
            events += 1
            if events == READ_OF_CANCELLED:
                break
    return tokens


def metric(url, name):
    with urllib.request.urlopen(url + "/metrics", timeout=SECONDS) as response:
        for line in response.read().decode().splitlines():
            if line.startswith(name):
                return float(line.rsplit(" ", 1)[1])
    sys.exit(f"/metrics has no {name}")


def wait_for(what, seconds=SECONDS):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if what():
                return
        except OSError:
            pass
        time.sleep(0.05)
    sys.exit("the server did not get ready, or keeps requests of clients that left")


def check(url, device):
    prompts = [line["rendered"] for line in read_lines("demo-calls.jsonl")]
    expected = [line["token_ids"] for line in read_lines("demo-calls-greedy.jsonl")]

    def ask(index):
        place = index % len(prompts)
        if index % 3 == 1:
            tokens = cancelled_answer(url, prompts[place])
            return len(tokens) > 0 and tokens == expected[place][:len(tokens)]
        return whole_answer(url, prompts[place]) == expected[place]

    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        equal = list(pool.map(ask, range(ROUNDS * len(prompts))))
    wait_for(lambda: metric(url, "vllm:num_requests_running") == 0)
    assert whole_answer(url, prompts[0]) == expected[0]
    share = sum(equal) / len(equal)
    print(f"{len(equal)} answers to {CLIENTS} clients at a time, {len(equal) // 3} of them given up: {sum(equal)} "
          "token for token the stored ones")
    assert share >= LEAST_EQUAL[device], share


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", default=str(ROOT / "build" / "tokenspeed"))
    parser.add_argument("--device", choices=sorted(LEAST_EQUAL), default="cpu")
    flags = parser.parse_args()
    port = free_port()
    command = [flags.binary, "serve", str(ROOT / "models" / "demo"), "--device", flags.device, "--port", str(port)]
    if flags.device == "cpu":
        command += ["--dtype", "float32"]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: urllib.request.urlopen(url + "/health", timeout=SECONDS).status == 200)
        check(url, flags.device)
        assert server.poll() is None, "the server ended"
    finally:
        server.terminate()
        code = server.wait(timeout=SECONDS)
    assert code == 0, f"the server's exit status is {code}"


if __name__ == "__main__":
    main()
