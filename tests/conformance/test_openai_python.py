"""OpenAI's Python client: what it makes of the gateway's answers is what it makes of the upstream's own."""

import asyncio
import base64
from collections.abc import Awaitable, Callable
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from gateway.records import Outcome
from tests.conformance.answers import MODEL
from tests.conformance.conftest import Ways
from tests.conformance.upstream import KEY

ASK: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüezi, what's up?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
FLAT: Any = {"type": "function", **WEATHER["function"]}
Case = Callable[[AsyncOpenAI], Awaitable[Any]]


class Trip(BaseModel):
    """A structured answer."""

    city: str
    days: int
    stops: list[str]


async def plain(client: AsyncOpenAI) -> Any:
    done = await client.chat.completions.create(
        model=MODEL, messages=ASK, temperature=0.5, user="u1", metadata={"a": "b"}
    )
    assert done.choices[0].message.content == "?pu s'tahw ,izeürG — ✓"
    return done, done._request_id


async def several_choices(client: AsyncOpenAI) -> Any:
    done = await client.chat.completions.create(model=MODEL, messages=ASK, n=3, seed=1, stop=["\n"])
    assert len(done.choices) == 3
    return done


async def image_as_data_url(client: AsyncOpenAI) -> Any:
    url = f"data:image/png;base64,{base64.b64encode(bytes(range(256)) * 400).decode()}"
    parts: Any = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": url}}]
    return await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": parts}])


async def streamed(client: AsyncOpenAI) -> Any:
    options: Any = {"include_usage": True}
    stream = await client.chat.completions.create(model=MODEL, messages=ASK, stream=True, stream_options=options)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "?pu s'tahw ,izeürG — ✓"
    assert chunks[-1].usage is not None
    return chunks


async def stream_of_events(client: AsyncOpenAI) -> Any:
    """The client's own assembling of a stream."""
    async with client.chat.completions.stream(model=MODEL, messages=ASK, tools=[WEATHER]) as stream:
        events = [(event.type, repr(event)) async for event in stream]
        final = await stream.get_final_completion()
    assert final.choices[0].message.tool_calls is not None
    return events, final


async def tools(client: AsyncOpenAI) -> Any:
    """Two calls, and an answer to their results."""
    first = await client.chat.completions.create(
        model=MODEL, messages=ASK, tools=[WEATHER, CLOCK], tool_choice="auto", parallel_tool_calls=True
    )
    calls = first.choices[0].message.tool_calls
    assert calls is not None
    assert [call.function.name for call in calls if call.type == "function"] == ["weather", "clock"]
    said = first.choices[0].message.model_dump(exclude_none=True)
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in calls]
    second = await client.chat.completions.create(model=MODEL, messages=[*ASK, said, *results], tools=[WEATHER, CLOCK])
    assert second.choices[0].message.content == "ynnus — ✓"
    return first, second


async def structured(client: AsyncOpenAI) -> Any:
    done = await client.chat.completions.parse(model=MODEL, messages=ASK, response_format=Trip)
    assert done.choices[0].message.parsed == Trip(city="Zürich", days=7, stops=["Zürich"])
    return done


async def json_object(client: AsyncOpenAI) -> Any:
    return await client.chat.completions.create(model=MODEL, messages=ASK, response_format={"type": "json_object"})


async def raw_response(client: AsyncOpenAI) -> Any:
    got = await client.chat.completions.with_raw_response.create(model=MODEL, messages=ASK)
    limits = {name: value for name, value in got.headers.items() if name.startswith(("x-ratelimit", "openai-"))}
    assert limits["x-ratelimit-remaining-requests"] == "59"
    return got.status_code, got.content, limits, got.headers["content-type"]


async def completions(client: AsyncOpenAI) -> Any:
    whole = await client.completions.create(model=MODEL, prompt=["one", "two"], max_tokens=5)
    stream = await client.completions.create(model=MODEL, prompt="one", stream=True)
    return whole, [chunk async for chunk in stream]


