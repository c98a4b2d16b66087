"""The schema of routing.yaml: what may stand where. Unknown keys are errors; references are checked by rules."""

import re
from difflib import get_close_matches
from itertools import pairwise
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from routing.evidence import AGREEMENTS, MORE_IS_BETTER, TAILS, Metric
from routing.patterns import compile_re2
from routing.rollout import OnDrift
from routing.targets import FALLBACK_ON, RETRY_ON, Option, Pii, RedactAt, StickyKey, Upstream

METRICS: tuple[str, ...] = get_args(Metric)
EXPERIMENTS = ("base", "customized")
RESERVED = ("model", "messages", "api_key", "api_base", "base_url", "timeout", "stream", "max_retries", "num_retries")
METRIC_NAMES = {  # what the file may call them
    **{name: name for name in METRICS},
    **{name.removesuffix("_ms"): name for name in METRICS},
    "tool_call_match": "tool_call",
    "tool_name_match": "tool_name",
    "cost": "cost_usd",
}

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_RATIO = re.compile(r"(\d+(?:\.\d+)?)\s*x")
_CAUSE = re.compile(r"connect|timeout|cut|[45](?:xx|\d\d)")
_SECRET = re.compile(r"(?i)key|secret|token|password|credential")
_CRON = re.compile(r"[\dA-Za-z*/,\-?#]+( +[\dA-Za-z*/,\-?#]+){4}")


def wrong(message: str, *, key: str = "") -> PydanticCustomError:
    """A schema error whose text is `message`, about `key` inside the place where it was found."""
    text = message.replace("{", "(").replace("}", ")")  # pydantic fills braces in
    return PydanticCustomError("routing", text, {"key": key})


def suggest(word: str, known: Any) -> str:
    """What somebody who wrote `word` may have meant, as the end of a message."""
    names = sorted(known)
    close = get_close_matches(word, names, n=1, cutoff=0.5) or [name for name in names if name.startswith(word)][:1]
    if close:
        return f'; did you mean "{close[0]}"?'
    return f"; there are: {', '.join(names)}" if names else ""


