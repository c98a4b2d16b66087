"""How long masking takes: `python -m tests.bench.bench_redact` prints microseconds for exchanges of about 4 KB."""

import time
from typing import Any

import orjson

from gateway.recognise import suspicious
from gateway.records import JSON, Exchange
from gateway.redact import Redactor

REPEATS, ROUNDS = 50, 20

PROSE = (
    "Thank you for waiting. The parcel left our warehouse on 2026-03-14 and should be with you in three working days. "
    "Order 2024-118833 holds two items at 49.90 each; the invoice follows by post. If anything is missing, answer. "
)
TOOL: JSON = {
    "type": "function",
    "function": {
        "name": "look_up_order",
        "description": "Finds an order by its number and says where it is.",
        "parameters": {
            "type": "object",
            "properties": {"order_id": {"type": "string"}, "language": {"type": "string", "enum": ["en", "de"]}},
            "required": ["order_id"],
        },
    },
}


def exchange(personal: str, fill: int) -> Exchange:
    """A support conversation with tools; `personal` stands in the user's turn and in the reply's tool call."""
    arguments = orjson.dumps({"order_id": "2024-118833", "contact": personal}).decode()
    call = {"id": "call_8f2k1", "type": "function", "function": {"name": "look_up_order", "arguments": arguments}}
    request: JSON = {
        "model": "prod-70b",
        "temperature": 0.2,
        "messages": [
            {"role": "system", "content": PROSE * fill},
            {"role": "user", "content": f"Where is my order? {personal}"},
        ],
        "tools": [TOOL, TOOL],
    }
    message: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [call]}
    response: JSON = {
        "id": "chatcmpl-9f8a7c",
        "object": "chat.completion",
        "created": 1_732_188_000,
        "model": "prod-70b",
        "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}],
        "usage": {"prompt_tokens": 812, "completion_tokens": 31, "total_tokens": 843},
    }
    return Exchange(id="1", timestamp=0, workload_id="support", request=request, response=response)


def microseconds(redactor: Redactor, sample: Exchange) -> float:
    """The least CPU time of some rounds, each of `REPEATS` calls."""
    taken = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(REPEATS):
            redactor.redact_exchange(sample, "mask")
        taken.append((time.process_time() - start) / REPEATS * 1e6)
    return min(taken)


def main() -> None:
    plain = Redactor()
    own = Redactor({"employee": r"E-\d{6}", "project": r"(?i)project [a-z]+ \d+"})
    for name, personal in (
        ("nothing personal", "It was a gift."),
        ("an e-mail", "jane.doe@example.com"),
        (
            "five kinds",
            "jane.doe@example.com, +49 151 23456789, 4111 1111 1111 1111, DE89370400440532013000, 10.2.3.44",
        ),
    ):
        sample = exchange(personal, 10)
        size = len(orjson.dumps([sample.request, sample.response]))
        times = f"{microseconds(plain, sample):6.0f} us, with two own patterns {microseconds(own, sample):6.0f} us"
        print(f"{name:18} {size:5} bytes {times}")
    text = "".join(character for character in PROSE if not character.isdigit()) * 4000
    start = time.process_time()
    suspicious(text)
    print(f"prose with nothing in it: {len(text) / (time.process_time() - start) / 1e6:.0f} MB/s")


if __name__ == "__main__":
    main()
