"""The text that a tiny base model grows up on: made-up requests from everyday life.

None of it is about a shop's support desk: the workload that the demo measures must be new to the model.
"""

import json
import random
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flywheel.demo.grammar import Draw, Grammar, fill, one_of, read
from flywheel.demo.workload import tool_json

Row = dict[str, Any]
_INVENTED = 80
_EVERYDAY = 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Intent:
    """What a request may ask for: the tool that answers it, and the patterns of its requests."""

    tool: str
    arguments: tuple[str, ...]
    patterns: tuple[str, ...]


def conversations(seed: int) -> Iterator[Row]:
    """Made-up requests without end, each with the tool that answers it among others that do not."""
    grammar = read("everyday.txt")
    draws = fillers(grammar)
    system = grammar.plain["system"].lines
    everyday = _everyday(grammar)
    rng = random.Random(seed)
    while True:
        intents = everyday if rng.random() < _EVERYDAY else _invented(grammar, rng)
        intent = rng.choice(intents)
        values = {kind: draws[kind](rng) for kind in intent.arguments}
        text = fill(grammar.sentence(rng.choice(intent.patterns), rng), _value(values, draws, rng))
        if rng.random() < 0.5:
            text = text[0].upper() + text[1:]
        tools = {one.tool: one for one in (intent, *rng.choices(intents, k=rng.randint(1, 3)))}
        offered = [tool_json(one.tool, "", one.arguments, one.arguments) for one in tools.values()]
        rng.shuffle(offered)
        yield row(rng.choice(system), offered, text, intent.tool, values)


def _everyday(grammar: Grammar) -> list[_Intent]:
    """Each verb with each thing."""
    return [
        _Intent(
            tool=f"{verb.name}_{thing}".replace(" ", "_"),
            arguments=verb.arguments,
            patterns=tuple(line.replace("{thing}", thing) for line in verb.lines),
        )
        for verb in grammar.kinds["verb"]
        for thing in grammar.plain["thing"].words
    ]


def _invented(grammar: Grammar, rng: random.Random) -> list[_Intent]:
    """Requests without sense, anew at each call: some words of the tool's own among a few of other tools'.

    No single word decides: a model learns to weigh all the words of a request, which is what a new workload asks of it.
    """
    fixed = random.Random(0)
    words = fixed.sample(grammar.plain["word"].words, len(grammar.plain["word"].words))
    kinds = sorted({kind for verb in grammar.kinds["verb"] for kind in verb.arguments})
    share = len(words) // _INVENTED
    intents = []
    for at in range(_INVENTED):
        # Arguments are drawn anew, so that their kinds say nothing about the tool.
        own, arguments = words[at * share : (at + 1) * share], tuple(rng.sample(kinds, rng.randint(1, 2)))
        said = rng.sample(own, rng.randint(2, 4)) + rng.choices(words, k=rng.randint(0, 1))
        said += rng.choices(grammar.plain["little"].words, k=rng.randint(2, 6))
        said += [f"{{{argument}}}" for argument in arguments]
        rng.shuffle(said)
        intents.append(_Intent(tool="_".join(own[:2]), arguments=arguments, patterns=(" ".join(said),)))
    return intents


def row(
    system_prompt: str, tools: Sequence[Mapping[str, Any]], text: str, tool: str, arguments: Mapping[str, str]
) -> Row:
    """One training row: a request and the call that answers it."""
    function = {"name": tool, "arguments": json.dumps(arguments, ensure_ascii=False)}
    call = {"id": "call_0", "type": "function", "function": function}
    messages = [
        {"role": "system", "content": system_prompt},
        {"role": "user", "content": text},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    return {"messages": messages, "tools": list(tools)}


def _value(values: Mapping[str, str], draws: Mapping[str, Draw], rng: random.Random) -> Callable[[str], str]:
    return lambda kind: values[kind] if kind in values else draws[kind](rng)


def fillers(grammar: Grammar) -> Mapping[str, Draw]:
    """How to draw a value of each kind. Half of the names are made-up words: copying has to work for any word."""
    thing, quality, person, city, weekday, month = (
        one_of(grammar.plain[name]) for name in ("object", "quality", "person", "city", "weekday", "month")
    )
    syllable = [one_of(grammar.plain[name]) for name in ("onset", "vowel", "coda")]

    def word(rng: random.Random) -> str:
        if rng.random() < 0.25:
            return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 7)))
        return "".join(draw(rng) for _ in range(rng.randint(1, 2)) for draw in syllable)

    def part(rng: random.Random) -> str:
        return f"{quality(rng)} {thing(rng)}".strip()

    def name(rng: random.Random) -> str:
        drawn = rng.choice(
            (word(rng).capitalize(), f"{word(rng)} {word(rng)}", part(rng), f"{quality(rng)} {word(rng)}")
        )
        return drawn.strip()

    def code(rng: random.Random) -> str:
        letters = "".join(rng.choices(string.ascii_uppercase, k=rng.randint(1, 4)))
        return rng.choice((letters, word(rng).upper(), thing(rng).replace(" ", "").upper())) + number(rng)

    def date(rng: random.Random) -> str:
        day = rng.randint(1, 31)
        ending = "th" if 10 <= day <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
        return rng.choice((weekday(rng), f"the {day}{ending}", f"{month(rng)} {day}"))

    def number(rng: random.Random) -> str:
        digits = "".join(rng.choices(string.digits, k=rng.choice((1, 2, 2, 3, 4, 5, 5, 5, 6))))
        return digits.lstrip("0") or "7"

    def time(rng: random.Random) -> str:
        return rng.choice(
            (f"{rng.randint(1, 12)} {rng.choice(('am', 'pm'))}", f"{rng.randint(0, 23)}:{rng.randint(10, 59)}")
        )

    return {
        "name": name,
        "new_name": name,
        "part": part,
        "other_part": lambda rng: rng.choice((part(rng), number(rng), code(rng))),
        "person": lambda rng: rng.choice((person(rng), person(rng), word(rng).capitalize())),
        "day": date,
        "time": time,
        "number": number,
        "code": code,
        "city": lambda rng: rng.choice((city(rng), word(rng).capitalize())),
        "amount": lambda rng: f"{number(rng)} {rng.choice(('euros', 'dollars', 'pounds'))}",
    }