def _seconds(value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf"):
        return float(value)
    if isinstance(value, str) and (found := _DURATION.fullmatch(value.strip())):
        return float(found[1]) * _UNITS[found[2]]
    raise wrong("not a duration; write 30s, 10m, 1h, 250ms or a number of seconds")


def _cause(value: Any) -> Any:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(text, str) and _CAUSE.fullmatch(text):
        return text
    raise wrong("not a failure; write connect, timeout, cut, 4xx, 5xx or a status from 400 to 599, as 429")


def _upstream(value: Any) -> Any:
    if value in get_args(Upstream):
        return value
    raise wrong(
        "no such upstream; write openai, nim or vllm, or litellm with the provider in model, as "
        "anthropic/claude-sonnet-4-5"
    )


def _serve(value: Any) -> Any:
    if isinstance(value, str):
        return [{"model": value, "weight": 100.0}]
    if isinstance(value, list):
        return value
    raise wrong("wants a model's name, or several as [(model: NAME, weight: PER CENT), ...]")


def _fingerprint(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{16}", value):
        return value
    raise wrong("not a fingerprint: 16 hexadecimal digits in quotes, as `understudy routes explain` shows it")


Duration = Annotated[float, BeforeValidator(_seconds, json_schema_input_type=float | str)]
Cause = Annotated[str, BeforeValidator(_cause, json_schema_input_type=int | str)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0, lt=1)]
Name = Annotated[str, Field(min_length=1, max_length=255)]
Fingerprint = Annotated[str, BeforeValidator(_fingerprint)]


class Section(BaseModel):
    """One mapping of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for key in value:
                if key not in cls.model_fields:
                    raise wrong(f"unknown key{suggest(key, cls.model_fields)}", key=key)
            return value
        raise wrong(f"wants a mapping with {', '.join(cls.model_fields)}")


class PriceSection(Section):
    """USD per million tokens."""

    input: Annotated[float, Field(ge=0)] = 0.0
    output: Annotated[float, Field(ge=0)] = 0.0


class TimeoutsSection(Section):
    connect: Duration = 5.0
    first_token: Duration = 60.0
    total: Duration = 600.0


class RetriesSection(Section):
    """A failed call is sent to the same model again, before anything of a reply has reached the client."""

    attempts: Annotated[int, Field(ge=0, le=10)] = 2
    on: list[Cause] = list(RETRY_ON)
    backoff: Duration = 0.2
    most: Duration = 5.0


class LimitsSection(Section):
    """Of each worker: calls at a time, how many more wait for a place, and how long."""

    concurrent: Annotated[int, Field(ge=1)]
    queue: Annotated[int, Field(ge=0)] = 0
    wait: Duration = 2.0


class ModelSection(Section):
    """`api_key`, `base_url`, `proxy` and `options` may be `env:NAME`; a secret may be nothing else."""

    upstream: Annotated[Upstream, BeforeValidator(_upstream)] = "openai"
    base_url: Name | None = None
    model: Name
    api_key: str | None = None
    adapters: bool = False
    options: dict[str, Option] = {}
    ca_file: Name | None = None
    proxy: Name | None = None
    price: PriceSection | None = None
    timeouts: TimeoutsSection = TimeoutsSection()
    retries: RetriesSection | None = None
    limits: LimitsSection | None = None

    @field_validator("api_key")
    @classmethod
    def _reference(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith("env:"):
            raise wrong("a key does not belong in this file; put it in an environment variable and write env:NAME")
        return value

    @field_validator("proxy")
    @classmethod
    def _no_login(cls, value: str | None) -> str | None:
        if value is not None and "@" in value:
            raise wrong("a password does not belong in this file; put the URL in a variable and write env:NAME")
        return value

    @field_validator("options")
    @classmethod
    def _references(cls, value: dict[str, Option]) -> dict[str, Option]:
        for name, said in value.items():
            if _SECRET.search(name) and isinstance(said, str) and not said.startswith("env:"):
                raise wrong("a secret does not belong in this file; write env:NAME", key=name)
            if name in RESERVED:
                raise wrong("has a key of its own in the model", key=name)
        return value

    @model_validator(mode="after")
    def _of_its_kind(self) -> Self:
        if self.upstream != "litellm":
            if self.base_url is None:
                raise wrong("missing", key="base_url")
            if self.options:
                raise wrong("only upstream: litellm takes options", key="options")
            return self
        provider, slash, name = self.model.partition("/")
        if not (provider and slash and name):
            raise wrong("wants its provider, as anthropic/claude-sonnet-4-5", key="model")
        for key, variable in (("ca_file", "SSL_CERT_FILE"), ("proxy", "HTTPS_PROXY")):
            if getattr(self, key) is not None:
                raise wrong(f"not with upstream: litellm, which heeds the variable {variable}", key=key)
        if self.adapters:
            raise wrong("a provider takes no adapters of ours", key="adapters")
        return self


class MatchSection(Section):
    """Conditions that must all hold; of several values of one key, one is enough, but of `tools` each is wanted."""

    header: dict[str, str] = {}
    metadata: dict[str, str] = {}
    model: list[str] = []
    client: list[str] = []
    path: list[str] = []
    tools: list[str] = []
    tools_fingerprint: list[Fingerprint] = []
    system_fingerprint: list[Fingerprint] = []
    system_pattern: str = ""

    @field_validator(
        "model", "client", "path", "tools_fingerprint", "system_fingerprint",
        mode="before", json_schema_input_type=list[str] | str,
    )  # fmt: skip
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return value if isinstance(value, list) else [value]

    @field_validator("path")
    @classmethod
    def _whole(cls, value: list[str]) -> list[str]:
        if any(not path.startswith("/") for path in value):
            raise wrong("wants the whole path, as /v1/chat/completions")
        return value

    @field_validator("system_pattern")
    @classmethod
    def _pattern(cls, value: str) -> str:
        try:
            compile_re2(value)
        except ValueError as error:
            raise wrong(f"not a regular expression of RE2: {error}") from error
        if not value:
            raise wrong("an empty pattern is in every prompt; leave the key out")
        return value


class MirrorSection(Section):
    model: Name
    sample: Share
    max_concurrency: Annotated[int, Field(ge=1)] = 8
    daily_budget_usd: Annotated[float, Field(ge=0)] | None = None


class BreakerSection(Section):
    failures: Annotated[int, Field(ge=1)] = 3
    open: Duration = 60.0


class StepSection(Section):
    """Shadow with `mirror` and `min_pairs`, canary with `weight` in per cent and `min_exchanges`."""

    mirror: Annotated[float, Field(gt=0, le=1)] | None = None
    weight: Annotated[int, Field(ge=1, le=100)] | None = None
    hold: Duration = 0.0
    min_pairs: Annotated[int, Field(ge=1)] | None = None
    min_exchanges: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _either(self) -> Self:
        if (self.mirror is None) == (self.weight is None):
            raise wrong("a step has either mirror (shadow) or weight (canary)")
        if self.mirror is not None and self.min_exchanges is not None:
            raise wrong("a shadow step serves nothing: it takes min_pairs", key="min_exchanges")
        return self


def _at_most(value: Any) -> Any:
    """A number, or a ratio to the incumbent as 1.2x, which is kept as text."""
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        if not (found := _RATIO.fullmatch(value.strip())) or float(found[1]) <= 0:
            raise wrong("wants a number, or a ratio to the incumbent as 1.2x")
        return f"{found[1]}x"
    return value


Ratio = Annotated[str, Field(pattern=rf"^\s*{_RATIO.pattern}\s*$")]
AtMost = Annotated[Annotated[float, Field(gt=0)] | Ratio, BeforeValidator(_at_most)]


class BoundSection(Section):
    """What a gate holds the candidate to: a figure, or the incumbent.

    `horizon` is for prove, `min_samples` for guard and for slices, `bound` for cost_usd.
    """

    at_least: Rate | None = None
    at_most: AtMost | None = None
    non_inferior_to: Literal["incumbent", "noise_ceiling"] | None = None
    margin: Rate | None = None
    alpha: Rate = 0.05
    min_samples: Annotated[int, Field(ge=1)] = 20
    horizon: Annotated[int, Field(ge=1)] = 5000
    bound: Annotated[float, Field(gt=0)] | None = None

    @property
    def ratio(self) -> float | None:
        return float(self.at_most.removesuffix("x")) if isinstance(self.at_most, str) else None


class SlicesSection(Section):
    """A floor for each class of pairs, by the tool that the reference called."""

    by: Literal["tool"] = "tool"
    floor: Rate


class GateSection(Section):
    """Either `prove` or `guard`, or a bound alone, which is a `prove` for agreements and a `guard` for the rest."""

    metric: str
    prove: BoundSection | None = None
    guard: BoundSection | None = None
    at_least: Rate | None = None
    at_most: AtMost | None = None
    slices: SlicesSection | None = None

    @field_validator("metric")
    @classmethod
    def _available(cls, value: str) -> str:
        name = METRIC_NAMES.get(value)
        if name is None:
            raise wrong(f'"{value}" is not available; there are: {", ".join(METRICS)}')
        return name

    @model_validator(mode="after")
    def _possible(self) -> Self:
        plain = self.at_least is not None or self.at_most is not None
        if (self.prove is not None) + (self.guard is not None) + plain != 1:
            raise wrong("a gate has either prove or guard, or a bound alone (at_least, at_most)")
        if self.slices is not None and self.metric not in AGREEMENTS:
            raise wrong(f"slices are there for {', '.join(sorted(AGREEMENTS))}", key="slices")
        key = "prove" if self.prove else "guard" if self.guard else ""
        _check_bound(self.metric, self.asked, key)
        return self

    @property
    def kind(self) -> Literal["prove", "guard"]:
        if self.prove or self.guard:
            return "prove" if self.prove else "guard"
        return "prove" if self.metric in AGREEMENTS else "guard"

    @property
    def asked(self) -> BoundSection:
        return self.prove or self.guard or BoundSection(at_least=self.at_least, at_most=self.at_most)


def _check_bound(metric: str, bound: BoundSection, key: str) -> None:
    """Whether the metric can be held to that."""
    more = metric in MORE_IS_BETTER
    as_ratio = metric in TAILS or metric == "cost_usd"
    given = [name for name in ("at_least", "at_most", "non_inferior_to") if getattr(bound, name) is not None]
    barred = "at_most" if more else "at_least"
    if len(given) != 1 or given == [barred] or (metric == "cost_usd" and given == ["non_inferior_to"]):
        compared = "at_most as 1.2x" if as_ratio else "non_inferior_to"
        raise wrong(f"{metric} takes {'at_least' if more else 'at_most'} or {compared}", key=key)
    if not as_ratio and bound.ratio is not None:
        raise wrong(f"{metric} is a share: compare it by non_inferior_to and margin, not by a ratio", key=key)
    if not as_ratio and isinstance(bound.at_most, float) and bound.at_most >= 1:
        raise wrong(f"{metric} is a share: at_most lies between 0 and 1", key=key)
    _check_comparison(metric, bound, key)


def _check_comparison(metric: str, bound: BoundSection, key: str) -> None:
    compared = bound.non_inferior_to is not None or bound.ratio is not None
    if bound.non_inferior_to == "noise_ceiling" and metric not in AGREEMENTS:
        raise wrong(f"a noise_ceiling is there for {', '.join(sorted(AGREEMENTS))}", key=key)
    if bound.non_inferior_to and bound.margin is None and metric not in TAILS:
        raise wrong("non_inferior_to wants a margin, as 0.03", key=key)
    if bound.margin is not None and (not compared or metric == "cost_usd"):
        raise wrong("a margin belongs to non_inferior_to, or to a ratio of latencies", key=key)
    if bound.bound is not None and metric != "cost_usd":
        raise wrong("bound is there for cost_usd: the USD from which on one exchange counts as that much", key=key)
    if bound.bound is not None and isinstance(bound.at_most, float) and bound.bound <= bound.at_most:
        raise wrong("bound lies above at_most", key=key)


class RolloutSection(Section):
    steps: Annotated[list[StepSection], Field(min_length=1)]
    gates: Annotated[list[GateSection], Field(min_length=1)]
    approval: Literal["manual", "auto"] = "manual"
    approvers: Literal[1, 2] = 1
    on_drift: OnDrift = "rollback"
    cooldown: Duration = 86_400.0
    first_token: Duration | None = None
    reverse_mirror: Share = 0.02
    max_concurrency: Annotated[int, Field(ge=1)] = 8
    daily_budget_usd: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _somebody_to_ask(self) -> Self:
        if self.approvers > 1 and self.approval == "auto":
            raise wrong("approval: auto asks nobody; write approval: manual", key="approvers")
        if self.first_token == 0:
            raise wrong("wants a time above zero, as 2s", key="first_token")
        return self

    @field_validator("steps")
    @classmethod
    def _rising(cls, steps: list[StepSection]) -> list[StepSection]:
        weights = [step.weight or 0 for step in steps]
        for earlier, later in pairwise(weights):
            if earlier and not later:
                raise wrong("shadow steps come before the first weight")
            if earlier and later <= earlier:
                raise wrong(f"the weights must rise from step to step, but {later} follows {earlier}")
        if weights[-1] != 100:
            raise wrong("the last step must have weight 100")
        return steps


class FlywheelSection(Section):
    cadence: str | None = None
    min_new_records: Annotated[int, Field(ge=1)] = 500
    min_records: Annotated[int, Field(ge=1)] = 50
    base_models: Annotated[list[Name], Field(min_length=1)]
    experiments: list[str] = list(EXPERIMENTS)
    test_fraction: Rate = 0.4
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    limit: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    training: dict[str, Any] = {}
    start_rollout: bool = True

    @field_validator("cadence")
    @classmethod
    def _cron(cls, value: str | None) -> str | None:
        if value is not None and not _CRON.fullmatch(value.strip()):
            raise wrong('wants a cron line of five fields (minute hour day month weekday), as "0 3 * * *"')
        return value

    @field_validator("experiments")
    @classmethod
    def _experiments(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in EXPERIMENTS:
                what = "is not available yet" if name == "icl" else "is unknown"
                raise wrong(f'"{name}" {what}; there are: {", ".join(EXPERIMENTS)}')
        if not value:
            raise wrong(f"wants at least one of {', '.join(EXPERIMENTS)}")
        return value


class PrivacySection(Section):
    """What the log keeps of a workload's bodies, and from which station on."""

    pii: Pii = "off"
    redact: RedactAt = "before_store"

    @field_validator("pii", mode="before")
    @classmethod
    def _plain_off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a plain off as false


class ServeSection(Section):
    """One of several models that serve a workload, with its share in per cent."""

    model: Name
    weight: Annotated[float, Field(gt=0, le=100)]


class RouteSection(Section):
    serve: Annotated[
        list[ServeSection],
        Field(min_length=1),
        BeforeValidator(_serve, json_schema_input_type=Name | list[ServeSection]),
    ]
    match: MatchSection = MatchSection()
    fallbacks: list[Name] = []
    fallback_on: list[Cause] = list(FALLBACK_ON)
    retries: RetriesSection | None = None
    sticky: Annotated[list[StickyKey], Field(min_length=1)] = ["session", "user", "conversation"]
    include_usage: bool = False
    mirror: list[MirrorSection] = []
    breaker: BreakerSection = BreakerSection()
    rollout: RolloutSection | None = None
    flywheel: FlywheelSection | None = None
    privacy: PrivacySection = PrivacySection()
    retention: Duration | None = None

    @field_validator("serve")
    @classmethod
    def _whole(cls, serve: list[ServeSection]) -> list[ServeSection]:
        whole = sum(part.weight for part in serve)
        if abs(whole - 100) > 1e-6:
            raise wrong(f"the weights must add up to 100, but these make {whole:g}")
        if len({part.model for part in serve}) < len(serve):
            raise wrong("names a model twice")
        return serve

    @model_validator(mode="after")
    def _one_incumbent(self) -> Self:
        if self.rollout is not None and len(self.serve) > 1:
            raise wrong(
                "a rollout takes over from one incumbent, but serve names several models: name one, or drop this",
                key="rollout",
            )
        return self

    @field_validator("retention")
    @classmethod
    def _some_time(cls, value: float | None) -> float | None:
        if value == 0:
            raise wrong("wants a time above zero, as 30d; where bodies shall not be kept, write privacy: (pii: drop)")
        return value


class File(Section):
    """The whole file."""

    version: Literal[1] = 1
    rollouts: bool = True
    models: Annotated[dict[Name, ModelSection], Field(min_length=1)]
    workloads: dict[Name, RouteSection] = {}
    default: RouteSection

    @field_validator("models")
    @classmethod
    def _plain_names(cls, models: dict[str, ModelSection]) -> dict[str, ModelSection]:
        for name in models:
            if ":" in name:
                raise wrong("a model's name has no colon: MODEL:ADAPTER names an adapter", key=name)
        return models

    @field_validator("workloads")
    @classmethod
    def _not_default(cls, workloads: dict[str, RouteSection]) -> dict[str, RouteSection]:
        if "default" in workloads:
            raise wrong("the workload default is the section default, beside workloads", key="default")
        return workloads
