#!/usr/bin/env python3
"""The server as PyPI's `openai` client sees it, with the demo model.

Needs `pip install openai` and a server: the one at --base-url, or --binary build/tokenspeed to start one. Checks chat,
streamed chat, streamed tools, errors and the models list, then sends the 128 requests of tests/goldens/demo-calls.jsonl
at temperature 0, 8 at a time: prompt_tokens must all be the expected ones, and at least 88% of the answers must make
exactly the expected calls. Prints one summary line; exits 0 when everything holds.
"""
import argparse
import asyncio
import json
import pathlib
import socket
import subprocess
import sys
import time

import openai

ROOT = pathlib.Path(__file__).resolve().parents[2]
CALLS = ROOT / "tests" / "goldens" / "demo-calls.jsonl"
MIN_EXACT_SHARE = 0.88
CONCURRENCY = 8
MAX_TOKENS = 220  # as the demo model's rates were measured: some answers never end
START_SECONDS = 60


class CheckFailed(Exception):
    pass


def check(condition, what):
    if not condition:
        raise CheckFailed(what)


def golden_requests():
    return [json.loads(line) for line in CALLS.read_text(encoding="utf-8").splitlines()]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_server(binary):
    port = free_port()
    process = subprocess.Popen([binary, "serve", str(ROOT / "models" / "demo"), "--port", str(port)],
                               stdout=subprocess.DEVNULL)
    base_url = f"http://127.0.0.1:{port}/v1"
    client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            client.models.list()
            return process, base_url
        except openai.APIConnectionError:
            if process.poll() is not None:
                sys.exit(f"{binary} ended with exit code {process.returncode} before it served")
            if time.monotonic() > deadline:
                process.kill()
                sys.exit(f"{binary} did not serve within {START_SECONDS} s")
            time.sleep(0.1)


def check_models(client):
    models = client.models.list().data
    check(len(models) == 1, f"{len(models)} models listed")
    check(client.models.retrieve(models[0].id).id == models[0].id, "models.retrieve gives another model")
    return models[0].id


QUESTION = [{"role": "user", "content": "Hello, who are you?"}]


def check_chat(client, model):
    answer = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_completion_tokens=64)
    choice = answer.choices[0]
    check(choice.message.role == "assistant", "role")
    check(choice.finish_reason in ("stop", "length"), f"finish_reason {choice.finish_reason}")
    check(answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens, "usage does not add up")
    check(answer.usage.prompt_tokens_details.cached_tokens >= 0, "no cached_tokens")
    return answer


def check_streamed_chat(client, model, whole):
    stream = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_completion_tokens=64,
                                            stream=True, stream_options={"include_usage": True})
    content, reasoning, finish, usage = "", "", None, None
    for chunk in stream:
        check(chunk.object == "chat.completion.chunk", f"object {chunk.object}")
        usage = chunk.usage or usage
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            finish = choice.finish_reason or finish
    expected = whole.choices[0]
    check(content == (expected.message.content or ""), "streamed content differs from the whole answer")
    check(reasoning == (getattr(expected.message, "reasoning_content", None) or ""), "streamed reasoning differs")
    check(finish == expected.finish_reason, "streamed finish_reason differs")
    check(usage is not None and usage.completion_tokens == whole.usage.completion_tokens, "streamed usage differs")


def check_streamed_tools(client, model):
    request = next(r for r in golden_requests() if r["expected_calls"])
    common = {"model": model, "messages": request["messages"], "tools": request["tools"], "temperature": 0,
              "tool_choice": "required"}
    whole = client.chat.completions.create(**common, max_completion_tokens=256).choices[0]
    check(whole.finish_reason == "tool_calls" and whole.message.tool_calls, "tool_choice required gives no call")
    calls = {}
    for chunk in client.chat.completions.create(**common, max_completion_tokens=256, stream=True):
        for delta in chunk.choices[0].delta.tool_calls or []:
            call = calls.setdefault(delta.index, {"id": None, "name": "", "arguments": ""})
            call["id"] = delta.id or call["id"]
            call["name"] += delta.function.name or ""
            call["arguments"] += delta.function.arguments or ""
    check(len(calls) == len(whole.message.tool_calls), "streamed calls differ in number")
    for index, call in enumerate(whole.message.tool_calls):
        check(calls[index]["id"], "a streamed call has no id")
        check(calls[index]["name"] == call.function.name, "streamed name differs")
        check(json.loads(calls[index]["arguments"]) == json.loads(call.function.arguments), "streamed arguments differ")