async def embeddings(client: AsyncOpenAI) -> Any:
    """As base64, which is the client's own choice, and as numbers."""
    packed = await client.embeddings.create(model=MODEL, input=["a", "b"])
    plain = await client.embeddings.create(model=MODEL, input="a", encoding_format="float", dimensions=4)
    assert len(packed.data[1].embedding) == 8
    return packed, plain


async def responses(client: AsyncOpenAI) -> Any:
    """Made, gone on from, fetched, deleted: its state is the upstream's."""
    first = await client.responses.create(model=MODEL, input="Hello", instructions="Be brief.")
    second = await client.responses.create(model=MODEL, input="And?", previous_response_id=first.id)
    fetched = await client.responses.retrieve(second.id)
    await client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(second.id)
    assert (first.output_text, fetched.id) == ("olleH — ✓", second.id)
    return first, second, fetched


async def responses_streamed(client: AsyncOpenAI) -> Any:
    stream = await client.responses.create(model=MODEL, input="Hello", stream=True)
    events = [event async for event in stream]
    assert events[-1].type == "response.completed"
    async with client.responses.stream(model=MODEL, input="Hello", tools=[FLAT]) as typed:
        kinds = [event.type async for event in typed]
        final = await typed.get_final_response()
    return events, kinds, final


async def responses_structured(client: AsyncOpenAI) -> Any:
    done = await client.responses.parse(model=MODEL, input="A trip", text_format=Trip)
    assert done.output_parsed == Trip(city="Zürich", days=7, stops=["Zürich"])
    return done


async def files(client: AsyncOpenAI) -> Any:
    content = bytes(range(256)) * 3000
    made = await client.files.create(file=("größe.bin", content), purpose="batch")
    listed = [one async for one in client.files.list(purpose="batch")]
    fetched = await client.files.retrieve(made.id)
    body = await client.files.content(made.id)
    gone = await client.files.delete(made.id)
    assert (body.content, made.filename, gone.deleted) == (content, "größe.bin", True)
    return made, listed, fetched, gone


async def moderations(client: AsyncOpenAI) -> Any:
    return await client.moderations.create(input="text")


async def errors(client: AsyncOpenAI) -> Any:
    """Each status is the client's own exception, with body, code, parameter and headers."""
    found = []
    for status in (400, 401, 403, 404, 409, 422, 429, 500, 503):
        ask: Any = [{"role": "user", "content": f"please fail: {status}"}]
        for more in ({}, {"stream": True}):
            with pytest.raises(openai.APIStatusError) as caught:
                await client.chat.completions.create(model=MODEL, messages=ask, **more)
            error = caught.value
            known = {name: error.response.headers.get(name) for name in ("retry-after", "retry-after-ms")}
            found.append((type(error).__name__, str(error), error.body, error.code, error.param, known))
    with pytest.raises(openai.BadRequestError) as wrong:
        await client.chat.completions.create(model=MODEL, messages=[], extra_body={"unknown": 1})
    return found, wrong.value.body


async def with_a_wrong_key(client: AsyncOpenAI) -> Any:
    with pytest.raises(openai.AuthenticationError) as caught:
        await client.with_options(api_key="sk-wrong").chat.completions.create(model=MODEL, messages=ASK)
    return caught.value.body


async def retries(client: AsyncOpenAI) -> Any:
    """The client's own tries reach the upstream, each with its count."""
    with pytest.raises(openai.RateLimitError) as caught:
        await client.with_options(max_retries=1).chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "please fail: 429"}]
        )
    return caught.value.response.headers["x-request-digest"]


CASES = (
    plain, several_choices, image_as_data_url, streamed, stream_of_events, tools, structured, json_object, raw_response,
    completions, embeddings, responses, responses_streamed, responses_structured, files, moderations, errors,
    with_a_wrong_key, retries,
)  # fmt: skip


