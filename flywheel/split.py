"""Splits records into two sides so that nothing that belongs together stands on both. Pure, deterministic by seed."""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass

from flywheel.score import normalised

__all__ = ["Group", "Item", "groups", "halves", "template"]

_TOKEN = re.compile(r"\w+|[^\w\s]")
_LONGEST_VALUE = 12  # words; a longer argument is free text that nobody repeats
_BLANK = "{}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """What the split needs of a record: its label, the user's text, its argument values, and what else ties it."""

    id: str
    label: str
    text: str
    values: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()


Group = tuple[Item, ...]


def template(text: str, values: Iterable[str]) -> str:
    """The text without case, digits and the given values: what two requests of one pattern share."""
    return _masked(_tokens(text), {tokens for value in values if (tokens := _tokens(value))})


def groups(items: Sequence[Item]) -> list[Group]:
    """Items that share a session, a conversation or a template, directly or through others, are one group.

    Templates are taken twice: with the record's own argument values blanked, and with every value that any record
    has. The second catches a pattern whose answer, in one record, was wrong and so does not show the right values.
    """
    vocabulary = {tokens for item in items for value in item.values if (tokens := _tokens(value))}
    together = _Unions()
    for item in items:
        texts = _tokens(item.text)
        own = {tokens for value in item.values if (tokens := _tokens(value))}
        together.join(item.id, f"template:{_masked(texts, own)}")
        together.join(item.id, f"template:{_masked(texts, vocabulary)}")
        for key in item.keys:
            together.join(item.id, key)
    found: defaultdict[str, list[Item]] = defaultdict(list)
    for item in sorted(items, key=lambda item: item.id):
        found[together.root(f"id:{item.id}")].append(item)
    return sorted((tuple(members) for members in found.values()), key=lambda group: group[0].id)


def halves(parts: Sequence[Group], fraction: float, seed: int) -> tuple[list[Group], list[Group]]:
    """Divide groups into (rest, taken), `taken` being as near to `fraction` of the items as whole groups allow.

    Each label's share is kept as far as that allows. With a fraction above 0 and two groups or more, both sides get
    something where at least one item is due. Every fraction from 0 to 1 and every label count is fine, 1 included.
    """
    total = sum(map(len, parts))
    due = round(total * fraction)
    if due <= 0 or len(parts) < 2:
        return list(parts), []
    order = list(parts)
    random.Random(seed).shuffle(order)
    order.sort(key=len, reverse=True)
    side = _Side(order, fraction)
    for position, group in enumerate(order):
        if side.wants(group):
            side.move(position)
    side.settle(due)
    if side.size == 0 or side.size == total:
        side.move(len(order) - 1)  # the smallest group goes to the empty side
    taken = [group for position, group in enumerate(order) if position in side.chosen]
    rest = [group for position, group in enumerate(order) if position not in side.chosen]
    return rest, taken


class _Side:
    """The side that is being filled: which groups it has, and how far each label is from its share."""

    def __init__(self, order: Sequence[Group], fraction: float) -> None:
        self._order = order
        self._labels = [Counter(item.label for item in group) for group in order]
        self._left = {
            label: count * fraction for label, count in Counter(i.label for group in order for i in group).items()
        }
        self.chosen: set[int] = set()
        self.size = 0
        self._positions = {id(group): position for position, group in enumerate(order)}

    def wants(self, group: Group) -> bool:
        """Whether taking the group brings its labels nearer to their shares."""
        position = self._positions[id(group)]
        return self._change(position, 1) < 0

    def move(self, position: int) -> None:
        """Put the group on this side, or back."""
        sign = -1 if position in self.chosen else 1
        for label, count in self._labels[position].items():
            self._left[label] -= sign * count
        self.size += sign * len(self._order[position])
        self.chosen ^= {position}

    def settle(self, due: int) -> None:
        """Move groups, then swap them, while that brings the size nearer to `due`; the kindest to the labels first."""
        while self.size != due:
            best = min(self._steps(due), default=None)
            if best is None:
                return
            for position in best[2]:
                self.move(position)

    def _steps(self, due: int) -> Iterator[tuple[int, float, tuple[int, ...]]]:
        """Each possible step as (how far off after it, harm to the labels, groups to move); only real gains."""
        off = due - self.size
        add = off > 0
        movable = [p for p in range(len(self._order)) if (p in self.chosen) != add]
        for position in movable:
            after = abs(abs(off) - len(self._order[position]))
            if after < abs(off):
                yield after, self._change(position, 1 if add else -1), (position,)
        if abs(off) >= 1:
            yield from self._swaps(off, movable)

    def _swaps(self, off: int, movable: Sequence[int]) -> Iterator[tuple[int, float, tuple[int, ...]]]:
        """One pair for each pair of sizes: a large group for a smaller one of the other side."""
        add = off > 0
        moved: set[int] = set(movable)
        here, there = self._first_by_size(moved), self._first_by_size(set(range(len(self._order))) - moved)
        for size, position in here.items():
            for other_size, other in there.items():
                after = abs(abs(off) - (size - other_size))
                if size > other_size and after < abs(off):
                    sign = 1 if add else -1
                    yield after, self._change(position, sign) + self._change(other, -sign), (position, other)

    def _first_by_size(self, positions: Set[int]) -> dict[int, int]:
        found: dict[int, int] = {}
        for position in sorted(positions):
            found.setdefault(len(self._order[position]), position)
        return found

    def _change(self, position: int, sign: int) -> float:
        """By how much the squared distance of the labels from their shares grows; below 0 is better."""
        return sum(
            (self._left[label] - sign * count) ** 2 - self._left[label] ** 2
            for label, count in self._labels[position].items()
        )


class _Unions:
    """Union-find over texts."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def root(self, key: str) -> str:
        parent = self._parent.setdefault(key, key)
        while parent != self._parent[parent]:
            self._parent[key] = parent = self._parent[self._parent[parent]]
            key = parent
        return parent

    def join(self, one: str, other: str) -> None:
        first, second = self.root(f"id:{one}"), self.root(other)
        if first != second:
            self._parent[max(first, second)] = min(first, second)


def _tokens(text: str) -> tuple[str, ...]:
    return tuple(_TOKEN.findall(normalised(text)))


def _masked(tokens: Sequence[str], values: Set[tuple[str, ...]]) -> str:
    out: list[str] = []
    position = 0
    while position < len(tokens):
        for length in range(min(_LONGEST_VALUE, len(tokens) - position), 0, -1):
            if tuple(tokens[position : position + length]) in values:
                out.append(_BLANK)
                position += length
                break
        else:
            out.append(re.sub(r"\d+", "#", tokens[position]))
            position += 1
    return " ".join(out)
