"""From a log to records: which exchanges may teach, and why the others may not; each prompt once. Pure."""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flywheel import score, split
from gateway.errors import UnderstudyError
from gateway.records import JSON, Arm, Exchange, Outcome

__all__ = ["CurateOptions", "CurateReport", "Curated", "CurationError", "Record", "curate"]

NO_TOOL = "no_tool"


class CurationError(UnderstudyError):
    """The log does not hold what a run needs; the message says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CurateOptions:
    """`limit` keeps the newest so many records. `validation_fraction` is held out inside the training side.

    `permute_labels` is a control: the training answers are dealt out anew among the training records.
    """

    seed: int = 0
    limit: int | None = None
    minimum: int = 20
    test_fraction: float = 0.40
    validation_fraction: float = 0.10
    own_answers: bool = False
    permute_labels: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One prompt and its answer. `tool` names the first tool called, or `no_tool`; `latency_ms` is the incumbent's."""

    id: str
    request: JSON
    response: JSON
    answer: JSON
    tool: str
    session: str = ""
    latency_ms: float = 0.0
    cost_usd: float | None = None

    @property
    def messages(self) -> list[Any]:
        return list(self.request["messages"])

    @property
    def tools(self) -> list[Any]:
        return list(self.request.get("tools") or [])


@dataclass(frozen=True, slots=True, kw_only=True)
class CurateReport:
    """`read` = everything dropped + `train` + `test`; `train` includes `validation`. No group stands on two sides."""

    read: int
    dropped: Mapping[str, int]
    kept: int
    train: int
    validation: int
    test: int
    groups: int
    tools: Mapping[str, Mapping[str, int]]
    seed: int
    labels: str

    def as_json(self) -> JSON:
        return {
            "read": self.read,
            "dropped": dict(self.dropped),
            "kept": self.kept,
            "train": self.train,
            "validation": self.validation,
            "test": self.test,
            "groups": self.groups,
            "tools": {tool: dict(counts) for tool, counts in self.tools.items()},
            "seed": self.seed,
            "labels": self.labels,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Curated:
    """The three sets. `train` excludes `validation`; no prompt, group or record stands in two of them."""

    train: Sequence[Record]
    validation: Sequence[Record]
    test: Sequence[Record]
    report: CurateReport


@dataclass(slots=True)
class _Tally:
    dropped: Counter[str] = field(default_factory=Counter)
    read: int = 0


def curate(exchanges: Iterable[Exchange], options: CurateOptions) -> Curated:
    """Validate, deduplicate, settle contradictions, and split without leakage. Equal input and seed: equal result.

    Raises CurationError where too few records remain, or where all of them belong together.
    """
    tally = _Tally()
    valid = _valid(exchanges, options, tally)
    records = _unique(valid, tally)
    if options.limit is not None and len(records) > options.limit:
        tally.dropped["over_limit"] += len(records) - options.limit
        records = records[-options.limit :]
    if len(records) < options.minimum:
        raise CurationError(
            f"{len(records)} usable records of {tally.read} exchanges, {options.minimum} needed; dropped: "
            f"{_told(tally.dropped)}; let more traffic pass first"
        )
    groups = split.groups([_item(record) for record in records])
    if len(groups) < 2:
        raise CurationError(
            f"all {len(records)} records belong to one group (same session or same template), so nothing can be held "
            "out; send distinct session ids or more varied traffic"
        )
    train_groups, test_groups = split.halves(groups, options.test_fraction, options.seed)
    fit_groups, validation_groups = split.halves(train_groups, options.validation_fraction, options.seed + 1)
    by_id = {record.id: record for record in records}
    fit, validation, test = (_members(part, by_id) for part in (fit_groups, validation_groups, test_groups))
    if options.permute_labels:
        fit, validation = _permuted(fit, validation, options.seed)
    return Curated(
        train=fit, validation=validation, test=test, report=_report(tally, options, len(groups), fit, validation, test)
    )


def _report(
    tally: _Tally,
    options: CurateOptions,
    groups: int,
    fit: Sequence[Record],
    validation: Sequence[Record],
    test: Sequence[Record],
) -> CurateReport:
    train_tools = Counter(record.tool for record in (*fit, *validation))
    test_tools = Counter(record.tool for record in test)
    return CurateReport(
        read=tally.read,
        dropped=dict(sorted(tally.dropped.items())),
        kept=len(fit) + len(validation) + len(test),
        train=len(fit) + len(validation),
        validation=len(validation),
        test=len(test),
        groups=groups,
        tools={
            tool: {"train": train_tools[tool], "test": test_tools[tool]} for tool in sorted(train_tools | test_tools)
        },
        seed=options.seed,
        labels="permuted" if options.permute_labels else "as logged",
    )


def _valid(exchanges: Iterable[Exchange], options: CurateOptions, tally: _Tally) -> list[Record]:
    records: dict[str, Record] = {}
    for exchange in exchanges:
        tally.read += 1
        reason = _unfit(exchange, own_answers=options.own_answers) or _malformed(exchange)
        if reason is None and exchange.id in records:
            reason = "same_id"
        if reason is not None:
            tally.dropped[reason] += 1
            continue
        records[exchange.id] = _record(exchange)
    return [records[exchange_id] for exchange_id in sorted(records)]


def _unfit(exchange: Exchange, *, own_answers: bool) -> str | None:
    """Why this exchange may not teach, whatever its content. A candidate's own answers would teach it its errors."""
    if exchange.mirror_of or exchange.arm is Arm.MIRROR:
        return "mirror"
    if not own_answers and (exchange.arm is Arm.CANDIDATE or ":" in exchange.model):
        return "candidate_answer"
    if exchange.outcome is not Outcome.OK:
        return "outcome"
    return None


def _malformed(exchange: Exchange) -> str | None:
    messages = (exchange.request or {}).get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(entry, dict) for entry in messages):
        return "no_messages"
    if not isinstance((exchange.request or {}).get("tools") or [], list):
        return "tools"
    message = score.message_of(exchange.response)
    if message is None:
        return "no_answer"
    if _finish(exchange.response) == "length":
        return "truncated"
    calls = score.calls_of(message)
    if not calls and not score.normalised(_plain(message.get("content"))):
        return "empty_answer"
    if not all(call.valid for call in calls):
        return "arguments"
    offered = _offered(exchange.request or {})
    return None if all(call.name in offered for call in calls) else "unknown_tool"


