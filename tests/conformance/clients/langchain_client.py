"""langchain-openai: `langchain_client.py MODEL KEY URL...` writes what it makes of each URL, as JSON, a line each."""

import asyncio
import json
import sys
from typing import Any

import openai
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

MESSAGES = [SystemMessage("Be brief."), HumanMessage("Grüezi, what's up?")]


class Trip(BaseModel):
    """A trip."""

    city: str
    days: int


class Weather(BaseModel):
    """The weather of a city."""

    city: str


def told(message: Any) -> Any:
    """A message without the id that langchain draws for a run."""
    return {k: v for k, v in message.model_dump(mode="json").items() if k != "id" or not str(v).startswith("lc_run")}


def merged(chunks: list[Any]) -> Any:
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    return whole


def with_tools(chat: ChatOpenAI) -> Any:
    bound = chat.bind_tools([Weather])
    asked = bound.invoke(MESSAGES)
    assert [call["name"] for call in asked.tool_calls] == ["Weather"]
    streamed = merged(list(bound.stream(MESSAGES)))
    assert streamed.tool_calls == asked.tool_calls, (streamed.tool_calls, asked.tool_calls)
    answer = bound.invoke([*MESSAGES, asked, ToolMessage("sunny", tool_call_id=asked.tool_calls[0]["id"])])
    return [told(asked), told(answer)]


async def asynchronous(chat: ChatOpenAI) -> Any:
    plain = await chat.ainvoke(MESSAGES)
    chunks = [chunk async for chunk in chat.astream(MESSAGES)]
    batch = await chat.abatch([[HumanMessage(f"number {n}")] for n in range(8)])
    return told(plain), [chunk.content for chunk in chunks], [one.content for one in batch]


def refusal(chat: ChatOpenAI) -> Any:
    try:
        chat.invoke("please fail: 429")
    except openai.OpenAIError as error:
        return type(error).__name__, str(error)
    raise AssertionError("no error")


def results(runner: asyncio.Runner, model: str, key: str, url: str) -> dict[str, Any]:
    chat = ChatOpenAI(model=model, api_key=key, base_url=url, max_retries=0, stream_usage=True)
    typed = ChatOpenAI(model=model, api_key=key, base_url=url, max_retries=0, use_responses_api=True)
    embeddings = OpenAIEmbeddings(model=model, api_key=key, base_url=url, check_embedding_ctx_length=False)
    plain = chat.invoke(MESSAGES)
    chunks = list(chat.stream(MESSAGES))
    assert plain.content == merged(chunks).content == "?pu s'tahw ,izeürG — ✓"
    assert merged(chunks).usage_metadata == plain.usage_metadata
    trip = chat.with_structured_output(Trip).invoke(MESSAGES)
    assert trip == Trip(city="Zürich", days=7)
    return {
        "plain": told(plain),
        "streamed": [chunk.content for chunk in chunks],
        "tools": with_tools(chat),
        "structured": trip.model_dump(),
        "structured by a tool": chat.with_structured_output(Trip, method="function_calling").invoke(MESSAGES).days,
        "async": runner.run(asynchronous(chat)),
        "embeddings": embeddings.embed_documents(["a", "b"]),
        "responses": told(typed.invoke(MESSAGES)),
        "responses, streamed": merged(list(typed.stream(MESSAGES))).content,
        "an error": refusal(chat),
    }


if __name__ == "__main__":
    with asyncio.Runner() as runner:
        for url in sys.argv[3:]:
            print(json.dumps(results(runner, sys.argv[1], sys.argv[2], url), sort_keys=True))