def check_errors(client, model):
    def expect(kind, param, call):
        try:
            call()
        except kind as error:
            check(error.param == param, f"{kind.__name__}: param {error.param}, not {param}")
            check(error.message, f"{kind.__name__} without a message")
            return
        raise CheckFailed(f"no {kind.__name__}")

    create = client.chat.completions.create
    expect(openai.NotFoundError, "model", lambda: create(model="no-such-model", messages=QUESTION))
    expect(openai.BadRequestError, "temperature", lambda: create(model=model, messages=QUESTION, temperature=-1))
    expect(openai.BadRequestError, "messages", lambda: create(model=model, messages=[]))
    expect(openai.BadRequestError, "messages[0].role",
           lambda: create(model=model, messages=[{"role": "nobody", "content": "a"}]))
    expect(openai.BadRequestError, "max_tokens", lambda: create(model=model, messages=QUESTION, max_tokens=10**9))
    expect(openai.BadRequestError, "logprobs", lambda: client.completions.create(model=model, prompt="a", logprobs=21))


def check_completions(client, model):
    whole = client.completions.create(model=model, prompt="Hello", temperature=0, max_tokens=8, logprobs=2, echo=True)
    check(whole.choices[0].text.startswith("Hello"), "echo")
    check(len(whole.choices[0].logprobs.tokens) == len(whole.choices[0].logprobs.top_logprobs), "logprobs")
    text = ""
    for chunk in client.completions.create(model=model, prompt="Hello", temperature=0, max_tokens=8, echo=True, stream=True):
        text += chunk.choices[0].text
    check(text == whole.choices[0].text, "streamed completion differs")


def made_calls(message):
    return [[call.function.name, json.loads(call.function.arguments)] for call in message.tool_calls or []]


async def golden_calls(base_url, model):
    """Returns how many answers make exactly the expected calls, and how many prompts have another length."""
    client = openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=600)
    gate = asyncio.Semaphore(CONCURRENCY)

    async def one(request):
        async with gate:
            tools = {"tools": request["tools"]} if request["tools"] else {}
            answer = await client.chat.completions.create(
                model=model, messages=request["messages"], temperature=0, max_completion_tokens=MAX_TOKENS, **tools,
                extra_body={"chat_template_kwargs": request["chat_template_kwargs"]})
        exact = made_calls(answer.choices[0].message) == request["expected_calls"]
        return exact, answer.usage.prompt_tokens == request["prompt_tokens"]

    results = await asyncio.gather(*(one(request) for request in golden_requests()))
    return sum(exact for exact, _ in results), sum(not right for _, right in results), len(results)


def run(base_url):
    client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=600)
    model = check_models(client)
    whole = check_chat(client, model)
    check_streamed_chat(client, model, whole)
    check_streamed_tools(client, model)
    check_completions(client, model)
    check_errors(client, model)
    start = time.monotonic()
    exact, wrong_lengths, total = asyncio.run(golden_calls(base_url, model))
    seconds = time.monotonic() - start
    share = exact / total
    check(wrong_lengths == 0, f"{wrong_lengths} of {total} prompts have other prompt_tokens than expected")
    check(share >= MIN_EXACT_SHARE, f"only {exact} of {total} answers make the expected calls")
    return f"{exact}/{total} calls exact ({share:.1%}), all prompt_tokens right, {seconds:.1f} s"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1", help="of a running server (default %(default)s)")
    parser.add_argument("--binary", help="a tokenspeed program to start with models/demo, instead of --base-url")
    arguments = parser.parse_args()
    process, base_url = None, arguments.base_url
    if arguments.binary:
        process, base_url = start_server(arguments.binary)
    try:
        print(f"openai {openai.__version__}: ok: {run(base_url)}")
    except (CheckFailed, openai.OpenAIError) as error:
        print(f"openai {openai.__version__}: FAILED: {type(error).__name__}: {error}")
        return 1
    finally:
        if process:
            process.terminate()
            process.wait(timeout=30)
    return 0


if __name__ == "__main__":
    sys.exit(main())
