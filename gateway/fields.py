"""What the gateway reads of one call's body, and what it knows of who sent it. Pure."""

from collections.abc import Mapping
from typing import Any

import msgspec

from gateway.errors import RequestRefused

__all__ = ["Fields", "Tags", "read_fields"]


class Fields(msgspec.Struct):
    """The fields of a request body that the gateway reads; what it does not read stays bytes."""

    model: Any = None
    stream: Any = None
    metadata: Any = None
    user: Any = None
    safety_identifier: Any = None
    previous_response_id: Any = None
    conversation: Any = None
    stream_options: msgspec.Raw = msgspec.Raw()
    tools: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    instructions: msgspec.Raw = msgspec.Raw()
    tensorzero_tags: Any = msgspec.field(default=None, name="tensorzero::tags")
    tensorzero_episode: Any = msgspec.field(default=None, name="tensorzero::episode_id")


class Tags(msgspec.Struct, frozen=True, kw_only=True):
    """Who sent a call and what it belongs to; "" where nothing says so."""

    workload: str
    client: str
    session: str
    user: str
    metadata: Mapping[str, str]


_fields = msgspec.json.Decoder(Fields)


def read_fields(body: bytes) -> Fields:
    """Parse a request body once. Raises RequestRefused (400) when it is not a JSON object, in UTF-8."""
    try:
        fields = _fields.decode(body)
        if not body.isascii():
            body.decode()  # what stays bytes in `fields` has not been looked at
    except msgspec.ValidationError as error:
        raise RequestRefused(400, f"the request body must be a JSON object: {error}", code="invalid_json") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestRefused(400, f"the request body is not JSON: {error}", code="invalid_json") from error
    return fields
