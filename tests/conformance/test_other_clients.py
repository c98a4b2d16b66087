"""LangChain, LiteLLM, OpenAI's client for Node: what each makes of the gateway is what it makes of the upstream."""

import json
from typing import Any

from tests.conformance.answers import MODEL
from tests.conformance.conftest import Ways
from tests.conformance.installed import SCRIPTS, installed, on_path, output
from tests.conformance.upstream import KEY


def results(ways: Ways, *command: str, **environment: str) -> dict[str, Any]:
    """What a client's script writes for the upstream and for the gateway, once it is known to be the same."""
    written = output(*command, MODEL, KEY, ways.direct, ways.through, **environment).splitlines()
    direct, through = (json.loads(line) for line in written if line.startswith("{"))
    assert through == direct
    return dict(direct)


def test_langchain(ways: Ways) -> None:
    """Plain, streamed, batches, tools, structured output in both ways, embeddings, the responses API, errors."""
    folder = installed("langchain-openai", "python")
    found = results(ways, f"{folder}/bin/python", str(SCRIPTS / "langchain_client.py"))
    assert found["structured"] == {"city": "Zürich", "days": 7}
    assert len(found["async"][2]) == 8


def test_litellm(ways: Ways) -> None:
    """Plain, streamed, tools, structured output, completions, embeddings, the responses API, errors as its own."""
    folder = installed("LiteLLM as a client", "python")
    found = results(ways, f"{folder}/bin/python", str(SCRIPTS / "litellm_client.py"))
    names = [name for name, _, _ in found["errors"]]
    assert (names[0], names[1], names[3]) == ("BadRequestError", "AuthenticationError", "RateLimitError")


def test_openai_for_node(ways: Ways) -> None:
    """Plain, streamed, the client's own assembling, tools, zod, responses, embeddings, files, errors, raw replies."""
    node = on_path("OpenAI's client for Node", "node")
    folder = installed("OpenAI's client for Node", "node")
    found = results(ways, node, str(SCRIPTS / "openai_client.mjs"), CLIENTS=str(folder))
    assert found["raw"][2] == "59"
    assert found["files"][2]["deleted"]
