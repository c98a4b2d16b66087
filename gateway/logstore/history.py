"""Repeated history, stored once: a request is folded into what is new in it and the addresses of what it repeats.

Chat clients send the whole conversation each turn, and the same tools and system prompt each time. `fold` takes out:

- The messages before the last one, cut into groups of at least `FOLD_FROM` bytes. A group is a node; its address is the
  hash of its parent's address and its own text, so equal beginnings have equal addresses, whoever sent them.
- The list of tools, a node without a parent.

What is left stays in the request: the last message, short messages that fill no group yet, every other key in its
place. A request that repeats nothing of that size is left as it is.

Two choices save bytes. The last message of a request is new in most traffic, so it becomes a node only when a later
turn repeats it. And a node has a row, its address and its parent's to carry, so short messages go together: with groups
of 1, 256, 512, 1024 bytes, 250 conversations of ten turns took 5.7, 5.7, 6.0, 7.0 MB in SQLite and 6.4, 6.0, 6.3,
6.9 MB in PostgreSQL (python -m tests.bench.bench_logstore --exchanges 2500 --fold-from N).
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final

import orjson

from gateway.records import JSON

__all__ = ["FOLD_FROM", "Folded", "Known", "Node", "address_of", "fold", "unfold"]

FOLD_FROM: Final = 256
"""Bytes of JSON from which on a group of messages, or a list of tools, becomes a node."""
_ROOT: Final = bytes(16)


@dataclass(frozen=True, slots=True)
class Node:
    """JSON values, joined by commas, and the address of the node whose values come before them."""

    parent: bytes | None
    body: str


@dataclass(frozen=True, slots=True)
class Folded:
    """A request without what `nodes` hold; `history` and `tools` are the addresses of the last node of each."""

    rest: JSON
    history: bytes | None = None
    tools: bytes | None = None
    nodes: tuple[tuple[bytes, Node], ...] = ()


def address_of(parent: bytes | None, body: bytes) -> bytes:
    """The content's address, 16 bytes. A parent's address has a fixed length, so no two contents are framed alike."""
    return blake2b((parent or _ROOT) + body, digest_size=16).digest()


def fold(request: JSON, fold_from: int = FOLD_FROM) -> Folded:
    """`request` without its repeated parts. It is not changed itself; `unfold` gives back an equal one."""
    nodes: list[tuple[bytes, Node]] = []
    changed: JSON = {}
    messages, tools = request.get("messages"), request.get("tools")
    if isinstance(messages, list) and (kept := _groups(messages, fold_from, nodes)):
        changed["messages"] = messages[kept:]
    history = nodes[-1][0] if nodes else None
    blob = orjson.dumps(tools) if isinstance(tools, list) else b""
    if blob and len(blob) >= fold_from:
        nodes.append(_node(None, blob))
        changed["tools"] = None
    if not nodes:
        return Folded(request)
    return Folded(request | changed, history, nodes[-1][0] if "tools" in changed else None, tuple(nodes))


def unfold(rest: JSON, history: bytes | None, tools: bytes | None, nodes: Mapping[bytes, Node]) -> JSON:
    """The request that was folded. Raises ValueError, KeyError or TypeError where a node is missing or is not whole."""
    request = dict(rest)
    if history is not None:
        request["messages"] = orjson.loads(f"[{','.join(_bodies(history, nodes))}]") + rest["messages"]
    if tools is not None:
        request["tools"] = orjson.loads(_found(tools, nodes).body)
    return request


def _groups(messages: list[Any], fold_from: int, nodes: list[tuple[bytes, Node]]) -> int:
    """Appends the groups' nodes; how many messages they hold. Where a group ends depends on what is before it alone."""
    parent: bytes | None = None
    kept = size = 0
    group: list[bytes] = []
    for position, message in enumerate(messages[:-1], 1):
        group.append(orjson.dumps(message))
        size += len(group[-1])
        if size >= fold_from:
            nodes.append(_node(parent, b",".join(group)))
            parent, kept, size, group = nodes[-1][0], position, 0, []
    return kept


def _node(parent: bytes | None, body: bytes) -> tuple[bytes, Node]:
    return address_of(parent, body), Node(parent, body.decode())


def _bodies(address: bytes, nodes: Mapping[bytes, Node]) -> list[str]:
    """From the first node to the one at `address`."""
    bodies: list[str] = []
    at: bytes | None = address
    while at is not None:
        node = _found(at, nodes)
        bodies.append(node.body)
        if len(bodies) > len(nodes):
            raise ValueError(f"the history at {address.hex()} runs in a circle")
        at = node.parent
    return bodies[::-1]


def _found(address: bytes, nodes: Mapping[bytes, Node]) -> Node:
    if (node := nodes.get(address)) is None:
        raise ValueError(f"the history at {address.hex()} is missing or was changed")
    return node


class Known:
    """Addresses that are stored and committed, each with the last day that uses it; the least recently used leave."""

    def __init__(self, size: int = 65_536) -> None:
        self._size = size
        self._days: OrderedDict[bytes, int] = OrderedDict()

    def lacks(self, address: bytes, day: int) -> bool:
        """Whether the store must be told of `address`, or that `day` uses it too."""
        known = self._days.get(address)
        if known is None or known < day:
            return True
        self._days.move_to_end(address)
        return False

    def note(self, stored: Iterable[tuple[bytes, int]]) -> None:
        """Call it after the commit, never before."""
        for address, day in stored:
            self._days[address] = day
            self._days.move_to_end(address)
        while len(self._days) > self._size:
            self._days.popitem(last=False)

    def forget(self) -> None:
        self._days.clear()
