"""The trainer's pure parts: the request, the rows, the batches and the lock. No torch is needed here."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from flywheel import train
from flywheel.train import Example, Hyperparameters, TrainError

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": "1"}'}}


def _request(folder: Path, **changes: Any) -> Path:
    request = {"base_model": "b", "train": "t.jsonl", "validation": "v.jsonl", "adapter_name": "a", "seed": 1}
    (folder / "request.json").write_text(json.dumps({**request, **changes}))
    return folder


def _row(text: str, **message: Any) -> str:
    answer = {"role": "assistant", "content": "", "tool_calls": [CALL], **message}
    return json.dumps({"messages": [{"role": "user", "content": text}, answer], "tools": []}) + "\n"


def _render(messages: list[dict[str, Any]], tools: list[Any], open_turn: bool) -> list[int]:
    """A chat template in miniature: each character an id."""
    said = "".join(f"<{m['role'][0]}{m.get('content') or ''}{m.get('tool_calls', '')}>" for m in messages)
    return list(map(ord, said + ("<a" if open_turn else "")))


def test_a_request_is_read_with_defaults(tmp_path: Path) -> None:
    """Relative paths count from the run's folder; what is not said has a default."""
    request = train.load_request(_request(tmp_path, hyperparameters={"epochs": 3}))

    assert request.train == tmp_path / "t.jsonl"
    assert request.hyperparameters == Hyperparameters(epochs=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model": ""}, "'base_model' must be a text"),
        ({"seed": "x"}, "'seed' must be a whole number"),
        ({"epochs": 3}, "unknown key 'epochs'"),
        ({"hyperparameters": {"lr": 1}}, "unknown hyperparameter 'lr'; known are rank"),
        ({"hyperparameters": {"rank": 1.5}}, "'rank' must be a number of type int"),
        ({"hyperparameters": {"rank": True}}, "'rank' must be a number"),
        ({"hyperparameters": {"epochs": 0}}, "'epochs' must be above 0"),
        ({"hyperparameters": [1]}, "'hyperparameters' must be an object"),
    ],
)
def test_a_wrong_request_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """The message names the file and the key."""
    with pytest.raises(TrainError, match=rf"request\.json: .*{message}"):
        train.load_request(_request(tmp_path, **changes))


def test_arguments_become_objects_for_the_template_only() -> None:
    """Logs hold JSON text; the row itself is left as it is."""
    messages = [{"role": "assistant", "content": "", "tool_calls": [CALL]}]

    rendered = train.for_template(messages, "t:1")

    assert rendered[0]["tool_calls"][0]["function"]["arguments"] == {"x": "1"}
    assert messages[0]["tool_calls"][0]["function"]["arguments"] == '{"x": "1"}'


def test_only_what_the_assistant_says_is_learnt(tmp_path: Path) -> None:
    """The prompt's length is kept with the row."""
    path = tmp_path / "t.jsonl"
    path.write_text(_row("hi"))

    (example,) = train.load_examples(path, _render, 1_024).kept

    text = "".join(map(chr, example.ids))
    assert text[: example.prompt] == "<uhi><a"
    assert text[example.prompt :].startswith("[{'id'")


def test_rows_that_are_too_long_are_named(tmp_path: Path) -> None:
    """They are left out, never cut: a cut row would teach a wrong end."""
    path = tmp_path / "t.jsonl"
    path.write_text(_row("hi") + _row("x" * 500) + "\n" + _row("you"))

    examples = train.load_examples(path, _render, 300)

    assert (len(examples.kept), examples.too_long) == (2, (2,))


def test_nothing_need_be_held_back_to_watch_the_training(tmp_path: Path) -> None:
    """But there must be something to learn."""
    path = tmp_path / "none.jsonl"
    path.write_text("")
    assert train.load_examples(path, _render, 300, least=0).kept == ()
    with pytest.raises(train.TrainError, match="no row of at most 300 tokens"):
        train.load_examples(path, _render, 300)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r":2: not JSON"),
        ("[]", r":2: a JSON object is expected"),
        ('{"messages": [{"role": "user", "content": "x"}]}', r":2: 'messages' must be a list that ends with"),
        (_row("x", tool_calls=[{"function": {"name": "f"}}]), r":2: a tool call needs"),
        (_row("x", tool_calls=[{"function": {"name": "f", "arguments": "{"}}]), r":2: not JSON"),
    ],
)
def test_a_wrong_row_is_refused_by_number(tmp_path: Path, line: str, message: str) -> None:
    """The message says which line, and what about it."""
    path = tmp_path / "t.jsonl"
    path.write_text(_row("hi") + line)

    with pytest.raises(TrainError, match=message):
        train.load_examples(path, _render, 1_024)


def test_a_template_that_breaks_its_prompt_is_refused(tmp_path: Path) -> None:
    """Then the assistant's tokens cannot be told from the prompt's."""
    path = tmp_path / "t.jsonl"
    path.write_text(_row("hi"))

    with pytest.raises(TrainError, match="chat template"):
        train.load_examples(path, lambda messages, tools, open_turn: [len(messages)], 1_024)


def test_batches_hold_every_example_once_and_like_with_like() -> None:
    """Little padding, and a fixed order for a fixed seed."""
    examples = [Example(ids=tuple(range(n)), prompt=1) for n in (9, 2, 8, 3, 7, 4, 6)]

    batches = train.batches(examples, 3, random.Random(1))

    assert sorted(len(e.ids) for batch in batches for e in batch) == [2, 3, 4, 6, 7, 8, 9]
    assert {2, 3, 4} in [{len(e.ids) for e in batch} for batch in batches]
    assert batches == train.batches(examples, 3, random.Random(1))


def test_the_learning_rate_rises_and_falls() -> None:
    """From the first step's share to all of it, and down to almost nothing."""
    shares = [train.learning_rate_share(step, 100, 0.1) for step in range(100)]

    assert shares[0] == pytest.approx(0.1)
    assert max(shares) == shares[9] == shares[10] == 1.0
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert shares[-1] < 0.001


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    """The manifest is written last; where it stands, a second start does nothing."""
    (tmp_path / "manifest.json").write_text("{}")

    assert train.main([str(tmp_path)]) == 0
    assert (tmp_path / "manifest.json").read_text() == "{}"


@pytest.mark.parametrize("prepared", [True, False])
def test_a_run_that_cannot_start_says_why(tmp_path: Path, prepared: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit code 2, no manifest."""
    folder = tmp_path if prepared else tmp_path / "none"

    assert train.main([str(folder)]) == 2

    error = capsys.readouterr().err
    assert error.startswith("train: ")
    assert error.count("\n") == 1
    assert not (folder / "manifest.json").exists()
