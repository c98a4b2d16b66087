"""Which telemetry leaves the gateway, by the standard OTEL_* variables. Pure: no part of OpenTelemetry is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final, Literal

__all__ = ["Protocol", "Sampling", "Signals", "signals_of"]

Protocol = Literal["http/protobuf", "grpc"]

_MODULES: Final[dict[str, Protocol]] = {
    "opentelemetry.exporter.otlp.proto.http": "http/protobuf",
    "opentelemetry.exporter.otlp.proto.grpc": "grpc",
}
_CAPTURE: Final = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
_TRACE_IDS: Final = 1 << 64  # a ratio is of the lower half of a trace id, as in OpenTelemetry's own sampler


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """OpenTelemetry's built-in samplers as two values: a trace id whose lower 64 bits are below `bound` is sampled.

    With `parent_based` the decision of a caller that has made one counts instead.
    """

    parent_based: bool = True
    bound: int = _TRACE_IDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """What is sent, and how; None is not at all. `problems` are settings that were not understood, in words."""

    traces: Protocol | None = None
    metrics: Protocol | None = None
    logs: Protocol | None = None
    sampling: Sampling = Sampling()
    capture_content: bool = False
    problems: tuple[str, ...] = ()

    @property
    def any(self) -> bool:
        return bool(self.traces or self.metrics or self.logs)


def signals_of(environment: Mapping[str, str]) -> Signals:
    """Read the OTEL_* variables. A signal is on where its exporter is `otlp`, or none is named and it has an endpoint.

    Nothing here raises: variables that are there for other programs must not keep the gateway from starting.
    """
    env = {name: value.strip() for name, value in environment.items() if name.startswith("OTEL_") and value.strip()}
    if env.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return Signals()
    problems: list[str] = []
    if "tracecontext" not in env.get("OTEL_PROPAGATORS", "tracecontext"):
        problems.append("OTEL_PROPAGATORS: only tracecontext is known here; it is used, and baggage passes untouched")
    traces, metrics, logs = (_protocol(env, signal, problems) for signal in ("TRACES", "METRICS", "LOGS"))
    return Signals(
        traces=traces,
        metrics=metrics,
        logs=logs,
        sampling=_sampling(env, problems) if traces else Sampling(),
        capture_content=env.get(_CAPTURE, "").lower() in ("true", "span_only", "span_and_event"),
        problems=tuple(problems),
    )


def _protocol(env: Mapping[str, str], signal: str, problems: list[str]) -> Protocol | None:
    """How a signal is sent, if it is."""
    variable = f"OTEL_{signal}_EXPORTER"
    has_endpoint = "OTEL_EXPORTER_OTLP_ENDPOINT" in env or f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT" in env
    named = {name.strip() for name in env.get(variable, "otlp" if has_endpoint else "none").split(",")}
    others = named - {"otlp", "none", "prometheus"}
    if others:
        problems.append(f"{variable}: {', '.join(sorted(others))} is not known here; use otlp or none")
    if "otlp" not in named:
        return None
    wanted = env.get(f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL", env.get("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"))
    for module, protocol in _MODULES.items():
        if protocol == wanted:
            if _is_installed(module):
                return protocol
            problems.append(f"{variable}: {module} is not installed; pip install 'understudy[otel]'")
            return None
    problems.append(f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL: {wanted} is not known here; use http/protobuf or grpc")
    return None


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _sampling(env: Mapping[str, str], problems: list[str]) -> Sampling:
    name = env.get("OTEL_TRACES_SAMPLER", "parentbased_always_on").lower()
    kind = name.removeprefix("parentbased_")
    bounds = {"always_on": _TRACE_IDS, "always_off": 0, "traceidratio": round(_ratio(env, problems) * _TRACE_IDS)}
    if kind not in bounds:
        problems.append(f"OTEL_TRACES_SAMPLER: {name} is not known here; parentbased_always_on is used")
        return Sampling()
    return Sampling(parent_based=kind != name, bound=bounds[kind])


def _ratio(env: Mapping[str, str], problems: list[str]) -> float:
    text = env.get("OTEL_TRACES_SAMPLER_ARG", "1")
    try:
        ratio = float(text)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio <= 1:
        problems.append(f"OTEL_TRACES_SAMPLER_ARG: {text} is no number from 0 to 1; 1 is used")
        return 1.0
    return ratio
