"""Masks or drops personal data and secrets before an exchange is kept. Pure.

A mask is a pseudonym such as `<EMAIL_1>`: the same value has the same one everywhere inside one exchange, numbered as
the values appear. What is masked already is left alone, so that masking twice changes nothing more.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import count
from typing import Any, Final, Literal

import orjson

from gateway.assemble import assemble
from gateway.encodings import CannotUnpack, unpacked
from gateway.errors import CannotRedact, ConfigError
from gateway.recognise import BUILT_IN, KINDS, Recogniser, Span, suspicious
from gateway.records import JSON, Exchange
from routing.patterns import compile_re2

__all__ = ["Redacted", "Redactor"]

Mode = Literal["mask", "drop"]

_MASKED: Final = re.compile(r"<[A-Z][A-Z0-9_]*_[0-9a-f]{1,16}>")
_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,31}")
_DATA_URL: Final = re.compile(r";base64,([0-9A-Za-z+/_=-]+)")
_OPAQUE: Final = re.compile(r"[0-9A-Za-z+/_-]{512,}={0,2}")
# The strings and numbers of a JSON text, a string with the colon that makes it a key.
_TOKEN: Final = re.compile(r'("[^"\\]*+(?:\\.[^"\\]*+)*+")(\s*:)?|-?\d[\d.eE+-]*')
_ROUNDS: Final = 8  # a mask may lay bare what stuck to it; more than two rounds are not known to be needed
_KEYED: Final = 256  # the longest text that its key is read with, as "phone: 5551234"
_LARGEST: Final = 256 * 1024 * 1024  # bytes of a body once it is unpacked


@dataclass(frozen=True, slots=True, kw_only=True)
class Redacted:
    """Two bodies as plain JSON, whatever they were before, and how often each kind was masked in them."""

    request: bytes
    response: bytes
    counts: dict[str, int]


class Redactor:
    """Built once; knows the built-in kinds, own patterns by name, and foreign recognisers. Safe to share.

    Own patterns are RE2's: linear in the text, without lookaround and backreferences. `salt` keeps the pseudonyms of
    client and session ids, which are the same in every exchange, from being guessed. Raises ConfigError, naming the
    pattern, for one that cannot be used.
    """

    def __init__(
        self, patterns: Mapping[str, str] | None = None, recognisers: Sequence[Recogniser] = (), *, salt: str = ""
    ) -> None:
        own = [_Own(name, pattern) for name, pattern in (patterns or {}).items()]
        self._foreign: tuple[Recogniser, ...] = (*own, *recognisers)
        self._salt = salt.encode()

    def redact_exchange(self, exchange: Exchange, mode: Mode) -> Exchange:
        """The exchange as it may be stored, with the counts in `redacted`. Raises CannotRedact.

        Bodies are masked, or dropped and counted as `body`. Error texts are masked in both modes; so are client and
        session id, with pseudonyms that are the same in every exchange, so that a session stays together.
        """
        masking = _Masking(self)
        bodies = {"request": exchange.request, "response": exchange.response}
        dropped = sum(body is not None for body in bodies.values()) if mode == "drop" else 0
        errors = {"error": exchange.error, "attempts": [attempt.error for attempt in exchange.attempts]}
        kept = masking.values((bodies if mode == "mask" else dict.fromkeys(bodies)) | errors)
        attempts = zip(exchange.attempts, kept["attempts"], strict=True)
        counts = masking.counts | ({"body": dropped} if dropped else {})
        return replace(
            exchange,
            request=kept["request"],
            response=kept["response"],
            error=kept["error"],
            attempts=tuple(replace(attempt, error=error) for attempt, error in attempts),
            client_id=self.tag(exchange.client_id, counts),
            session_id=self.tag(exchange.session_id, counts),
            redacted=_summed(exchange.redacted, counts),
        )

    def redact_bytes(self, request: bytes, response: bytes, *, encoding: str = "") -> Redacted:
        """Both bodies masked, as JSON; of a stream, the reply that its events make up. Empty bytes stay empty.

        `encoding` is the reply's content-encoding; what is returned has none. Raises CannotRedact for bytes that are
        neither JSON nor a stream of it: nobody can say what is in them.
        """
        masking = _Masking(self)
        kept = masking.values({"request": _read(request), "response": _read(_unpacked(response, encoding))})
        return Redacted(
            request=orjson.dumps(kept["request"]) if request else b"",
            response=orjson.dumps(kept["response"]) if response else b"",
            counts=masking.counts,
        )

    def mask(self, value: Any) -> tuple[Any, dict[str, int]]:
        """Any JSON value masked, and how often each kind was. Raises CannotRedact."""
        masking = _Masking(self)
        return masking.values({"value": value})["value"], masking.counts

    def tag(self, value: str, counts: dict[str, int] | None = None) -> str:
        """A client or session id: itself, or where it holds something personal a pseudonym that never changes."""
        readable = value.encode("utf-8", "replace").decode()
        found = self.spans(readable, "") if value and not _MASKED.fullmatch(value) else []
        if not found:
            return value
        kind = max(found, key=lambda span: span.end - span.start).kind
        if counts is not None:
            counts[kind] = counts.get(kind, 0) + 1
        digest = blake2b(value.encode("utf-8", "surrogatepass"), key=self._salt[:64], digest_size=8).hexdigest()
        return f"<{kind.upper()}_{digest}>"

    def spans(self, text: str, key: str) -> list[Span]:
        """What is to be masked, in order and without overlaps. `key` is the text's in its object: it may tell a kind.

        Overlapping finds become one that covers them all, of the longest one's kind, the earliest of the longest.
        """
        read, offset = (f"{key}: {text}", len(key) + 2) if key and len(text) <= _KEYED else (text, 0)
        found = _media(text)
        if not _is_word(text) and suspicious(read):
            for recogniser in BUILT_IN:
                found += [
                    Span(max(0, span.start - offset), span.end - offset, span.kind)
                    for span in recogniser.find(read)
                    if span.end > offset
                ]
        for recogniser in self._foreign:
            found += recogniser.find(text)
        return _without_masks(text, _merged(found)) if found else found


class _Own:
    """A pattern of the user's own."""

    def __init__(self, name: str, pattern: str) -> None:
        if not _NAME.fullmatch(name) or name in KINDS:
            raise ConfigError(
                f"privacy.patterns.{name}: wants a name of a-z, 0-9 and _, at most 32 long, but none of the built-in"
                f" kinds {', '.join(KINDS)}"
            )
        try:
            self._pattern = compile_re2(pattern)
        except ValueError as error:
            raise ConfigError(f"privacy.patterns.{name}: {error}; RE2 knows no lookaround or backreferences") from error
        if self._pattern.search("") is not None:
            raise ConfigError(f"privacy.patterns.{name}: it matches the empty text, so it would match everywhere")
        self._name = name

    def find(self, text: str) -> Iterable[Span]:
        return [Span(found.start(), found.end(), self._name) for found in self._pattern.finditer(text)]


