"""Reading a data file: what is kept, what is refused and where."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from flywheel.demo.workload import WorkloadError, blank, load, sample


def _file(folder: Path, *rows: dict[str, Any] | str) -> Path:
    path = folder / "My Data.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def _row(text: str, intent: str, **more: Any) -> dict[str, Any]:
    return {"text": text, "intent": intent, **more}


def test_tools_come_from_labels_and_slots(tmp_path: Path) -> None:
    """A label is a tool; the slots of its lines are the tool's arguments, none of them required."""
    path = _file(tmp_path, _row("rain in Oslo?", "Weather", slots={"city": "Oslo"}), _row("play it", "Play"))

    workload = load(path)

    assert workload.name == "my-data"
    functions = {tool["function"]["name"]: tool["function"]["parameters"] for tool in workload.tools}
    assert functions["Weather"]["properties"] == {"city": {"type": "string"}}
    assert functions["Weather"]["required"] == []
    assert functions["Play"]["properties"] == {}
    assert workload.items[0].template == "rain in {city}?"


def test_another_label_and_only_some_of_its_values(tmp_path: Path) -> None:
    """LABEL picks the key and ONLY the values that stay."""
    path = _file(tmp_path, *(_row(f"text {d}", "x", domain=d) for d in ("banking", "travel", "kitchen")))

    assert {item.tool for item in load(path, "domain", ("banking", "travel")).items} == {"banking", "travel"}


def test_texts_that_differ_in_case_only_are_one(tmp_path: Path) -> None:
    """The first wins."""
    path = _file(tmp_path, _row("Play it", "Play"), _row("play IT", "Stop"), _row("stop", "Stop"))

    assert [(item.text, item.tool) for item in load(path).items] == [("Play it", "Play"), ("stop", "Stop")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r":2: not JSON"),
        ("[1]", r":2: a JSON object is expected"),
        ('{"intent": "Play"}', r":2: 'text' must be a text"),
        ('{"text": "a", "label": "Play"}', r":2: 'intent' must be a text .*keys here: text, label"),
        ('{"text": "a", "intent": "Play it"}', r":2: intent 'Play it' cannot name a tool"),
        ('{"text": "a", "intent": "Play", "slots": {"n": 1}}', r":2: slots must map"),
    ],
)
def test_a_wrong_line_is_refused_by_number(tmp_path: Path, line: str, message: str) -> None:
    """The message says which line is wrong, and what about it."""
    with pytest.raises(WorkloadError, match=message):
        load(_file(tmp_path, _row("play", "Play"), line))


def test_a_file_that_cannot_be_a_workload_is_refused(tmp_path: Path) -> None:
    """A missing file, a label that no line has, a single tool."""
    path = _file(tmp_path, _row("play", "Play"))

    with pytest.raises(WorkloadError, match="cannot be read"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(WorkloadError, match="no line has intent Stop"):
        load(path, only=("Play", "Stop"))
    with pytest.raises(WorkloadError, match="at least two tools"):
        load(path)


def test_blank_takes_longer_values_first_and_whole_words() -> None:
    """`York` inside `New York`, or inside a longer word, is left alone."""
    assert blank("new york or York, not Yorkshire", {"a": "York", "b": "New York"}) == "{b} or {a}, not Yorkshire"


def test_a_sample_is_even_and_repeatable(tmp_path: Path) -> None:
    """Classes are as even as they allow; the order of the file does not matter."""
    rows = [_row(f"play {n}", "Play") for n in range(30)] + [_row(f"stop {n}", "Stop") for n in range(4)]
    workload = load(_file(tmp_path, *rows))
    turned = load(_file(tmp_path, *reversed(rows)))

    chosen = sample(workload, 12, seed=3)

    assert Counter(item.tool for item in chosen.items) == {"Play": 8, "Stop": 4}
    assert chosen.items == sample(turned, 12, seed=3).items
    assert chosen.items != sample(workload, 12, seed=4).items


def test_a_sample_larger_than_the_data_is_refused(tmp_path: Path) -> None:
    """It says how many there are."""
    workload = load(_file(tmp_path, _row("play", "Play"), _row("stop", "Stop")))

    with pytest.raises(WorkloadError, match="3 items asked for, 2 there"):
        sample(workload, 3, seed=1)
