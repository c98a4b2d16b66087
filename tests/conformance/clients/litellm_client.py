"""LiteLLM as a client: `litellm_client.py MODEL KEY URL...` writes what it makes of each URL, as JSON, a line each."""

import asyncio
import json
import os
import sys
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it fetches its price list otherwise

import litellm
import openai

ASK = [{"role": "user", "content": "Grüezi, what's up?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def told(reply: Any) -> Any:
    return json.loads(reply.model_dump_json())


def text(chunks: list[Any]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


async def asynchronous(way: dict[str, Any]) -> Any:
    plain = await litellm.acompletion(messages=ASK, **way)
    stream = await litellm.acompletion(messages=ASK, stream=True, **way)
    return told(plain), text([chunk async for chunk in stream])


def refusals(way: dict[str, Any]) -> Any:
    found = []
    for status in (400, 401, 404, 429, 500, 503):
        try:
            litellm.completion(messages=[{"role": "user", "content": f"please fail: {status}"}], **way)
        except openai.OpenAIError as error:
            found.append((type(error).__name__, getattr(error, "status_code", None), str(error)))
    assert len(found) == 6
    return found


def results(runner: asyncio.Runner, model: str, key: str, url: str) -> dict[str, Any]:
    way = {"model": f"openai/{model}", "api_base": url, "api_key": key, "num_retries": 0, "max_retries": 0}
    plain = litellm.completion(messages=ASK, **way)
    chunks = list(litellm.completion(messages=ASK, stream=True, stream_options={"include_usage": True}, **way))
    assert plain.choices[0].message.content == text(chunks) == "?pu s'tahw ,izeürG — ✓"
    tools = litellm.completion(messages=ASK, tools=[WEATHER], **way)
    calls = tools.choices[0].message.tool_calls
    assert [call.function.name for call in calls] == ["weather"]
    rebuilt = litellm.stream_chunk_builder(list(litellm.completion(messages=ASK, tools=[WEATHER], stream=True, **way)))
    assert rebuilt.choices[0].message.tool_calls[0].function.arguments == calls[0].function.arguments
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    form = {"type": "json_schema", "json_schema": {"name": "trip", "schema": schema}}
    responses = litellm.responses(input="Hello", **way)
    return {
        "plain": told(plain),
        "streamed": [chunk.choices[0].delta.content for chunk in chunks],
        "tools": told(tools),
        "structured": told(litellm.completion(messages=ASK, response_format=form, **way)),
        "async": runner.run(asynchronous(way)),
        "completions": litellm.text_completion(prompt="one", **way).choices[0].text,
        "embeddings": told(litellm.embedding(input=["a", "b"], **way))["data"],
        "responses": told(responses)["output"],
        "responses, streamed": [event.type for event in litellm.responses(input="Hello", stream=True, **way)],
        "errors": refusals(way),
    }


if __name__ == "__main__":
    with asyncio.Runner() as runner:
        for url in sys.argv[3:]:
            print(json.dumps(results(runner, sys.argv[1], sys.argv[2], url), sort_keys=True))
