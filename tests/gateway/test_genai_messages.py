"""Messages as OpenTelemetry's conventions write them: of chat, completions and the responses API, and of nonsense."""

from typing import Any

import orjson
from hypothesis import given
from hypothesis import strategies as st

from gateway.genai_messages import content_of
from gateway.records import Exchange
from gateway.spans import spans_of, without_content

CALL = {"id": "c1", "type": "function", "function": {"name": "play", "arguments": '{"song": "x"}'}}
TOLD = {"type": "tool_call", "id": "c1", "name": "play", "arguments": '{"song": "x"}'}
SPOOLED = {"span": [1, "", "", None], "span_end": [1.0, [[0.5, "prod", "nim", "big", "h", 80, ""]]]}
WORDS = """
messages input prompt role content tool_calls function name arguments text type choices message finish_reason
output model id seed temperature instructions
"""
NAMES = st.sampled_from(WORDS.split())
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


def exchange(request: Any, response: Any, path: str = "/v1/chat/completions") -> Exchange:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    return Exchange(
        id="x", timestamp=0.0, workload_id="w", path=path, trace_id=trace_id, request=request, response=response
    )


def told(request: Any, response: Any) -> dict[str, Any]:
    return {name: orjson.loads(text) for name, text in content_of(exchange(request, response)).items()}


def test_a_chat_with_tools() -> None:
    """The system's part is apart; calls and their results are parts of their messages."""
    request = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Play"}, {"type": "image_url", "image_url": "u"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "done"},
        ]
    }
    response = {"choices": [{"message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}]}
    assert told(request, response) == {
        "gen_ai.system_instructions": [{"type": "text", "content": "Be brief."}],
        "gen_ai.input.messages": [
            {
                "role": "user",
                "parts": [{"type": "text", "content": "Play"}, {"type": "image_url", "image_url": "u"}],
            },
            {"role": "assistant", "parts": [TOLD]},
            {"role": "tool", "parts": [{"type": "tool_call_response", "id": "c1", "response": "done"}]},
        ],
        "gen_ai.output.messages": [
            {"role": "assistant", "parts": [{"type": "text", "content": "ok"}], "finish_reason": "stop"}
        ],
    }


def test_completions_and_embeddings() -> None:
    """What they are asked is one text, or several."""
    said = {"role": "user", "parts": [{"type": "text", "content": "Once"}]}
    found = told({"prompt": "Once"}, {"choices": [{"text": "upon", "finish_reason": "length"}]})
    assert found["gen_ai.input.messages"] == [said]
    (replied,) = found["gen_ai.output.messages"]
    assert (replied["parts"], replied["finish_reason"]) == ([{"type": "text", "content": "upon"}], "length")
    assert told({"input": ["Once", "Once"]}, None) == {"gen_ai.input.messages": [said, said]}


def test_the_responses_api() -> None:
    """Its items are messages, and calls beside them."""
    request = {"instructions": "Be brief.", "input": [{"role": "user", "content": "Play"}]}
    item = {"type": "function_call", "call_id": "c1", "name": "play", "arguments": '{"song": "x"}'}
    text = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "ok"}]}
    found = told(request, {"output": [item, text]})
    assert found["gen_ai.system_instructions"] == [{"type": "text", "content": "Be brief."}]
    assert [one["parts"] for one in found["gen_ai.output.messages"]] == [
        [TOLD],
        [{"type": "text", "content": "ok"}],
    ]


@given(
    request=st.dictionaries(NAMES, VALUE, max_size=4),
    response=st.dictionaries(NAMES, VALUE, max_size=4),
    path=st.sampled_from(["/v1/chat/completions", "/v1/responses"]),
)
def test_bodies_of_any_shape_make_spans(request: dict, response: dict, path: str) -> None:
    """Of values that a span can carry, and with nothing of what was said where it is not to be told."""
    made = exchange(request, response, path)
    for one, content in ((made, True), (without_content(made), False)):
        for span in spans_of(one, SPOOLED, content=content):
            for value in span.attributes.values():
                assert isinstance(value, str | bool | float | list) or -(2**63) <= value < 2**63


def test_what_is_nested_too_deep_is_left_out() -> None:
    """Rather than the whole batch."""
    deep: list = []
    for _ in range(300):
        deep = [deep]
    said = {"role": "user", "content": [{"type": "odd", "deep": deep}]}
    assert content_of(exchange({"messages": [said]}, None)) == {}