async def outcome(case: Case, url: str, ids: list[str] | None = None) -> tuple[list[str], Any]:
    """What a case comes to, and the digests of what the upstream got; `ids` takes the gateway's exchanges."""
    digests: list[str] = []

    async def seen(response: Any) -> None:
        digests.append(response.headers["x-request-digest"])
        if ids is not None:
            ids.append(response.headers["x-understudy-exchange-id"])

    http = openai.DefaultAsyncHttpxClient(event_hooks={"response": [seen]})
    async with AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0, http_client=http) as client:
        return digests, await case(client)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_async(ways: Ways, case: Case) -> None:
    """The client sends the same, gets the same, and every call is in the log."""
    ids: list[str] = []
    direct = asyncio.run(outcome(case, ways.direct))
    through = asyncio.run(outcome(case, ways.through, ids))
    assert through == direct
    assert len(through[0]) == len(ids) > 0


def test_sync(ways: Ways) -> None:
    """The synchronous client: plain, streamed, tools, structured, responses, embeddings, files."""
    found = []
    for url in (ways.direct, ways.through):
        with OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            stream = client.chat.completions.create(model=MODEL, messages=ASK, stream=True)
            file = client.files.create(file=("a.jsonl", b"{}\n"), purpose="batch")
            typed = client.responses.create(model=MODEL, input="Hello", stream=True)
            found.append(
                (
                    client.chat.completions.create(model=MODEL, messages=ASK),
                    list(stream),
                    client.chat.completions.create(model=MODEL, messages=ASK, tools=[WEATHER]),
                    client.chat.completions.parse(model=MODEL, messages=ASK, response_format=Trip),
                    list(typed),
                    client.embeddings.create(model=MODEL, input="a"),
                    file,
                    client.files.content(file.id).content,
                )
            )
    assert found[0] == found[1]


def test_models(ways: Ways) -> None:
    """The gateway's own: what routing.yaml names, not what the upstream lists."""
    with OpenAI(base_url=ways.through, api_key=KEY, max_retries=0) as client:
        listed = client.models.list().data
        one = client.models.retrieve(MODEL)
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve("gpt-nothing")
    assert [model.id for model in listed] == [MODEL]
    assert one == listed[0]
    assert one.model_extra is not None
    assert one.model_extra["x-understudy"]["parts"] == [{"workload": "default", "as": "incumbent", "share": 100}]
    assert caught.value.code == "model_not_found"


def test_streams_are_logged_as_plain_calls_are(ways: Ways) -> None:
    """What the log assembles of a stream is the message that the same call has without one."""
    ids: list[str] = []

    async def both(client: AsyncOpenAI) -> None:
        for more in ({}, {"tools": [WEATHER, CLOCK]}, {"response_format": {"type": "json_object"}}):
            await client.chat.completions.create(model=MODEL, messages=ASK, **more)
            async with await client.chat.completions.create(model=MODEL, messages=ASK, stream=True, **more) as stream:
                assert [chunk async for chunk in stream]
        await client.responses.create(model=MODEL, input="Hello")
        async with await client.responses.create(model=MODEL, input="Hello", stream=True) as stream:
            assert [event async for event in stream]

    asyncio.run(outcome(both, ways.through, ids))
    logged = ways.logged(*ids)
    assert {exchange.outcome for exchange in logged} == {Outcome.OK}
    for plain_one, streamed_one in zip(logged[::2], logged[1::2], strict=True):
        assert not plain_one.stream
        assert streamed_one.stream
        assert said(streamed_one.response) == said(plain_one.response)


def said(response: Any) -> Any:
    """The part of a logged reply that a stream can tell."""
    if "output" in response:
        return [{k: v for k, v in item.items() if k != "id"} for item in response["output"]]
    return [
        {k: choice["message"].get(k) for k in ("role", "content", "tool_calls")} | {"end": choice["finish_reason"]}
        for choice in response["choices"]
    ]
