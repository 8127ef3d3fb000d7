"""Renders public conversations and tool lists with Jinja2: render_oracle.py DATA_DIR OUTPUT.

Writes two lines for each case: the request as JSON, and the prompt as a JSON string (null where the template raises).
"""
import copy
import glob
import json
import sys

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment():
    result = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    result.filters["tojson"] = to_json
    result.globals["raise_exception"] = raise_exception
    return result


def parse_arguments(messages):
    for message in messages:
        for call in message.get("tool_calls") or []:
            if isinstance(call["function"]["arguments"], str):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return messages


def requests(data):
    with open(data + "/tau-bench/airline_trajectories.json", encoding="utf-8") as file:
        for trajectory in json.load(file):
            messages = parse_arguments(copy.deepcopy(trajectory["traj"]))
            for end in range(1, len(messages) + 1):
                yield {"messages": messages[:end], "add_generation_prompt": end % 2 == 0}
            yield {"messages": messages, "add_generation_prompt": True, "enable_thinking": False}
    for path in sorted(glob.glob(data + "/bfcl-v4/*.json")):
        with open(path, encoding="utf-8") as file:
            for line in file:
                case = json.loads(line)
                tools = [{"type": "function", "function": function} for function in case.get("function", [])]
                for messages in case["question"]:
                    yield {"messages": messages, "tools": tools, "add_generation_prompt": True}


def main(data, output):
    with open(data + "/qwen3.5-397b-a17b/chat_template.jinja", encoding="utf-8") as file:
        template = environment().from_string(file.read())
    with open(output, "w", encoding="utf-8") as file:
        for request in requests(data):
            try:
                prompt = template.render(**request)
            except jinja2.exceptions.TemplateError:
                prompt = None
            file.write(json.dumps(request, ensure_ascii=False) + "\n" + json.dumps(prompt, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
