"""routing.yaml -> RouteTable: loading, checking with file and line, and laying the rollouts' overlays over it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from routing.codec import overlay_to_dict
from routing.document import Document, read_document
from routing.errors import NotFound, Refused, RulesError
from routing.evidence import AGREEMENTS, Gate, Slices
from routing.gates import COST_BOUND
from routing.matching import Match
from routing.proxies import NO_PROXY, proxy_of
from routing.rollout import RolloutPolicy, Step
from routing.schema import (
    BoundSection,
    File,
    FlywheelSection,
    GateSection,
    ModelSection,
    RetriesSection,
    RolloutSection,
    RouteSection,
    suggest,
)
from routing.targets import (
    Breaker,
    Limits,
    Mirror,
    Model,
    Overlay,
    Price,
    Privacy,
    Ref,
    Retries,
    Route,
    RouteTable,
    Timeouts,
    resolve,
)

__all__ = ["FlywheelPolicy", "Rules", "Unresolved", "load", "parse", "resolved", "startable", "with_overlays"]

MIN_PAIRS = 50  # a shadow step's, and
MIN_EXCHANGES = 20  # a canary step's fresh evidence, where the file says nothing

Experiment = Literal["base", "customized"]
Prices = Callable[[str], Price | None]
Place = tuple[str | int, ...]


def no_prices(_model: str) -> Price | None:
    """For those who do not need to know what a provider's model costs."""
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class FlywheelPolicy:
    """A workload's `flywheel` section. `cadence` is a cron line; `training` goes to the trainer as it stands."""

    base_models: tuple[str, ...]
    experiments: tuple[Experiment, ...] = ("base", "customized")
    cadence: str | None = None
    min_new_records: int = 500
    min_records: int = 50
    test_fraction: float = 0.4
    validation_fraction: float = 0.1
    limit: int | None = None
    seed: int = 0
    training: Mapping[str, Any] = field(default_factory=dict)
    start_rollout: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What routing.yaml says. `table` has no overlays; `rollouts` and `flywheels` are by workload, where declared.

    `written` are the models by name with their `env:NAME` as the file has them, so that they can be kept on disk.
    `rollouts_on` is the file's `rollouts: on | off`: where it is off no overlay is laid. `digest` names the content,
    which `text` is.
    """

    table: RouteTable
    written: Mapping[str, Model]
    rollouts: Mapping[str, RolloutPolicy]
    flywheels: Mapping[str, FlywheelPolicy]
    rollouts_on: bool
    digest: str
    text: str = field(repr=False)


def load(path: Path, env: Mapping[str, str], prices: Prices = no_prices) -> Rules:
    """Read and check a file; `env` answers `env:NAME`. Raises RulesError: one line with file, line and key.

    `prices` is asked what a provider's model costs, as anthropic/claude-sonnet-4-5, where the file does not say.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RulesError(f"{path}: no such file; write one, or name it as routing_file in the settings") from error
    except UnicodeDecodeError as error:
        raise RulesError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise RulesError(f"{path}: {error.strerror}") from error
    rules = parse(text, str(path), env, prices)
    for model in rules.table.models.values():
        if model.ca_file and not Path(model.ca_file).is_file():
            raise RulesError(f"{path}: models.{model.name}.ca_file: {model.ca_file}: no such file")
    return rules


def parse(text: str, name: str, env: Mapping[str, str], prices: Prices = no_prices) -> Rules:
    """Check `text`; `name` stands for the file in messages. Raises RulesError: one line with file, line and key."""
    document = read_document(text, name)
    try:
        file = File.model_validate(document.data)
    except ValidationError as error:
        raise _first(document, error) from error
    written = {key: _model(key, section, prices) for key, section in file.models.items()}
    try:
        models = {key: resolved(model, env) for key, model in written.items()}
    except Unresolved as error:
        raise document.error(("models", error.model, error.key), error.what) from error
    sections = {**file.workloads, "default": file.default}
    for workload, section in sections.items():
        _check_references(document, _at(workload), section, models)
    routes = {workload: _route(workload, section) for workload, section in sections.items()}
    default = routes.pop("default")
    urls = sorted((model.name, model.base_url) for model in models.values())
    digest = sha256(json.dumps([text, urls]).encode()).hexdigest()
    return Rules(
        table=RouteTable(snapshot=digest[:12], models=models, routes=routes, default=default),
        written=written,
        rollouts={name: _rollout(section.rollout) for name, section in sections.items() if section.rollout},
        flywheels={name: _flywheel(section.flywheel) for name, section in sections.items() if section.flywheel},
        rollouts_on=file.rollouts,
        digest=digest,
        text=text,
    )


def with_overlays(rules: Rules, overlays: Mapping[str, Overlay]) -> RouteTable:
    """The table with each known workload's overlay laid over its route, under a snapshot name of its own.

    The rules alone where the file says `rollouts: off`, or where no overlay is for a workload of the file.
    """
    table = rules.table
    laid = {name: overlay for name, overlay in sorted(overlays.items()) if name in table.plans}
    if not rules.rollouts_on or not laid:
        return table
    body = json.dumps([rules.digest, [overlay_to_dict(overlay) for overlay in laid.values()]], sort_keys=True)
    snapshot = sha256(body.encode()).hexdigest()[:12]
    return table.laid(snapshot, laid)


