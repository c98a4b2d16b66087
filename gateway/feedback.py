"""Feedback about exchanges: read from a request's body, as a frame of the spool, and read from that again. Pure."""

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import fields, replace
from typing import Annotated, Any, Final, Literal

import msgspec
import orjson

from gateway.errors import CannotRedact, RequestRefused
from gateway.fields import Fields
from gateway.ids import time_of
from gateway.records import Feedback
from gateway.redact import Redactor
from gateway.spool import PIECE, Kind
from gateway.tagging import tag
from gateway.tail import Record
from routing.targets import Privacy, RouteTable

__all__ = ["MAX_BODY", "frame_of", "privacy_of", "read_feedback", "readable", "redact_feedback"]

MAX_BODY: Final = PIECE
"""Bytes of a request: what is said fits one frame of the spool."""
_DAY: Final = 86_400
_WORDS: Final = {"up": 1.0, "down": -1.0}
_UUID7: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", re.ASCII)
_SIGNAL: Final = re.compile(r"[a-z][a-z0-9_.-]{0,63}", re.ASCII)
_YEAR_10000: Final = 253_402_300_800.0
_IN_BODY: Final = ("correction", "comment")
_IN_HEADER: Final = tuple(field.name for field in fields(Feedback) if field.name not in _IN_BODY)
_STRICTEST: Final = ("drop", "mask", "off")


class _Body(msgspec.Struct, forbid_unknown_fields=True):
    exchange_id: str
    rating: Literal["up", "down"] | Annotated[float, msgspec.Meta(ge=-1, le=1)] | None = None
    correction: Any = None
    comment: Annotated[str, msgspec.Meta(max_length=10_000)] | None = None
    signal: str | None = None
    client_id: str | None = None
    workload_id: str | None = None


_body = msgspec.json.Decoder(_Body)


def read_feedback(body: bytes, headers: Mapping[str, str], identifier: str, now: float) -> Feedback:
    """What a request's body says; headers win over it. `headers` has lower-case names, `now` is in epoch seconds.

    Raises RequestRefused (400), which names the field.
    """
    try:
        said = _body.decode(body)
        if said.correction is not None:
            orjson.dumps([said.correction])
    except msgspec.ValidationError as error:
        raise _wrong(*_where(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestRefused(400, f"the request body is not JSON: {error}", code="invalid_json") from error
    except TypeError as error:
        told = "nested deeper than 250 levels, a number beyond 64 bits, or text that is no Unicode"
        raise _wrong("correction", told) from error
    exchange_id = said.exchange_id.lower()
    if not _is_id(exchange_id) or time_of(exchange_id) > now + _DAY:
        raise _wrong("exchange_id", "wants the x-understudy-exchange-id of the reply that it is about")
    if said.signal is not None and not _SIGNAL.fullmatch(said.signal):
        raise _wrong("signal", "wants a word of at most 64 characters a-z, 0-9, _ . - that begins with a letter")
    if said.rating is None and said.correction is None and not said.comment and not said.signal:
        raise _wrong(None, "says nothing: give at least one of rating, correction, comment and signal")
    given = {"client_id": said.client_id, "workload_id": said.workload_id}
    tags = tag(headers, Fields(metadata=given))
    return Feedback(
        id=identifier,
        timestamp=now,
        exchange_id=exchange_id,
        workload_id=tags.workload,
        client_id=tags.client,
        rating=_WORDS[said.rating] if isinstance(said.rating, str) else said.rating,
        correction=said.correction,
        comment=said.comment or "",
        signal=said.signal or "",
    )


def privacy_of(table: RouteTable, workload: str) -> Privacy:
    """The policy of the workload that feedback names; the strictest of all where it names none that is known.

    Whose an exchange was is known to the log alone, and the log may not have it yet.
    """
    if workload in table.plans:
        return table.route_of(workload).privacy
    policies = [route.privacy for route in table.every_route]
    early = any(policy.before_spool for policy in policies)
    return Privacy(
        pii=min((policy.pii for policy in policies), key=_STRICTEST.index),
        redact="before_spool" if early else "before_store",
    )


def redact_feedback(feedback: Feedback, privacy: Privacy, redactor: Redactor) -> Feedback:
    """The feedback as it may be kept, with the counts in `redacted`. What cannot be searched is dropped."""
    if privacy.pii == "off":
        return feedback
    said = {name: value for name in _IN_BODY if (value := getattr(feedback, name)) is not None}
    kept: dict[str, Any] = {}
    counts = {"body": sum(value != "" for value in said.values())}
    if privacy.pii == "mask":
        with suppress(CannotRedact):
            kept, counts = redactor.mask(said)
    client = redactor.tag(feedback.client_id, counts)
    return replace(feedback, **{"correction": None, "comment": ""} | kept, client_id=client, redacted=counts)


def frame_of(feedback: Feedback, privacy: Privacy) -> tuple[dict[str, Any], bytes]:
    """The header and the body of its frame. `privacy` is what is still to be done before it is stored."""
    header = {name: getattr(feedback, name) for name in _IN_HEADER}
    header |= {"frame": Kind.FEEDBACK, "pii": "" if privacy.pii == "off" else privacy.pii}
    return header, orjson.dumps({name: getattr(feedback, name) for name in _IN_BODY})


def readable(
    records: Iterable[Record], redactor: Redactor, cover: Callable[[object, object], bool]
) -> tuple[list[Feedback], dict[str, str]]:
    """The feedback of the records as it may be stored, without forgotten clients'; why others are none, by id."""
    found: list[Feedback] = []
    wrong: dict[str, str] = {}
    for record in records:
        try:
            given = _of_record(record)
            privacy = Privacy(pii=record.header["pii"] or "off")
            kept = redact_feedback(given, privacy, redactor)
        except (ValueError, KeyError, TypeError) as error:
            wrong[str(record.header.get("id"))] = f"{type(error).__name__}: {error}"
            continue
        if not cover(given.client_id, given.timestamp) and not cover(kept.client_id, kept.timestamp):
            found.append(kept)
    return found, wrong


def _of_record(record: Record) -> Feedback:
    said = orjson.loads(record.request)
    feedback = Feedback(**{name: record.header[name] for name in _IN_HEADER}, **{name: said[name] for name in _IN_BODY})
    if not _is_id(feedback.exchange_id) or not _is_id(feedback.id):
        raise ValueError("its ids are no UUIDv7")
    return feedback


def _is_id(text: str) -> bool:
    """A UUIDv7 of a day that calendars have."""
    return _UUID7.fullmatch(text) is not None and time_of(text) < _YEAR_10000


def _where(error: msgspec.ValidationError) -> tuple[str | None, str]:
    """The field and what is wrong with it, from `Expected ... - at `$.field``."""
    what, _, where = str(error).partition(" - at `$.")
    return where.rstrip("`") or None, f"{what[:1].lower()}{what[1:]}"


def _wrong(param: str | None, told: str) -> RequestRefused:
    return RequestRefused(400, f"{param or 'the feedback'}: {told}", code="invalid_feedback", param=param)
