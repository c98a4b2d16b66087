"""Which rule a request fulfils: an index over the rules' conditions, quick with hundreds of rules. Pure."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

from msgspec import Struct

from routing.patterns import PatternSet
from routing.recent import Recent
from routing.request import system_fingerprint

__all__ = ["Asked", "Match", "Matching", "conditions"]

_PROMPTS: Final = 4 * 1024 * 1024  # bytes of system prompts whose digests and patterns are remembered
_ONE_OF: Final = ("model", "client", "path", "tools_fingerprint", "system_fingerprint")

Key = tuple[str, str, str]  # the condition's kind, the name of its header or metadata, its value


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Every given condition must hold. Header names are lower case. An empty match matches nothing.

    Of several models, clients, paths or fingerprints one must be the request's; of several tools, each.
    `system_pattern` is a regular expression of RE2 that must occur in the system prompt, "" for none.
    """

    headers: tuple[tuple[str, str], ...] = ()
    metadata: tuple[tuple[str, str], ...] = ()
    models: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    clients: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    tools_fingerprints: tuple[str, ...] = ()
    system_fingerprints: tuple[str, ...] = ()
    system_pattern: str = ""


class Asked(Struct, frozen=True, gc=False):
    """What rules look at in a request. `headers` has lower-case names; "" and () stand for what it lacks.

    `tools` and `tools_fingerprint` are routing.request.tools_of the body, `system` is its system_of.
    """

    headers: Mapping[str, str] = {}
    metadata: Mapping[str, str] = {}
    model: str = ""
    path: str = ""
    client: str = ""
    tools: tuple[str, ...] = ()
    tools_fingerprint: str = ""
    system: str = ""


class _Prompt(NamedTuple):
    fingerprint: str
    patterns: tuple[int, ...]


_NO_PROMPT: Final = _Prompt("", ())


class Matching:
    """Finds the first rule that holds, as going through all of them in order would.

    Each rule stands in the index under the one of its conditions that the fewest rules share, so that a request meets
    only the few rules of which one condition holds already. System prompts are read once: what was found in the last
    ones is remembered, up to 4 MiB of them.
    """

    def __init__(self, rules: Sequence[Match]) -> None:
        """Raises ValueError for a system pattern that is none."""
        self._rules = tuple(rules)
        self.reads_tools = any(rule.tools or rule.tools_fingerprints for rule in rules)
        self.reads_system = any(rule.system_fingerprints or rule.system_pattern for rule in rules)
        patterns = sorted({rule.system_pattern for rule in rules if rule.system_pattern})
        self._numbers = {pattern: number for number, pattern in enumerate(patterns)}
        self._prompts: Recent[str, _Prompt] = Recent(partial(_read, PatternSet(patterns)), _PROMPTS)
        self._headers: dict[str, dict[str, list[int]]] = {}
        self._metadata: dict[str, dict[str, list[int]]] = {}
        self._one_of: dict[str, dict[str, list[int]]] = {kind: {} for kind in (*_ONE_OF, "tool")}
        self._by_pattern: dict[int, list[int]] = {}
        choices = [list(_choices(rule)) for rule in rules]
        shared = Counter(key for offered in choices for choice in offered for key in choice)
        for position, offered in enumerate(choices):
            rarest = min(offered, key=lambda choice: sum(shared[key] for key in choice), default=())
            for key in dict.fromkeys(rarest):
                self._put(key, position)

    def first(self, asked: Asked) -> int | None:
        """The position of the first rule of which every condition holds."""
        prompt = self._prompts(asked.system) if self.reads_system and asked.system else _NO_PROMPT
        best = len(self._rules)
        for positions in self._met(asked, prompt):
            for position in positions:
                if position >= best:
                    break
                if self._holds(self._rules[position], asked, prompt):
                    best = position
                    break
        return best if best < len(self._rules) else None

    def _put(self, key: Key, position: int) -> None:
        kind, name, value = key
        if kind == "system_pattern":
            self._by_pattern.setdefault(self._numbers[value], []).append(position)
        elif kind == "header":
            self._headers.setdefault(name, {}).setdefault(value, []).append(position)
        elif kind == "metadata":
            self._metadata.setdefault(name, {}).setdefault(value, []).append(position)
        else:
            self._one_of[kind].setdefault(value, []).append(position)

    def _met(self, asked: Asked, prompt: _Prompt) -> list[list[int]]:
        """The rules, ascending, under each condition of the index that holds."""
        met = [*_named(self._headers, asked.headers), *_named(self._metadata, asked.metadata)]
        for kind, value in (
            ("model", asked.model),
            ("client", asked.client),
            ("path", asked.path),
            ("tools_fingerprint", asked.tools_fingerprint),
            ("system_fingerprint", prompt.fingerprint),
        ):
            if found := self._one_of[kind].get(value):
                met.append(found)
        if tools := self._one_of["tool"]:
            met += [tools[name] for name in asked.tools if name in tools]
        if patterns := self._by_pattern:
            met += [patterns[number] for number in prompt.patterns if number in patterns]
        return met

    def _holds(self, rule: Match, asked: Asked, prompt: _Prompt) -> bool:
        for name, value in rule.headers:  # loops, not all(): this runs on each call
            if asked.headers.get(name) != value:
                return False
        for name, value in rule.metadata:
            if asked.metadata.get(name) != value:
                return False
        return (
            (not rule.models or asked.model in rule.models)
            and (not rule.clients or asked.client in rule.clients)
            and (not rule.paths or asked.path in rule.paths)
            and (not rule.tools or set(asked.tools).issuperset(rule.tools))
            and (not rule.tools_fingerprints or asked.tools_fingerprint in rule.tools_fingerprints)
            and (not rule.system_fingerprints or prompt.fingerprint in rule.system_fingerprints)
            and (not rule.system_pattern or self._numbers[rule.system_pattern] in prompt.patterns)
        )


