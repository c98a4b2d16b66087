"""An exchange as one JSON document and back: how Elasticsearch and JSONL files hold it."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final

import orjson

from gateway.records import Arm, Attempt, Exchange, MirrorFate, Outcome, Usage

__all__ = ["from_document", "to_document"]

_FIELDS: Final = tuple(field.name for field in fields(Exchange))


def to_document(exchange: Exchange) -> bytes:
    """All fields under their own names. Raises TypeError for text or numbers that JSON has no place for."""
    return orjson.dumps(exchange)


def from_document(document: Mapping[str, Any]) -> Exchange:
    """The exchange again; fields that this version doesn't know are passed over.

    Raises KeyError, TypeError or ValueError for a document that is none.
    """
    values = {name: document[name] for name in _FIELDS if name in document}
    usage = values.get("usage")
    return Exchange(
        **values
        | {
            "arm": Arm(document["arm"]),
            "outcome": Outcome(document["outcome"]),
            "mirror": MirrorFate(document["mirror"]),
            "usage": Usage(**usage) if usage is not None else None,
            "attempts": tuple(Attempt(**attempt) for attempt in document["attempts"]),
        }
    )
