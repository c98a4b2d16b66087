"""Labelled text of others, as requests with tools: what a base model for data of the user's own learns from.

Where a text has no arguments, what follows its little words is made into some ("in Oslo" gives `{"in": "Oslo"}`), and
some of all values give way to made-up names: a model that is to fill forms has to learn to copy what it never saw.
"""

import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from flywheel.demo.corpus import Row, fillers, row
from flywheel.demo.grammar import Draw, read
from flywheel.demo.workload import Workload

__all__ = ["labelled"]

_PHRASE: Final = re.compile(
    r"\b(?P<mark>{little})(?P<words>(?: (?!(?:{little})\b)[\w':-]+){{1,4}})".format(
        little="in|at|for|on|by|to|from|with|called|named|near|about|of|is|the|my"
    ),
    re.IGNORECASE,
)
_MEANT: Final = frozenset(("to", "of", "is", "the", "my"))  # what follows these says what is wanted: it stays
_MOST_PHRASES: Final = 4
_MOST_OTHERS: Final = 6
_RENAMED: Final = 0.6


def labelled(workloads: Sequence[Workload], seed: int) -> Iterator[Row]:
    """Requests without end, each text once a round: its label's tool among a few more."""
    grammar = read("everyday.txt")
    system, name_of = grammar.plain["system"].lines, fillers(grammar)["name"]
    rng = random.Random(seed)
    tools = [{tool["function"]["name"]: tool for tool in workload.tools} for workload in workloads]
    pairs = [(by_name, item) for by_name, workload in zip(tools, workloads, strict=True) for item in workload.items]
    while True:
        rng.shuffle(pairs)
        for by_name, item in pairs:
            others = [name for name in by_name if name != item.tool]
            offered = [item.tool, *rng.sample(others, min(len(others), rng.randint(1, _MOST_OTHERS)))]
            rng.shuffle(offered)
            text, arguments = _renamed(item.text, item.arguments or _phrases(item.text), name_of, rng)
            yield row(rng.choice(system), [by_name[name] for name in offered], text, item.tool, arguments)


def _phrases(text: str) -> dict[str, str]:
    return {
        found["mark"].lower(): found["words"].strip()
        for found in itertools.islice(_PHRASE.finditer(text), _MOST_PHRASES)
    }


def _renamed(text: str, arguments: Mapping[str, str], name_of: Draw, rng: random.Random) -> tuple[str, dict[str, str]]:
    kept = dict(arguments)
    for key, value in arguments.items():
        if key not in _MEANT and rng.random() < _RENAMED and text.count(value) == 1:
            kept[key] = " ".join(name_of(rng) for _ in range(rng.randint(1, 3)))
            text = text.replace(value, kept[key])
    return text, kept