def _at(workload: str) -> Place:
    return ("default",) if workload == "default" else ("workloads", workload)


def _first(document: Document, error: ValidationError) -> RulesError:
    """The error that stands first in the file."""
    placed = [(_path(detail), detail) for detail in error.errors(include_url=False, include_input=False)]
    path, detail = min(placed, key=lambda one: document.line(one[0]))
    return document.error(path, _words(detail))


def _path(detail: ErrorDetails) -> Place:
    key = detail.get("ctx", {}).get("key")
    return (*detail["loc"], key) if key else detail["loc"]


def _words(detail: ErrorDetails) -> str:
    if detail["type"] == "missing":
        return "missing"
    message = detail["msg"]
    return message[0].lower() + message[1:].replace("\n", " ")


class Unresolved(Exception):
    """What stands under `key` of a model, or what its `env:NAME` stands for, is of no use."""

    def __init__(self, model: str, key: str, what: str) -> None:
        super().__init__(f"{model}.{key}: {what}")
        self.model, self.key, self.what = model, key, what


def resolved(model: Model, env: Mapping[str, str]) -> Model:
    """The model with what its `env:NAME` stand for in `env`. Raises Unresolved."""

    def value(key: str, text: str) -> str:
        if not text.startswith("env:"):
            return text
        variable = text.removeprefix("env:")
        if not env.get(variable):
            raise Unresolved(model.name, key, f"the environment variable {variable} is not set")
        return env[variable]

    base_url = value("base_url", model.base_url)
    if base_url and not base_url.startswith(("http://", "https://")):
        raise Unresolved(model.name, "base_url", "wants http:// or https://, as http://host:8000/v1")
    api_key = value("api_key", model.api_key) if model.api_key is not None else None
    options = tuple(
        (name, value(f"options.{name}", said) if isinstance(said, str) else said) for name, said in model.options
    )
    proxy = value("proxy", model.proxy) if model.proxy is not None else proxy_of(base_url, env)
    if model.upstream == "litellm" or proxy == NO_PROXY:
        proxy = None
    elif proxy is not None and not proxy.startswith(("http://", "https://")):
        raise Unresolved(model.name, "proxy", f"wants http:// or https://, as http://proxy:3128, or {NO_PROXY}")
    return replace(model, base_url=base_url.rstrip("/"), api_key=api_key, options=options, proxy=proxy)


def _model(name: str, section: ModelSection, prices: Prices) -> Model:
    price = Price(input=section.price.input, output=section.price.output) if section.price else None
    if price is None and section.upstream == "litellm":
        price = prices(section.model)
    return Model(
        name=name,
        upstream=section.upstream,
        base_url=section.base_url or "",
        model=section.model,
        api_key=section.api_key,
        adapters=section.adapters,
        options=tuple(section.options.items()),
        ca_file=section.ca_file or "",
        proxy=section.proxy,
        price=price,
        timeouts=Timeouts(
            connect=min(section.timeouts.connect, section.timeouts.total),
            first_token=min(section.timeouts.first_token, section.timeouts.total),
            total=section.timeouts.total,
        ),
        retries=_retries(section.retries) or Retries(),
        limits=Limits(**section.limits.model_dump()) if section.limits else None,
    )


def _retries(section: RetriesSection | None) -> Retries | None:
    if section is None:
        return None
    return Retries(attempts=section.attempts, on=tuple(section.on), backoff=section.backoff, most=section.most)


def _check_references(document: Document, at: Place, section: RouteSection, models: Mapping[str, Model]) -> None:
    one = len(section.serve) == 1
    named: list[tuple[Place, str]] = [
        ((*at, "serve") if one else (*at, "serve", i, "model"), part.model) for i, part in enumerate(section.serve)
    ]
    named += [((*at, "fallbacks", i), name) for i, name in enumerate(section.fallbacks)]
    named += [((*at, "mirror", i, "model"), mirror.model) for i, mirror in enumerate(section.mirror)]
    for path, name in named:
        ref = Ref.parse(name)
        if ref.model not in models:
            raise document.error(path, f'no model "{ref.model}"{suggest(ref.model, models)}')
        if resolve(models, ref) is None:
            raise document.error(path, f'model "{ref.model}" serves no adapters; give it adapters: true')
    flywheel = section.flywheel
    for i, name in enumerate(flywheel.base_models if flywheel else ()):
        path = (*at, "flywheel", "base_models", i)
        if name not in models:
            raise document.error(path, f'no model "{name}"{suggest(name, models)}')
        if models[name].upstream == "litellm":
            raise document.error(path, f'model "{name}" is a provider\'s: runs try models on servers of your own')
        if flywheel and "customized" in flywheel.experiments and not models[name].adapters:
            raise document.error(path, f'model "{name}" serves no adapters; give it adapters: true, or drop customized')


