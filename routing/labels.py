"""What a request says of itself in key and value: OpenAI's `metadata`, and the tags of other gateways. Pure.

So an application that comes from LiteLLM, Helicone, Portkey or TensorZero keeps its tags: rules match them as metadata,
and those that mean a workload, a client, a session or a user are understood as such.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import msgspec

__all__ = ["labels_of"]

_MOST: Final = 64  # tags of a call that are looked at
_IDS: Final = frozenset(("workload_id", "client_id", "session_id", "user_id"))
_HELICONE: Final = {
    "helicone-session-id": "session_id",
    "helicone-user-id": "user_id",
    "helicone-prompt-id": "workload_id",
}
_PROPERTY: Final = "helicone-property-"
_MEANING: Final = {  # of names that these gateways' documents give to ids
    "session": "session_id",
    "app": "client_id",
    "_user": "user_id",
    "_organisation": "client_id",
    "_prompt": "workload_id",
}
_objects: Final = msgspec.json.Decoder(dict[str, Any])

Pairs = Iterable[tuple[str, str]]


def labels_of(
    headers: Mapping[str, str], metadata: object, tags: object = None, episode: object = None
) -> dict[str, str]:
    """The labels of a request. `headers` has lower-case names; `metadata` is the body's, of whatever shape.

    `tags` and `episode` are the body's `tensorzero::tags` and `tensorzero::episode_id`. Where several say the same
    name, the first of metadata, LiteLLM, Helicone, Portkey and TensorZero counts. What has another shape than its
    gateway documents says nothing.
    """
    own = {k: v for k, v in metadata.items() if isinstance(v, str)} if isinstance(metadata, dict) else {}
    listed = metadata["tags"] if isinstance(metadata, dict) and "tags" in metadata else None
    if (
        tags is None
        and episode is None
        and listed is None
        and "x-litellm-tags" not in headers
        and "x-portkey-metadata" not in headers
        and "helicone-" not in "\n".join(headers)
    ):
        return own
    for pairs in (
        _litellm(headers, listed),
        _helicone(headers),
        _portkey(headers),
        (*_texts(tags), *_texts({"session_id": episode})),
    ):
        _add(own, pairs)
    return own


def _add(labels: dict[str, str], pairs: Pairs) -> None:
    """A name that means an id counts as that id too, unless the id is given by its own name."""
    given = dict(pairs)
    meant = {meaning: value for name, value in given.items() if (meaning := _meaning(name))}
    for name, value in (*given.items(), *meant.items()):
        labels.setdefault(name, value)


def _meaning(name: str) -> str | None:
    plain = name.replace("-", "_")
    return plain if plain in _IDS else _MEANING.get(name)


def _litellm(headers: Mapping[str, str], listed: object) -> Iterator[tuple[str, str]]:
    """`key:value` is a pair; a tag without a colon is there, and so `true`."""
    named = headers.get("x-litellm-tags", "").split(",", _MOST)[:_MOST]
    in_body = listed[:_MOST] if isinstance(listed, list) else []
    for text in (*named, *in_body):
        if isinstance(text, str) and (tag := text.strip()):
            name, colon, value = tag.partition(":")
            yield (name.strip(), value.strip()) if colon else (tag, "true")


def _helicone(headers: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name, value in headers.items():
        if name.startswith(_PROPERTY):
            yield name.removeprefix(_PROPERTY), value
        elif meaning := _HELICONE.get(name):
            yield meaning, value


def _portkey(headers: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    if text := headers.get("x-portkey-metadata"):
        try:
            yield from _texts(_objects.decode(text.encode("latin-1")))
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            return


def _texts(given: object) -> Iterator[tuple[str, str]]:
    if isinstance(given, dict):
        yield from ((k, v) for k, v in given.items() if isinstance(v, str))
