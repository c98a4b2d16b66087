"""The spans of a logged exchange, by OpenTelemetry's conventions for HTTP and generative AI. Pure.

One server span for the call and one client span for each try of a target; a mirror is a client span by itself, in a
trace of its own, that is linked to its original.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from gateway.genai_messages import content_of
from gateway.paths import RELAYED
from gateway.records import JSON, Arm, Exchange, Outcome
from gateway.tracing import SpooledEnd, SpooledTrace, SpooledTry

__all__ = ["OPERATIONS", "Span", "error_of", "provider_name", "spans_of", "without_content"]

OPERATIONS: Final = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
    "/v1/responses": "chat",
}
_ASKED: Final = {  # what is told of a request, under which name
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "max_tokens": "gen_ai.request.max_tokens",
    "max_completion_tokens": "gen_ai.request.max_tokens",
    "max_output_tokens": "gen_ai.request.max_tokens",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "seed": "gen_ai.request.seed",
}
_PROVIDERS: Final = {  # the conventions' names where litellm has others
    "azure": "azure.ai.openai",
    "azure_ai": "azure.ai.inference",
    "bedrock": "aws.bedrock",
    "gemini": "gcp.gemini",
    "mistral": "mistral_ai",
    "vertex_ai": "gcp.vertex_ai",
    "watsonx": "ibm.watsonx.ai",
    "xai": "x_ai",
}
_TEXT: Final = 256  # characters of a value that is no content

Value = str | bool | int | float | list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One span. Times are Unix nanoseconds. `error` is its error.type, "" where nothing failed; `told` says what did.

    `parent` is 0 at the root. `remote` says that the parent is another program's.
    """

    name: str
    kind: Literal["server", "client"]
    trace_id: int
    span_id: int
    parent: int = 0
    remote: bool = False
    state: str = ""
    started: int
    ended: int
    attributes: Mapping[str, Value]
    error: str = ""
    told: str = ""
    link: tuple[int, int] | None = None


def spans_of(exchange: Exchange, header: Mapping[str, Any], *, content: bool = False) -> list[Span]:
    """The spans of an exchange whose frame's header has `span`; none where it has not, for it was not sampled.

    `content` adds the messages. Raises TypeError or ValueError for a header that gateway.tracing did not write.
    """
    if "span" not in header:
        return []
    call = SpooledTrace(*header["span"])
    ended, tries = header.get("span_end") or (exchange.timestamp, ())
    end = SpooledEnd(ended, [SpooledTry(*one) for one in tries])
    method = header.get("method", "POST")
    link = (int(call.link[0], 16), call.link[1]) if call.link else None
    told = _told(exchange, header.get("provider", ""), end) | (content_of(exchange) if content else {})
    clients = [
        _client(exchange, method, call, end, number, told if exchange.arm is Arm.MIRROR else {}, link)
        for number, one in enumerate(end.tries)
        if one.cause != "shed"
    ]
    return clients if exchange.arm is Arm.MIRROR else [_server(exchange, method, call, end.ended, told), *clients]


def error_of(exchange: Exchange) -> str:
    """The error.type of a call: a status from 500 on, or the outcome; "" where gateway and upstream did well."""
    if exchange.outcome in (Outcome.OK, Outcome.UPSTREAM_ERROR, Outcome.REFUSED):
        return str(exchange.status) if exchange.status >= 500 else ""
    return str(exchange.outcome)


def provider_name(provider: str) -> str:
    """A provider as the conventions call it."""
    return _PROVIDERS.get(provider, provider)


def without_content(exchange: Exchange) -> Exchange:
    """The exchange with what is told of every call, and nothing of what was said."""
    request, response = exchange.request or {}, exchange.response or {}
    asked = {name: request[name] for name in ("model", *_ASKED) if isinstance(request.get(name), str | int | float)}
    replied: JSON = {name: response[name] for name in ("id", "model") if isinstance(response.get(name), str)}
    replied["choices"] = [{"finish_reason": reason} for reason in _reasons(response)]
    return replace(exchange, request=asked, response=replied)


def _server(exchange: Exchange, method: str, call: SpooledTrace, ended: float, told: dict[str, Value]) -> Span:
    known = exchange.path in RELAYED
    attributes: dict[str, Value] = {"http.request.method": method, "url.path": exchange.path[:_TEXT]}
    if known:
        attributes["http.route"] = exchange.path
    if exchange.status:
        attributes["http.response.status_code"] = exchange.status
    error = error_of(exchange)
    if error:
        attributes["error.type"] = error
    return Span(
        name=f"{method} {exchange.path}" if known else method,
        kind="server",
        trace_id=int(exchange.trace_id, 16),
        span_id=call.span_id,
        parent=int(call.parent or "0", 16),
        remote=bool(call.parent),
        state=call.state,
        started=_nanos(exchange.timestamp),
        ended=_nanos(max(ended, exchange.timestamp)),
        attributes=attributes | told,
        error=error,
        told=exchange.error[:_TEXT],
    )


