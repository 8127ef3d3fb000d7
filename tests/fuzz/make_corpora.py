#!/usr/bin/env python3
"""Writes seed inputs for the fuzzers of this folder: make_corpora.py OUT_DIRECTORY makes OUT_DIRECTORY/NAME/*."""
import json
import pathlib
import struct
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "tests" / "goldens"
DEMO = ROOT / "models" / "demo"
MAX_REQUESTS = 24


def byte_level_vocabulary():
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    others = [b for b in range(256) if b not in printable]
    characters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return {characters[b]: b for b in range(256)}


def small_tokenizer(pattern):
    vocabulary = byte_level_vocabulary() | {"ab": 256, "abc": 257, "\u0120t": 258}
    return {
        "added_tokens": [
            {"id": 259, "content": "<|im_end|>", "special": True, "normalized": False, "lstrip": True},
            {"id": 260, "content": "caf\u00e9", "special": False, "normalized": True, "single_word": True},
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]},
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "ignore_merges": False, "vocab": vocabulary, "merges": ["a b", ["ab", "c"], "\u0120 t"]},
    }


def tokenizer_seeds():
    for pattern in [r"\s+|\S+", r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|\s+(?!\S)|\s+"]:
        yield b"\0" + json.dumps(small_tokenizer(pattern)).encode()
    for case in json.loads((GOLDENS / "demo-tokenizer.json").read_text()):
        yield b"\1" + case["text"].encode()
        yield b"\2" + b"".join(struct.pack("<h", id) for id in case["ids"])


def requests():
    lines = (GOLDENS / "demo-calls.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:MAX_REQUESTS]]


def call_text(calls):
    text = "I look it up.\n</think>\n\n"
    for name, arguments in calls:
        text += f"<tool_call>\n<function={name}>\n"
        for key, value in arguments.items():
            text += f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
        text += "</function>\n</tool_call>"
    return text


def tool_call_seeds():
    for number, request in enumerate(requests()):
        yield bytes([number % 8, number]) + call_text(request["expected_calls"]).encode()
    values = {"i": 3, "n": -1.5e3, "b": True, "o": {"k": [1, None]}, "a": [1, "x"], "s": " text ", "u": "\u00e9"}
    yield b"\1\2" + call_text([("f", values), ("f", {})]).encode()


def template_seeds():
    whole = (DEMO / "chat_template.jinja").read_bytes()
    yield whole
    for part in whole.split(b"\n\n"):
        yield part
    yield b"{%- for m in messages recursive -%}{{ loop.index0 ~ m['role']|upper }}{% else %}x{%- endfor -%}"
    yield b"{% macro f(a, b=2) %}{{ a + b }}{% endmacro %}{{ f(1) }}{% set ns = namespace(n=0) %}{% set ns.n = 3 // 2 %}"
    yield b"{{ messages[::-1]|tojson }}{{ x.s.strip().split(' ')|join(',') }}{{ raise_exception('no') if x.k is mapping }}"


def http_body_seeds():
    for request in requests():
        body = {key: request[key] for key in ("messages", "tools", "chat_template_kwargs")}
        yield b"\0" + json.dumps(body).encode()
        yield b"\2" + json.dumps(body | {"return_token_strs": True}).encode()
    every = {
        "model": "demo", "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}}]},
            {"role": "tool", "tool_call_id": "call_1", "content": "2"}],
        "temperature": 0.5, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {"5": -100}, "seed": 7, "n": 2,
        "stop": ["\n\n", "END"], "logprobs": True, "top_logprobs": 5, "max_completion_tokens": 9, "stream": True,
        "stream_options": {"include_usage": True}, "tool_choice": {"type": "function", "function": {"name": "f"}},
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "parallel_tool_calls": False, "ignore_eos": True, "response_format": {"type": "text"}}
    yield b"\0" + json.dumps(every).encode()
    yield b"\1" + json.dumps({"prompt": [[1, 2], [3]], "echo": True, "max_tokens": 0, "logprobs": 20}).encode()
    yield b"\1" + json.dumps({"prompt": ["a", "b"], "return_token_ids": True, "stop_token_ids": [5]}).encode()
    yield b"\3" + json.dumps({"tokens": [1, 2, 300, 6119]}).encode()


def safetensors_seeds():
    header = json.dumps({
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]}}).encode()
    yield struct.pack("<Q", len(header)) + header + bytes(24)
    whole = (DEMO / "model.safetensors").read_bytes()
    yield whole[:8 + struct.unpack("<Q", whole[:8])[0] + 64]


def config_seeds():
    for path in [DEMO / "config.json", *sorted((GOLDENS / "random").glob("*/config.json"))]:
        yield path.read_bytes()


def main():
    out = pathlib.Path(sys.argv[1])
    makers = {name[:-len("_seeds")]: maker for name, maker in globals().items() if name.endswith("_seeds")}
    for name, maker in makers.items():
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(maker()):
            (folder / f"seed-{number:03}").write_bytes(seed)


if __name__ == "__main__":
    main()
