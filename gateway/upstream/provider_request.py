"""A request in OpenAI's shape as arguments for litellm: what a client may say, and nothing else. Pure."""

from typing import Any, Final

import orjson

from gateway.errors import RequestRefused
from gateway.upstream import UpstreamRequest
from routing.targets import Model

__all__ = ["CHAT", "EMBEDDINGS", "arguments"]

CHAT: Final = "/chat/completions"
EMBEDDINGS: Final = "/embeddings"

# litellm takes addresses, keys, files and switches by the same way as a prompt: a client's body is let through by name.
_CHAT: Final = (
    "audio", "frequency_penalty", "function_call", "functions", "logit_bias", "logprobs", "max_completion_tokens",
    "max_tokens", "messages", "modalities", "n", "parallel_tool_calls", "prediction", "presence_penalty",
    "reasoning_effort", "response_format", "seed", "service_tier", "stop", "stream", "stream_options", "temperature",
    "thinking", "tool_choice", "tools", "top_k", "top_logprobs", "top_p", "user", "verbosity", "web_search_options",
)  # fmt: skip
_EMBEDDINGS: Final = ("dimensions", "encoding_format", "input", "user")
_KNOWN: Final = {CHAT: frozenset(_CHAT), EMBEDDINGS: frozenset(_EMBEDDINGS)}
_OURS: Final = frozenset(("metadata", "model", "prompt_cache_key", "safety_identifier", "store", "tags"))


def arguments(model: Model, request: UpstreamRequest) -> tuple[str, dict[str, Any]]:
    """Which of litellm's calls is meant, and its arguments. Raises RequestRefused for what no provider gets."""
    kind = request.path.partition("?")[0]
    if kind not in _KNOWN or request.method != "POST":
        raise RequestRefused(
            404,
            f"{model.name} is a provider's model, which is asked by /v1{CHAT} and /v1{EMBEDDINGS}, not by /v1{kind}",
            code="unsupported_path",
        )
    try:
        body: dict[str, Any] = orjson.loads(request.body)
    except orjson.JSONDecodeError as error:  # the gateway reads less of a body, and so lets more pass
        raise RequestRefused(
            400, f"the body is not JSON that can be translated: {error}", code="invalid_json"
        ) from error
    for name in body:
        if name not in _KNOWN[kind] and name not in _OURS and not name.startswith("tensorzero::"):
            raise RequestRefused(
                400, f"{model.name} is a provider's model, which takes no {name}", code="unknown_parameter", param=name
            )
    asked = dict(model.options) | {name: value for name, value in body.items() if name in _KNOWN[kind]}
    asked |= {"model": model.model, "max_retries": 0, "num_retries": 0, "no-log": True}
    if model.api_key is not None:
        asked["api_key"] = model.api_key
    if model.base_url:
        asked["api_base"] = model.base_url
    return kind, asked