def _finish(response: JSON | None) -> Any:
    choice = (response or {})["choices"][0]
    return choice.get("finish_reason")


def _offered(request: Mapping[str, Any]) -> set[str]:
    functions = [entry.get("function") for entry in request.get("tools") or [] if isinstance(entry, dict)]
    return {str(function.get("name")) for function in functions if isinstance(function, dict)}


def _record(exchange: Exchange) -> Record:
    message = score.message_of(exchange.response) or {}
    calls = score.calls_of(message)
    return Record(
        id=exchange.id,
        request=exchange.request or {},
        response=exchange.response or {},
        answer=_answer(message, calls),
        tool=calls[0].name if calls else NO_TOOL,
        session=exchange.session_id,
        latency_ms=exchange.latency_ms,
        cost_usd=exchange.cost_usd,
    )


def _answer(message: JSON, calls: Sequence[score.Call]) -> JSON:
    """The assistant message to learn: a new object with only what is to be said, arguments as JSON text."""
    answer: JSON = {"role": "assistant", "content": _plain(message.get("content"))}
    if calls:
        answer["tool_calls"] = [
            {
                "id": f"call_{position}",
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
            }
            for position, call in enumerate(calls)
        ]
    return answer


def _unique(records: Sequence[Record], tally: _Tally) -> list[Record]:
    """Each prompt once, the newest of the answer that most replies gave; where no answer leads, none."""
    by_prompt: defaultdict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_prompt[score.canonical([record.messages, record.tools])].append(record)
    kept: list[Record] = []
    for same in by_prompt.values():
        votes = Counter(_said(record) for record in same)
        (leader, most), *others = votes.most_common()
        if others and others[0][1] == most:
            tally.dropped["contradictory_tie"] += len(same)
            continue
        agreeing = [record for record in same if _said(record) == leader]
        tally.dropped["outvoted"] += len(same) - len(agreeing)
        tally.dropped["duplicate"] += len(agreeing) - 1
        kept.append(agreeing[-1])
    tally.dropped = +tally.dropped  # without the zeros
    return sorted(kept, key=lambda record: record.id)


def _said(record: Record) -> str:
    calls = sorted(f"{call.name}\0{score.canonical(call.arguments)}" for call in score.calls_of(record.answer))
    return "\1".join(calls) if calls else score.normalised(record.answer["content"])


def _item(record: Record) -> split.Item:
    values = [call.arguments for call in score.calls_of(record.answer)]
    texts = [_plain(entry.get("content")) for entry in record.messages if entry.get("role") == "user"]
    return split.Item(
        id=record.id,
        label=record.tool,
        text=texts[-1] if texts else "",
        values=tuple(_leaves(values)),
        keys=(*((f"session:{record.session}",) if record.session else ()), *_conversation(record)),
    )


def _conversation(record: Record) -> tuple[str, ...]:
    """What the turns of one conversation share: its first question with the first answer to it."""
    turns = [entry for entry in (*record.messages, record.answer) if entry.get("role") in ("user", "assistant")]
    roles = [entry["role"] for entry in turns]
    if "user" not in roles or "assistant" not in roles[roles.index("user") :]:
        return ()
    asked = turns[roles.index("user")]
    answered = turns[roles.index("assistant", roles.index("user"))]
    calls = [(call.name, call.arguments) for call in score.calls_of(answered)]
    said = score.canonical([_plain(asked.get("content")), _plain(answered.get("content")), calls])
    return (f"conversation:{said}",)


def _leaves(value: Any) -> Iterable[str]:
    match value:
        case dict():
            for entry in value.values():
                yield from _leaves(entry)
        case list():
            for entry in value:
                yield from _leaves(entry)
        case bool() | None:
            return
        case _:
            yield str(value)


def _plain(content: Any) -> str:
    if isinstance(content, list):
        return " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _members(groups: Sequence[split.Group], by_id: Mapping[str, Record]) -> list[Record]:
    return sorted((by_id[item.id] for group in groups for item in group), key=lambda record: record.id)


def _permuted(fit: Sequence[Record], validation: Sequence[Record], seed: int) -> tuple[list[Record], list[Record]]:
    everyone = [*fit, *validation]
    answers = [(record.answer, record.tool) for record in everyone]
    random.Random(seed).shuffle(answers)
    dealt = [
        replace(record, answer=answer, tool=tool) for record, (answer, tool) in zip(everyone, answers, strict=True)
    ]
    return dealt[: len(fit)], dealt[len(fit) :]


def _told(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in dropped.items()) or "none"
