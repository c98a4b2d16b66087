"""Rollouts and overlays as JSON objects, for the control database and for the gateway's last good snapshot."""

from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter

from routing.rollout import Observed, Rollout
from routing.targets import Overlay

__all__ = [
    "observed_from_dict",
    "observed_to_dict",
    "overlay_from_dict",
    "overlay_to_dict",
    "rollout_from_dict",
    "rollout_to_dict",
]

JSON = dict[str, Any]

_OVERLAY = TypeAdapter(Overlay)
_ROLLOUT = TypeAdapter(Rollout)
_OBSERVED = TypeAdapter(Observed)


def overlay_to_dict(overlay: Overlay) -> JSON:
    return asdict(overlay)


def overlay_from_dict(value: JSON) -> Overlay:
    """Raises ValueError where `value` is not what `overlay_to_dict` wrote."""
    return _OVERLAY.validate_python(value)


def rollout_to_dict(rollout: Rollout) -> JSON:
    dumped: JSON = _ROLLOUT.dump_python(rollout, mode="json")
    return dumped


def rollout_from_dict(value: JSON) -> Rollout:
    """Raises ValueError where `value` is not what `rollout_to_dict` wrote."""
    return _ROLLOUT.validate_python(value)


def observed_to_dict(event: Observed) -> JSON:
    """What a person wants to see of the last look: the readings, and the counts since the step began."""
    dumped: JSON = _OBSERVED.dump_python(event, mode="json")
    return dumped


def observed_from_dict(value: JSON) -> Observed:
    """Raises ValueError where `value` is not what `observed_to_dict` wrote."""
    return _OBSERVED.validate_python(value)