class _Masking:
    """One exchange's pseudonyms and counts."""

    def __init__(self, redactor: Redactor) -> None:
        self.counts: dict[str, int] = {}
        self._redactor = redactor
        self._given: dict[tuple[str, str], str] = {}
        self._numbers: dict[str, count[int]] = {}
        self._taken: frozenset[str] = frozenset()

    def values(self, values: JSON) -> JSON:
        """The values masked. Pseudonyms that stand in them already are not given to anything else."""
        try:
            self._taken = frozenset(_MASKED.findall(orjson.dumps(values).decode()))
            return {name: self._value(value, "") for name, value in values.items()}
        except (RecursionError, UnicodeEncodeError, TypeError) as error:
            raise CannotRedact(f"a body is no JSON that can be read safely: {error}") from error

    def text(self, text: str, key: str = "") -> str:
        """A text masked, and a JSON text so that it stays one."""
        if not text:
            return text
        if text[:64].lstrip()[:1] in ("{", "[") and _is_json(text):
            return self._json_text(text)
        for _ in range(_ROUNDS):
            spans = self._redactor.spans(text, key)
            if not spans:
                break
            parts, last = [], 0
            for span in spans:
                parts += [text[last : span.start], self._pseudonym(text[span.start : span.end], span.kind)]
                last = span.end
            text = "".join(parts) + text[last:]
        return text

    def _value(self, value: Any, key: str) -> Any:
        match value:
            case str():
                return self.text(value, key)
            case dict():
                return {self._key(name): self._value(inner, name) for name, inner in value.items()}
            case list():
                return [self._value(inner, key) for inner in value]
            case bool() | None:
                return value
            case int() | float():
                return self._number(value, key)
        return value

    def _key(self, name: str) -> str:
        return name if len(name) < 6 or name.replace("_", "").isalpha() else self.text(name)

    def _number(self, value: float, key: str) -> Any:
        """A card or telephone number may be written without quotes; its mask is a string."""
        if not 1e6 <= abs(value) < 1e19 or value != int(value):
            return value
        written = str(int(value))
        masked = self.text(written, key)
        return value if masked == written else masked

    def _json_text(self, text: str) -> str:
        """Every string and number of a JSON text masked in its place; the rest stays as it was written."""
        key = ""

        def masked(token: re.Match[str]) -> str:
            nonlocal key
            written, colon = token.group(1), token.group(2) or ""
            if written is None:
                number = self.text(token.group(), key)
                return token.group() if number == token.group() else f'"{number}"'
            value = orjson.loads(written)
            if colon:
                key = value
            result = self._key(value) if colon else self.text(value, key)
            return token.group() if result == value else orjson.dumps(result).decode() + colon

        return _TOKEN.sub(masked, text)

    def _pseudonym(self, value: str, kind: str) -> str:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        same = (kind, "".join(filter(str.isalnum, value)).upper() if kind not in ("secret", "media") else value)
        if same not in self._given:
            numbers = self._numbers.setdefault(kind, count(1))
            names = (f"<{kind.upper()}_{number}>" for number in numbers)
            self._given[same] = next(name for name in names if name not in self._taken)
        return self._given[same]


