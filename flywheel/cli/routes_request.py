"""A request as it is given to `understudy routes explain`: headers on the command line, a body in a file."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import orjson

from gateway.errors import ConfigError
from gateway.records import JSON
from routing.matching import Asked
from routing.request import system_of, tools_of

__all__ = ["asked_of", "body_of", "headers_of", "user_of"]


def headers_of(given: Sequence[str]) -> dict[str, str]:
    """`name=value` as often as wanted; names in lower case. Raises ConfigError for anything else."""
    pairs = [text.partition("=") for text in given]
    for name, equals, _ in pairs:
        if not name or not equals:
            raise ConfigError(f"--header {name}: write it as name=value")
    return {name.strip().lower(): value for name, _, value in pairs}


def body_of(source: str | None) -> JSON:
    """The JSON object in a file, or in stdin where it is called -; empty for None. Raises ConfigError."""
    if source is None:
        return {}
    try:
        value = orjson.loads(sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes())
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror}") from error
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"{source}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{source}: a request's body is a JSON object")
    return value


def asked_of(path: str, headers: Mapping[str, str], metadata: Mapping[str, str], body: JSON) -> Asked:
    """What the gateway would read of such a request, by the same functions."""
    tools = tools_of(orjson.dumps(body.get("tools") or []))
    messages = body.get("messages") if "messages" in body else body.get("input")
    return Asked(
        headers=headers,
        metadata=metadata,
        model=str(body.get("model") or ""),
        path=path,
        client=headers.get("x-client-id") or metadata.get("client_id", ""),
        tools=tools.names,
        tools_fingerprint=tools.fingerprint,
        system=system_of(orjson.dumps(messages), orjson.dumps(body.get("instructions"))),
    )


def user_of(body: JSON, metadata: Mapping[str, str]) -> str:
    """The user that a body names, as the gateway reads it; "" for none."""
    user = body.get("user") or body.get("safety_identifier") or metadata.get("user_id")
    return user if isinstance(user, str) else ""
