"""The stand-in for the production model, over a real socket."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
import uvicorn

from flywheel.demo import grammar, standin
from flywheel.demo.workload import Item, tool_json

WORKLOAD = grammar.generate(400, 7)
WRONG = standin.StandIn(WORKLOAD, wrong=0.04, seed=7)


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    """A client of a stand-in on a free port, without its latency."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(standin.create_app(WORKLOAD, latency_s=0.0), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}/v1") as connected:
        yield connected
    server.should_exit = True
    thread.join()
    listener.close()


def _right() -> Item:
    return next(item for item in WORKLOAD.items if not WRONG.is_wrong(item.text))


def _body(text: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": WORKLOAD.system_prompt}, {"role": "user", "content": text}]
    return {"model": "prod", "messages": messages, "tools": list(WORKLOAD.tools), **more}


def _events(response: httpx.Response) -> list[Any]:
    data = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert data[-1] == "[DONE]"
    return [json.loads(event) for event in data[:-1]]


def test_a_known_text_is_answered_with_its_call(client: httpx.Client) -> None:
    """The gold label's tool and arguments, in the shape of OpenAI's API, with a usage count."""
    item = _right()

    reply = client.post("/chat/completions", json=_body(item.text)).json()

    choice = reply["choices"][0]
    call = choice["message"]["tool_calls"][0]
    assert (reply["object"], reply["model"], choice["finish_reason"]) == ("chat.completion", "prod", "tool_calls")
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == (item.tool, item.arguments)
    usage = reply["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0


def test_arguments_come_in_the_order_of_the_schema() -> None:
    """Whatever order the data has them in, as from a server that holds its replies to the schema."""
    tool = tool_json("book", "", ["city", "day", "guests"])
    item = Item(text="two in Oslo", tool="book", arguments={"guests": "two", "city": "Oslo"}, template="")
    workload = replace(WORKLOAD, tools=(tool,), items=(item,))
    body = {"messages": [{"role": "user", "content": "two in Oslo"}], "tools": [tool]}
    reply = standin.StandIn(workload, wrong=0.0, seed=7).answer(body)
    assert reply.arguments == '{"city": "Oslo", "guests": "two"}'


def test_the_stream_carries_the_same_call_in_pieces(client: httpx.Client) -> None:
    """Role first, then the call with its arguments over several events, the reason, the usage, and the end."""
    item = _right()

    body = _body(item.text, stream=True, stream_options={"include_usage": True})
    response = client.post("/chat/completions", json=body)

    assert response.headers["content-type"].startswith("text/event-stream")
    events = _events(response)
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    calls = [call for e in events for c in e["choices"] for call in c["delta"].get("tool_calls", [])]
    assert calls[0]["function"]["name"] == item.tool
    assert len(calls) > 2
    assert json.loads("".join(call["function"]["arguments"] for call in calls)) == item.arguments
    assert events[-2]["choices"][0]["finish_reason"] == "tool_calls"
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["total_tokens"] > 0


def test_usage_is_streamed_only_on_request(client: httpx.Client) -> None:
    """As the API has it."""
    events = _events(client.post("/chat/completions", json=_body(_right().text, stream=True)))

    assert all("usage" not in event for event in events)


def test_an_unknown_text_gets_a_plain_answer(client: httpx.Client) -> None:
    """No tool call, streamed or not, and it says what answers."""
    message = client.post("/chat/completions", json=_body("What is love?")).json()["choices"][0]["message"]
    events = _events(client.post("/chat/completions", json=_body("What is love?", stream=True)))

    streamed = "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
    assert "tool_calls" not in message
    assert "stand-in" in message["content"]
    assert streamed == message["content"]


def test_tools_that_were_not_offered_are_not_called(client: httpx.Client) -> None:
    """Without tools, or with tool_choice none, a model cannot call one."""
    for body in (_body(_right().text, tools=[]), _body(_right().text, tool_choice="none")):
        assert client.post("/chat/completions", json=body).json()["choices"][0]["finish_reason"] == "stop"


def test_some_texts_get_a_wrong_tool_always() -> None:
    """About the share asked for, the same ones each time, with arguments that the wrong tool takes."""
    names = {t["function"]["name"]: set(t["function"]["parameters"]["properties"]) for t in WORKLOAD.tools}
    wrong = [item for item in WORKLOAD.items if WRONG.is_wrong(item.text)]

    assert 0.02 < len(wrong) / len(WORKLOAD.items) < 0.06
    for item in wrong:
        reply = WRONG.answer(_body(item.text))
        assert reply == WRONG.answer(_body(item.text))
        assert reply.tool not in (None, item.tool)
        assert set(json.loads(reply.arguments)) == names[str(reply.tool)]


def test_content_parts_are_read_as_one_text(client: httpx.Client) -> None:
    """Clients may send the user's text in parts."""
    item = _right()
    body = _body("")
    body["messages"][1]["content"] = [{"type": "text", "text": item.text}]

    choice = client.post("/chat/completions", json=body).json()["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == item.tool


@pytest.mark.parametrize("body", ["{", "[]", "{}", '{"messages": []}', '{"messages": [{}], "tools": [1]}'])
def test_a_bad_request_gets_openais_error(client: httpx.Client, body: str) -> None:
    """Status 400 with a message that says what is wrong."""
    response = client.post("/chat/completions", content=body)

    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert response.json()["error"]["message"]


def test_it_calls_itself_a_stand_in(client: httpx.Client) -> None:
    """Nobody should take it for a model."""
    assert client.get("/models").json()["data"][0]["owned_by"] == "stand-in"
    assert client.post("/chat/completions", json=_body("x")).json()["system_fingerprint"] == "stand-in"


def test_data_that_cannot_be_used_ends_it(capsys: pytest.CaptureFixture[str]) -> None:
    """One clear line, exit code 2."""
    assert standin.main(["--data", "/nowhere.jsonl", "--port", "1"]) == 2
    assert capsys.readouterr().err.startswith("stand-in: /nowhere.jsonl: cannot be read")