def _route(workload: str, section: RouteSection) -> Route:
    wanted = section.match
    return Route(
        workload=workload,
        serve=section.serve[0].model,
        split=tuple((part.model, part.weight) for part in section.serve) if len(section.serve) > 1 else (),
        match=Match(
            headers=tuple((name.lower(), value) for name, value in wanted.header.items()),
            metadata=tuple(wanted.metadata.items()),
            models=tuple(wanted.model),
            tools=tuple(wanted.tools),
            clients=tuple(wanted.client),
            paths=tuple(wanted.path),
            tools_fingerprints=tuple(wanted.tools_fingerprint),
            system_fingerprints=tuple(wanted.system_fingerprint),
            system_pattern=wanted.system_pattern,
        ),
        fallbacks=tuple(section.fallbacks),
        fallback_on=tuple(section.fallback_on),
        retries=_retries(section.retries),
        sticky=tuple(section.sticky),
        include_usage=section.include_usage,
        mirrors=tuple(Mirror(**mirror.model_dump()) for mirror in section.mirror),
        breaker=Breaker(failures=section.breaker.failures, open_seconds=section.breaker.open),
        privacy=Privacy(pii=section.privacy.pii, redact=section.privacy.redact),
        retention_seconds=section.retention,
    )


def _rollout(section: RolloutSection) -> RolloutPolicy:
    steps = tuple(
        Step(
            weight=step.weight or 0,
            mirror=step.mirror or 0.0,
            hold_seconds=step.hold,
            min_pairs=step.min_pairs or (0 if step.weight else MIN_PAIRS),
            min_exchanges=step.min_exchanges or (MIN_EXCHANGES if step.weight else 0),
        )
        for step in section.steps
    )
    return RolloutPolicy(
        steps=steps,
        gates=_gates(section.gates),
        approval=section.approval,
        approvers=section.approvers,
        on_drift=section.on_drift,
        cooldown_seconds=section.cooldown,
        first_token_seconds=section.first_token,
        reverse_mirror=section.reverse_mirror,
        max_concurrency=section.max_concurrency,
        daily_budget_usd=section.daily_budget_usd,
    )


def _gates(sections: Sequence[GateSection]) -> tuple[Gate, ...]:
    """Each gate proves harm at its alpha over the number of harm processes; a gate's slices are one more."""
    harms = len(sections) + sum(section.slices is not None for section in sections)
    return tuple(_gate(section, harms) for section in sections)


def _gate(section: GateSection, harms: int) -> Gate:
    metric: Any = section.metric  # one of Metric: the schema has seen to it
    asked = section.asked
    figure = asked.at_most if isinstance(asked.at_most, float) else None
    return Gate(
        metric=metric,
        kind=section.kind,
        threshold=_threshold(metric, asked),
        alpha=asked.alpha,
        min_samples=asked.min_samples,
        horizon=asked.horizon,
        against="incumbent" if asked.ratio is not None else asked.non_inferior_to or "bound",
        margin=asked.margin or 0.0,
        ratio=asked.ratio,
        bound=COST_BOUND * figure if metric == "cost_usd" and figure and not asked.bound else asked.bound,
        harm_alpha=asked.alpha / harms if harms > 1 else None,
        slices=Slices(floor=section.slices.floor) if section.slices else None,
    )


def _threshold(metric: str, asked: BoundSection) -> float:
    """As Gate says; a reference that is yet to be measured adds its part when a rollout starts."""
    for given in (asked.ratio, asked.at_most, asked.at_least):
        if isinstance(given, float):
            return given
    margin = asked.margin or 0.0
    return 1 - margin if metric in AGREEMENTS else -margin


def _flywheel(section: FlywheelSection) -> FlywheelPolicy:
    values = section.model_dump()
    values["base_models"] = tuple(section.base_models)
    values["experiments"] = tuple(section.experiments)
    return FlywheelPolicy(**values)


def startable(rules: Rules, workload: str, candidate: Ref) -> RolloutPolicy:
    """The policy that a rollout of `candidate` on `workload` would follow.

    Raises NotFound for a workload that the file lacks, and Refused where it declares no rollout, switches rollouts
    off, serves the workload by several models, or lacks the candidate.
    """
    if workload not in rules.table.plans:
        raise NotFound(f"no workload {workload} in routing.yaml{suggest(workload, rules.table.plans)}")
    if not rules.rollouts_on:
        raise Refused("routing.yaml says rollouts: off")
    if rules.table.plans[workload].split:
        raise Refused(
            f"workload {workload} has several models in serve: a rollout takes over from one, so name one first"
        )
    policy = rules.rollouts.get(workload)
    if policy is None:
        raise Refused(f"workload {workload} has no rollout section in routing.yaml: write its steps and gates first")
    models = rules.table.models
    if candidate.model not in models:
        raise Refused(f'no model "{candidate.model}" in routing.yaml{suggest(candidate.model, models)}')
    if resolve(models, candidate) is None:
        raise Refused(f'model "{candidate.model}" serves no adapters; give it adapters: true in routing.yaml')
    if str(candidate) == rules.table.plans[workload].incumbent.name:
        raise Refused(f"{candidate} serves workload {workload} already")
    return policy
