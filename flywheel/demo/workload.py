"""Sample traffic with known right answers: read from a file, checked, and sampled evenly over its tools."""

import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class WorkloadError(ValueError):
    """The data cannot be used; the message says where, why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One utterance with the call that answers it. `template` is the text with its argument values blanked."""

    text: str
    tool: str
    arguments: dict[str, str]
    template: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A logical task: what the application sends with every request, and the requests themselves."""

    name: str
    system_prompt: str
    tools: tuple[dict[str, Any], ...]
    items: tuple[Item, ...]


def tool_json(name: str, description: str, arguments: Iterable[str], required: Iterable[str] = ()) -> dict[str, Any]:
    """One tool as the chat completions API wants it; every argument is a string."""
    parameters = {
        "type": "object",
        "properties": {argument: {"type": "string"} for argument in arguments},
        "required": list(required),
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def blank(text: str, arguments: Mapping[str, str]) -> str:
    """The text with each argument's value replaced by `{name}`, longest value first, whatever its case."""
    for name, value in sorted(arguments.items(), key=lambda pair: -len(pair[1])):
        if value:
            pieces = re.split(rf"(?<!\w){re.escape(value)}(?!\w)", text, flags=re.IGNORECASE)
            text = f"{{{name}}}".join(pieces)
    return text


def load(path: str | Path, label: str = "intent", only: Sequence[str] = ()) -> Workload:
    """Reads a JSONL file: `text`, the key that `label` names, and optionally `slots`. The first of equal texts wins."""
    path = Path(path)
    items: dict[str, Item] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(
            f"{path}: cannot be read ({error}); give a UTF-8 file with one JSON object a line"
        ) from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            item = _item(f"{path}:{number}", line, label, only)
            if item is not None:
                items.setdefault(item.text.casefold(), item)
    found = {item.tool for item in items.values()}
    if missing := [name for name in only if name not in found]:
        raise WorkloadError(f"{path}: no line has {label} {', '.join(missing)}; check ONLY against the file's labels")
    if len(found) < 2:
        raise WorkloadError(f"{path}: {len(found)} different {label} found; a workload needs at least two tools")
    kept = tuple(items.values())
    return Workload(
        name=re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-") or "data",
        system_prompt="Choose the tool that answers the request.",
        tools=_tools(kept),
        items=kept,
    )


def sample(workload: Workload, n: int, seed: int) -> Workload:
    """The workload with `n` of its items: shuffled, as even over the tools as they allow, equal for equal seeds."""
    if not 0 < n <= len(workload.items):
        raise WorkloadError(f"{workload.name}: {n} items asked for, {len(workload.items)} there; ask for fewer")
    rng = random.Random(seed)
    by_tool: defaultdict[str, list[Item]] = defaultdict(list)
    for item in sorted(workload.items, key=lambda item: item.text):
        by_tool[item.tool].append(item)
    for tool in sorted(by_tool):
        rng.shuffle(by_tool[tool])
    chosen: list[Item] = []
    while len(chosen) < n:
        for tool in sorted(by_tool):
            if by_tool[tool] and len(chosen) < n:
                chosen.append(by_tool[tool].pop())
    rng.shuffle(chosen)
    return replace(workload, items=tuple(chosen))


def _item(where: str, line: str, label: str, only: Sequence[str]) -> Item | None:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise WorkloadError(f"{where}: not JSON ({error}); write one object a line") from error
    if not isinstance(row, dict):
        raise WorkloadError(f"{where}: a JSON object is expected, this is {type(row).__name__}")
    tool = _text(where, row, label)
    if only and tool not in only:
        return None
    if not _TOOL_NAME.fullmatch(tool):
        raise WorkloadError(f"{where}: {label} {tool!r} cannot name a tool; use 1 to 64 letters, digits, _ or -")
    text = _text(where, row, "text").strip()
    arguments = row.get("slots") or {}
    if not isinstance(arguments, dict) or not all(isinstance(value, str) for value in arguments.values()):
        raise WorkloadError(f'{where}: slots must map argument names to texts, as in {{"city": "Oslo"}}')
    return Item(text=text, tool=tool, arguments=arguments, template=blank(text, arguments))


def _text(where: str, row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        keys = ", ".join(row) or "none"
        raise WorkloadError(f"{where}: {key!r} must be a text that is not empty (keys here: {keys})")
    return value


def _tools(items: Sequence[Item]) -> tuple[dict[str, Any], ...]:
    arguments: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for item in items:
        arguments[item.tool].update(dict.fromkeys(sorted(item.arguments)))
    return tuple(
        tool_json(tool, f"Answers requests of the kind {tool}.", sorted(arguments[tool])) for tool in sorted(arguments)
    )