def _client(
    exchange: Exchange,
    method: str,
    call: SpooledTrace,
    end: SpooledEnd,
    number: int,
    told: dict[str, Value],
    link: tuple[int, int] | None,
) -> Span:
    """One try. It failed where it has a cause; else it answered, and ended when the call did."""
    one, operation = end.tries[number], OPERATIONS.get(exchange.path)
    attempt = exchange.attempts[number] if number < len(exchange.attempts) else None
    ended = end.ended if attempt is None else one.started + attempt.latency_ms / 1000
    status = exchange.status if not one.cause else int(one.cause) if one.cause.isdigit() else 0
    mirror = exchange.arm is Arm.MIRROR
    attributes: dict[str, Value] = {
        "gen_ai.provider.name": provider_name(one.provider),
        "gen_ai.request.model": one.model,
        "http.request.method": method,
        "understudy.model": one.name,
        "understudy.arm": exchange.arm if attempt is None else attempt.arm,
    }
    if operation:
        attributes["gen_ai.operation.name"] = operation
    if one.host:  # not known where litellm asks a provider at its own address
        attributes |= {"server.address": one.host, "server.port": one.port}
    if status:
        attributes["http.response.status_code"] = status
    if number:
        attributes["http.request.resend_count"] = number
    if attempt is None and not one.cause and (model := _text(exchange.response, "model")):
        attributes["gen_ai.response.model"] = model
    error = one.cause or (str(status) if status >= 400 else error_of(exchange))
    if error:
        attributes["error.type"] = error
    return Span(
        name=f"{operation} {one.model}" if operation else method,
        kind="client",
        trace_id=int(exchange.trace_id, 16),
        span_id=call.span_id + number + 1,
        parent=0 if mirror else call.span_id,
        state=call.state,
        started=_nanos(one.started),
        ended=_nanos(max(ended, one.started)),
        attributes=told | attributes,
        error=error,
        told=(exchange.error if attempt is None else attempt.error)[:_TEXT],
        link=link,
    )


def _told(exchange: Exchange, provider: str, end: SpooledEnd) -> dict[str, Value]:
    """What the call's span says beside HTTP: the model's part, and the gateway's own."""
    own: dict[str, Value | None] = {
        "understudy.exchange_id": exchange.id,
        "understudy.workload_id": exchange.workload_id,
        "understudy.client_id": exchange.client_id,
        "understudy.model": exchange.model,
        "understudy.arm": exchange.arm,
        "understudy.outcome": exchange.outcome,
        "understudy.rollout": exchange.rollout,
        "understudy.config_snapshot": exchange.config_snapshot,
        "understudy.mirror_of": exchange.mirror_of,
        "understudy.breaker": exchange.breaker,
        "understudy.cost_usd": exchange.cost_usd,
        "gen_ai.conversation.id": exchange.session_id,
    }
    if exchange.path in OPERATIONS:
        if end.tries:  # of a request that is not kept, what went up
            own["gen_ai.request.model"] = end.tries[-1].model
        own |= {name: value for name, value in _genai(exchange, provider).items() if value not in ("", None)}
    return {name: value for name, value in own.items() if value not in ("", None)}


def _genai(exchange: Exchange, provider: str) -> dict[str, Value | None]:
    request, usage = exchange.request or {}, exchange.usage
    asked: dict[str, Value | None] = {
        told: request[name] for name, told in _ASKED.items() if _is_number(request.get(name))
    }
    if exchange.stream:
        asked["gen_ai.request.stream"] = True
    if exchange.stream and exchange.ttft_ms is not None:
        asked["gen_ai.response.time_to_first_chunk"] = exchange.ttft_ms / 1000
    return asked | {
        "gen_ai.operation.name": OPERATIONS[exchange.path],
        "gen_ai.provider.name": provider_name(provider),
        "gen_ai.request.model": _text(request, "model"),
        "gen_ai.response.model": _text(exchange.response, "model"),
        "gen_ai.response.id": _text(exchange.response, "id"),
        "gen_ai.response.finish_reasons": _reasons(exchange.response or {}) or None,
        "gen_ai.usage.input_tokens": None if usage is None else usage.input_tokens,
        "gen_ai.usage.output_tokens": None if usage is None else usage.output_tokens,
    }


def _reasons(response: JSON) -> list[str]:
    choices = response.get("choices")
    found = [one.get("finish_reason") for one in choices if isinstance(one, dict)] if isinstance(choices, list) else []
    return [reason[:_TEXT] for reason in found if isinstance(reason, str)]


def _text(body: JSON | None, name: str) -> str:
    value = (body or {}).get(name)
    return value[:_TEXT] if isinstance(value, str) else ""


def _is_number(value: Any) -> bool:
    """A number that a span can carry: JSON's may be any, and 64 bits hold less."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)


def _nanos(seconds: float) -> int:
    return int(seconds * 1e9)