def _merged(found: list[Span]) -> list[Span]:
    merged: list[Span] = []
    longest = 0
    for span in sorted(found, key=lambda span: (span.start, -span.end)):
        size = span.end - span.start
        if merged and span.start < merged[-1].end:
            last = merged[-1]
            merged[-1] = Span(last.start, max(last.end, span.end), span.kind if size > longest else last.kind)
            longest = max(longest, size)
        elif size > 0:
            merged.append(span)
            longest = size
    return merged


def _without_masks(text: str, spans: list[Span]) -> list[Span]:
    """The parts of the spans that are not masks already."""
    masks = [found.span() for found in _MASKED.finditer(text)] if "<" in text else []
    if not masks:
        return spans
    parts = []
    for span in spans:
        start = span.start
        inside = [(begin, end) for begin, end in masks if end > span.start and begin < span.end]
        for begin, end in (*inside, (span.end, span.end)):
            if text[start:begin].strip():
                parts.append(Span(start, begin, span.kind))
            start = max(start, end)
    return parts


def _is_word(text: str) -> bool:
    """Too short for any built-in kind, or letters alone: most strings of a body."""
    return len(text) < 6 or (len(text) < 20 and text.isalpha())


def _media(text: str) -> list[Span]:
    """Images, sound and files written as text: nobody can say what they show, so that they are not kept."""
    if ";base64," in text:
        return [Span(*found.span(1), "media") for found in _DATA_URL.finditer(text)]
    if len(text) >= 512 and " " not in text[:512] and _OPAQUE.fullmatch(text):
        return [Span(0, len(text), "media")]
    return []


def _is_json(text: str) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True


def _read(body: bytes) -> Any:
    if not body:
        return None
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        pass
    try:
        whole = assemble(body)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CannotRedact(f"a streamed reply has events of no known shape: {error}") from error
    if whole is None:
        raise CannotRedact("a body is neither JSON nor a stream of JSON events")
    return whole


def _unpacked(body: bytes, encoding: str) -> bytes:
    try:
        plain = unpacked(body, encoding, _LARGEST + 1)
    except CannotUnpack as error:
        raise CannotRedact(str(error)) from error
    if len(plain) > _LARGEST:
        raise CannotRedact(f"a reply unpacks to more than {_LARGEST} bytes")
    return plain


def _summed(earlier: Mapping[str, int] | None, now: Mapping[str, int]) -> dict[str, int]:
    return {kind: (earlier or {}).get(kind, 0) + now.get(kind, 0) for kind in (*(earlier or {}), *now)}