def conditions(rule: Match) -> Iterator[str]:
    """Each condition of a rule in words, as `header x-team=support`."""
    for kind, pairs in (("header", rule.headers), ("metadata", rule.metadata)):
        yield from (f"{kind} {name}={value}" for name, value in pairs)
    for kind, values, between in (
        ("model", rule.models, "|"),
        ("client", rule.clients, "|"),
        ("path", rule.paths, "|"),
        ("tools", rule.tools, "+"),
        ("tools_fingerprint", rule.tools_fingerprints, "|"),
        ("system_fingerprint", rule.system_fingerprints, "|"),
        ("system_pattern", (rule.system_pattern,) if rule.system_pattern else (), ""),
    ):
        if values:
            yield f"{kind} {between.join(values)}"


def _read(patterns: PatternSet, system: str) -> _Prompt:
    return _Prompt(system_fingerprint(system), tuple(patterns.found_in(system)))


def _named(rules: dict[str, dict[str, list[int]]], given: Mapping[str, str]) -> list[list[int]]:
    if not rules:
        return []
    return [found for name in rules.keys() & given.keys() if (found := rules[name].get(given[name]))]


def _choices(rule: Match) -> Iterator[tuple[Key, ...]]:
    """The conditions that a rule may stand under: where it holds, the request has one key of each."""
    yield from ((("header", name, value),) for name, value in rule.headers)
    yield from ((("metadata", name, value),) for name, value in rule.metadata)
    yield from ((("tool", "", name),) for name in rule.tools)
    values = (rule.models, rule.clients, rule.paths, rule.tools_fingerprints, rule.system_fingerprints)
    for kind, given in zip(_ONE_OF, values, strict=True):
        if given:
            yield tuple((kind, "", value) for value in given)
    if rule.system_pattern:
        yield (("system_pattern", "", rule.system_pattern),)
