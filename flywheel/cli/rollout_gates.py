"""A rollout's gates as it starts: the pairs that each will need about."""

from collections.abc import Iterator

from routing.gates import Expected, expected
from routing.rollout import RolloutPolicy

__all__ = ["expectations"]


def expectations(policy: RolloutPolicy) -> str:
    """A line for each gate: how many samples about half of such rollouts would need."""
    return "\n".join(_lines(policy))


def _lines(policy: RolloutPolicy) -> Iterator[str]:
    for found in map(expected, policy.gates):
        gate = found.gate
        unit = "pairs" if gate.paired or gate.metric in ("tool_name", "tool_call") else "samples"
        if gate.kind == "guard":
            told = f"holds from {found.to_pass} {unit} on; a candidate"
        else:
            told = f"a candidate {found.if_good} passes after about {_many(found.to_pass)} {unit}{_late(found)}; one"
        yield f"  {gate.metric} ({gate.kind}): {told} {found.if_bad} is ended after about {_many(found.to_fail)}"


def _many(count: int | None) -> str:
    return "endlessly many" if count is None else f"{count:,}"


def _late(found: Expected) -> str:
    horizon = found.gate.horizon
    if found.to_pass is not None and found.to_pass <= horizon:
        return ""
    return f" (at its horizon of {horizon:,} a person decides)"
