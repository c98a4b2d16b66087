"""The demo's default workload: a shop's support desk, whose utterances a small grammar makes up."""

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flywheel.demo.workload import Item, Workload, WorkloadError, tool_json

Draw = Callable[[random.Random], str]
_HEAD = re.compile(r"(?:(?P<kind>\w+) )?(?P<name>\w+)(?:\((?P<arguments>[\w, ]*)\))?(?: (?P<about>.+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of a grammar file: `== kind name(arguments) about`, and the lines below it."""

    name: str
    arguments: tuple[str, ...]
    about: str
    lines: tuple[str, ...]

    @property
    def words(self) -> tuple[str, ...]:
        """The lines as a list of words or short texts, parted by bars."""
        return tuple("|".join(self.lines).split("|"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """A grammar file's sections: plain ones by name, and those of a kind in the file's order."""

    plain: Mapping[str, Section]
    kinds: Mapping[str, tuple[Section, ...]]

    def sentence(self, pattern: str, rng: random.Random) -> str:
        """The pattern with the colour that people put around a request, expanded."""
        around = [self.plain[name].lines[0] for name in ("openers", "asides")]
        after = [self.plain[name].lines[0] for name in ("closers", "ends")]
        return expand("".join([*around, pattern, *after]), rng)


def read(name: str) -> Grammar:
    """Reads a grammar file that lies beside this module. Lines that start with # are remarks."""
    plain: dict[str, Section] = {}
    kinds: dict[str, tuple[Section, ...]] = {}
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("# ")]
    for part in "\n".join(lines).split("== ")[1:]:
        head, *body = part.splitlines()
        match = _HEAD.fullmatch(head)
        assert match, f"{name}: {head!r} is no heading"
        arguments = tuple((match["arguments"] or "").replace(",", " ").split())
        section = Section(name=match["name"], arguments=arguments, about=match["about"] or "", lines=tuple(body))
        if match["kind"]:
            kinds[match["kind"]] = (*kinds.get(match["kind"], ()), section)
        else:
            plain[section.name] = section
    return Grammar(plain=plain, kinds=kinds)


def expand(pattern: str, rng: random.Random) -> str:
    """One of the texts that a pattern stands for: each [a|b] replaced by one of its alternatives, inner ones first."""
    while "[" in pattern:
        pattern = re.sub(r"\[([^\[\]]*)\]", lambda match: rng.choice(match[1].split("|")), pattern)
    return re.sub(r" +(?=[ ,.!])", "", pattern).strip()


def fill(shape: str, draw: Callable[[str], str]) -> str:
    """The shape with each {name} replaced by what is drawn for it."""
    return re.sub(r"\{(\w+)\}", lambda match: draw(match[1]), shape)


def one_of(section: Section) -> Draw:
    """Draws one of a section's words."""
    words = section.words
    return lambda rng: rng.choice(words)


def generate(n: int, seed: int) -> Workload:
    """A workload of `n` utterances, even over the eight tools, no two of one template.

    Equal for equal `n` and seed; of one seed, a larger workload holds every smaller one.
    """
    grammar = read("support_desk.txt")
    fillers = _fillers(grammar)
    tools = grammar.kinds["tool"]
    rng = random.Random(seed)
    items: dict[str, Item] = {}
    for _ in range(20 * n):
        if len(items) == n:
            break
        item = _draw(tools[len(items) % len(tools)], grammar, fillers, rng)
        items.setdefault(item.template.casefold(), item)
    if len(items) < n:
        raise WorkloadError(f"the grammar gave {len(items)} different templates of {n}; ask for fewer")
    shuffled = list(items.values())
    rng.shuffle(shuffled)
    return Workload(
        name="support-router",
        system_prompt="You are the support desk of a shop. Choose the tool that answers the request.",
        tools=tuple(tool_json(tool.name, tool.about, tool.arguments, tool.arguments) for tool in tools),
        items=tuple(shuffled),
    )


def _fillers(grammar: Grammar) -> Mapping[str, tuple[str | None, Draw]]:
    """For each {name} in a pattern: the argument it is in the call (none for mere colour), and how to draw a value."""
    wearable, device, city, day, size, code = (
        one_of(grammar.plain[name]) for name in ("wearable", "device", "city", "day", "size", "code")
    )
    return {
        "order_id": ("order_id", lambda rng: str(rng.randint(10_000, 99_999))),
        "parcel": ("parcel", lambda rng: f"{rng.choice(('PX', 'DL', 'TR', 'NX'))}{rng.randint(1_000, 9_999)}"),
        "item": ("item", lambda rng: rng.choice((wearable, device))(rng)),
        "wearable": ("item", wearable),
        "device": ("item", device),
        "city": ("city", city),
        "day": ("day", day),
        "aside_day": (None, day),
        "size": ("size", size),
        "code": ("code", lambda rng: f"{code(rng)}{rng.randint(10, 99)}"),
    }


def _draw(tool: Section, grammar: Grammar, fillers: Mapping[str, tuple[str | None, Draw]], rng: random.Random) -> Item:
    shape = grammar.sentence(rng.choice(tool.lines), rng)
    if rng.random() < 0.5:
        shape = shape[0].upper() + shape[1:]
    arguments: dict[str, str] = {}

    def value(name: str) -> str:
        argument, draw = fillers[name]
        drawn = draw(rng)
        if argument is not None:
            arguments[argument] = drawn
        return drawn

    text = fill(shape, value)
    template = fill(shape, lambda name: "{" + (fillers[name][0] or "day") + "}")
    return Item(
        text=text, tool=tool.name, arguments={name: arguments[name] for name in tool.arguments}, template=template
    )
