"""Sample traffic for the flywheel's tests: a small weather-and-music workload whose right answers are plain to see."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gateway.records import Arm, Exchange, MirrorFate, Outcome

CITIES = ["Oslo", "Lima", "Cairo", "Quito", "Bern", "Accra", "Hanoi", "Sofia", "Riga", "Tunis"]
SONGS = ["Yesterday", "Imagine", "Hello", "Africa", "Creep", "Dreams", "Jolene", "Layla", "Vogue", "Yellow"]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": name,
            "parameters": {"type": "object", "properties": {argument: {"type": "string"}}},
        },
    }
    for name, argument in (("get_weather", "city"), ("play_music", "song"))
]


def call(name: str, arguments: Any) -> dict[str, Any]:
    """A response with one tool call; arguments that are not a text are dumped to JSON."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    function = {"name": name, "arguments": text}
    message = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": function}],
    }
    return {"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}


def says(text: str) -> dict[str, Any]:
    """A response in plain text."""
    message = {"role": "assistant", "content": text}
    return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}


def asks(text: str, **more: Any) -> dict[str, Any]:
    """A request with one user message, and both tools."""
    messages = [{"role": "system", "content": "Choose a tool."}, {"role": "user", "content": text}]
    return {"model": "prod", "messages": messages, "tools": TOOLS, **more}


def right_answer(text: str) -> dict[str, Any]:
    """What a perfect model replies to a text of `traffic`."""
    value = text.rsplit("#", 1)[-1]
    return call("get_weather", {"city": value}) if "weather" in text else call("play_music", {"song": value})


def live(number: int, text: str, response: dict[str, Any] | None = None, **more: Any) -> Exchange:
    """A client's exchange. Its id sorts by `number`, and its time is `number` seconds after 1,000,000."""
    values: dict[str, Any] = {
        "id": f"00000000-0000-7000-8000-{number:012d}",
        "timestamp": 1_000_000.0 + number,
        "workload_id": "desk",
        "model": "prod",
        "status": 200,
        "latency_ms": 100.0 + number % 50,
        "cost_usd": 0.001,
        "request": asks(text),
        "response": response if response is not None else right_answer(text),
    }
    return Exchange(**{**values, **more})


def mirror(number: int, of: Exchange, response: dict[str, Any] | None, **more: Any) -> Exchange:
    """The candidate's reply to a copy of `of`."""
    values: dict[str, Any] = {
        "id": f"00000000-0000-7000-9000-{number:012d}",
        "timestamp": of.timestamp + 0.5,
        "workload_id": of.workload_id,
        "model": "small:a1",
        "arm": Arm.MIRROR,
        "mirror_of": of.id,
        "rollout": of.rollout,
        "outcome": Outcome.OK if response is not None else Outcome.TIMEOUT,
        "latency_ms": 20.0,
        "request": of.request,
        "response": response,
    }
    return Exchange(**{**values, **more})


def traffic(count: int, **more: Any) -> Iterator[Exchange]:
    """`count` exchanges, each of a template of its own, half of them for each tool."""
    for number in range(count):
        word = "".join(chr(97 + int(digit)) for digit in str(number))
        if number % 2:
            text = f"weather {word} please #{CITIES[number % len(CITIES)]}"
        else:
            text = f"music {word} please #{SONGS[number % len(SONGS)]}"
        yield live(number, text, mirror=MirrorFate.NONE, **more)


def routing_yaml(path: Path, *, base_url: str, floor: float = 0.8, flywheel: str = "") -> Path:
    """Rules for the workload `desk`, with the candidate's base model `small` at `base_url`."""
    path.write_text(
        f"""
version: 1
models:
  prod: {{upstream: openai, base_url: "http://127.0.0.1:9/v1", model: prod}}
  small: {{upstream: vllm, base_url: "{base_url}", model: tiny, adapters: true, price: {{input: 1.0, output: 2.0}}}}
workloads:
  desk:
    match: {{header: {{x-workload-id: desk}}}}
    serve: prod
    rollout:
      steps: [{{mirror: 1.0, min_pairs: 20}}, {{weight: 50, min_exchanges: 10}}, {{weight: 100, min_exchanges: 10}}]
      gates:
        - {{metric: tool_name, prove: {{at_least: {floor}}}}}
        - {{metric: error_rate, guard: {{at_most: 0.05, min_samples: 10}}}}
      approval: auto
    flywheel: {{base_models: [small], min_records: 20, min_new_records: 50 {flywheel}}}
default: {{serve: prod}}
"""
    )
    return path
