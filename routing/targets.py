"""The routing table's values: models, routes, overlays and the immutable snapshot that a decision is made on."""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Literal

from routing.errors import RulesError
from routing.matching import Match, Matching

Upstream = Literal["openai", "nim", "vllm", "litellm"]
StickyKey = Literal["session", "user", "conversation"]
Pii = Literal["off", "mask", "drop"]
RedactAt = Literal["before_store", "before_spool"]
Option = str | bool | int | float

RETRY_ON = ("connect", "429", "502", "503", "504")  # the upstream did nothing, or says so
FALLBACK_ON = ("connect", "timeout", "cut", "408", "429", "5xx")


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """USD per million tokens, as price lists give it."""

    input: float = 0.0
    output: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Seconds: to connect, to the first byte of the reply, and for the whole reply."""

    connect: float = 5.0
    first_token: float = 60.0
    total: float = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """A target is asked again up to `attempts` times, for the failures in `on`, before anything reached the client.

    Failures are `connect`, `timeout`, `cut`, a status, or a class of them as `5xx`. The n-th wait is `backoff` seconds
    doubled n times, at most `most`, less up to half of it by chance.
    """

    attempts: int = 0
    on: tuple[str, ...] = RETRY_ON
    backoff: float = 0.2
    most: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one worker: calls to the model at a time, calls that wait for a place, and for how many seconds."""

    concurrent: int
    queue: int = 0
    wait: float = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A named target. `model` is the name that the upstream knows it by; `api_key` is resolved and never printed.

    `price` is None where nobody knows it. Of an upstream `litellm` the model's name begins with its provider,
    `base_url` is empty for the provider's own address, and `options` are what litellm is told beside. Of the others
    `ca_file` has the certificates to trust ("" for the system's), and `proxy` is the HTTP proxy on the way, if any.
    """

    name: str
    upstream: Upstream
    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    adapters: bool = False
    options: tuple[tuple[str, Option], ...] = field(default=(), repr=False)
    ca_file: str = ""
    proxy: str | None = field(default=None, repr=False)
    price: Price | None = None
    timeouts: Timeouts = Timeouts()
    retries: Retries = Retries()
    limits: Limits | None = None

    @property
    def provider(self) -> str:
        """Who answers: the kind of upstream, or whom litellm asks."""
        return self.model.partition("/")[0] if self.upstream == "litellm" else self.upstream


@dataclass(frozen=True, slots=True, kw_only=True)
class Ref:
    """Names a target: a model of the table, or an adapter that is loaded on it."""

    model: str
    adapter: str | None = None

    def __str__(self) -> str:
        return f"{self.model}:{self.adapter}" if self.adapter else self.model

    @classmethod
    def parse(cls, text: str) -> "Ref":
        """Read `MODEL` or `MODEL:ADAPTER`, the form that `str` writes."""
        model, _, adapter = text.partition(":")
        return cls(model=model, adapter=adapter or None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a call goes: a model as it is to be called, and its name in the log. `name` is `str(ref)`."""

    model: Model
    ref: Ref
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MirrorTarget:
    """One mirror that an exchange is eligible for. `sampled` says whether this exchange is to be copied to it.

    `share` is 0..1 of the eligible exchanges; `rollout` is empty for a standing mirror of routing.yaml.
    """

    target: Target
    share: float
    sampled: bool
    max_concurrency: int = 8
    daily_budget_usd: float | None = None
    rollout: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mirror:
    """A standing mirror of a share `sample` (0..1) of a workload's traffic to a candidate."""

    model: str
    sample: float
    max_concurrency: int = 8
    daily_budget_usd: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Breaker:
    """A target's breaker opens after `failures` failed calls in a row; each `open_seconds` one call tries it again."""

    failures: int = 3
    open_seconds: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Privacy:
    """What the log keeps of a workload's bodies: all, masked, or nothing. `redact` is the station that sees to it."""

    pii: Pii = "off"
    redact: RedactAt = "before_store"

    @property
    def before_spool(self) -> bool:
        """True when not even the spool may have the bytes as they passed."""
        return self.pii != "off" and self.redact == "before_spool"


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """What routing.yaml says of one workload. The rollout and flywheel sections are read by their own packages.

    `split` is empty where one model serves; else it has each model with its share in per cent, and `serve` is the
    first. `fallback_on` has the failures that send a call to the fallbacks, in the words of Retries; `retries` is None
    where each model's own hold. `include_usage` has the gateway ask for the tokens of streams whose client did not.
    `retention_seconds` is how long the log keeps its exchanges; None for as long as the log store does.
    """

    workload: str
    serve: str
    split: tuple[tuple[str, float], ...] = ()
    match: Match = Match()  # noqa: RUF009 -- a frozen value
    fallbacks: tuple[str, ...] = ()
    fallback_on: tuple[str, ...] = FALLBACK_ON
    retries: Retries | None = None
    sticky: tuple[StickyKey, ...] = ("session", "user", "conversation")
    include_usage: bool = False
    mirrors: tuple[Mirror, ...] = ()
    breaker: Breaker = Breaker()
    privacy: Privacy = Privacy()
    retention_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay:
    """What a rollout lays over one route.

    `weight` is the candidate's share of live traffic in per cent. `mirror` is the share (0..1) of the incumbent's
    exchanges that is mirrored to the candidate, `reverse_mirror` the share of the candidate's that is mirrored to the
    incumbent. `incumbent` is None where the route's own `serve` is the incumbent. `first_token_seconds` is the
    candidate's own deadline for the first byte, where it has one.
    """

    workload: str
    rollout: str
    candidate: Ref
    incumbent: Ref | None = None
    weight: int = 0
    mirror: float = 0.0
    reverse_mirror: float = 0.0
    max_concurrency: int = 8
    daily_budget_usd: float | None = None
    first_token_seconds: float | None = None
    salt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One model of several that serve a route: it takes the keys whose draw lies below `below` and no earlier part."""

    below: float  # 0..1
    share: float  # per cent
    target: Target
    fallbacks: tuple[Target, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One route with its overlay, resolved when the table is built, so that a call only draws and picks.

    `split` is empty where one model serves. `lost` is not empty where the overlay names something that the table no
    longer has, or several models serve; the overlay is then not laid.
    """

    route: Route
    incumbent: Target
    incumbent_fallbacks: tuple[Target, ...]
    incumbent_mirrors: tuple[MirrorTarget, ...]
    split: tuple[Part, ...] = ()
    overlay: Overlay | None = None
    candidate: Target | None = None
    candidate_fallbacks: tuple[Target, ...] = ()
    candidate_mirrors: tuple[MirrorTarget, ...] = ()
    lost: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteTable:
    """An immutable snapshot: the file's rules with the rollouts' overlays. `snapshot` names it in each exchange.

    Raises RulesError where a route names a model that `models` lacks; an overlay that does so is not laid.
    """

    snapshot: str
    models: Mapping[str, Model]
    routes: Mapping[str, Route]  # by workload, in the file's order: the first match wins
    default: Route
    overlays: Mapping[str, Overlay] = field(default_factory=dict)  # by workload
    plans: Mapping[str, Plan] = field(init=False, repr=False, compare=False)  # by workload, the default's included
    default_plan: Plan = field(init=False, repr=False, compare=False)
    matchers: tuple[Route, ...] = field(init=False, repr=False, compare=False)  # the routes whose match says something
    matching: Matching = field(init=False, repr=False, compare=False)  # over `matchers`

    def __post_init__(self) -> None:
        plans = {r.workload: _plan(self.models, r, self.overlays.get(r.workload)) for r in self.routes.values()}
        default = _plan(self.models, self.default, self.overlays.get(self.default.workload))
        object.__setattr__(self, "plans", {**plans, self.default.workload: default})
        object.__setattr__(self, "default_plan", default)
        matchers = tuple(route for route in self.routes.values() if route.match != Match())
        object.__setattr__(self, "matchers", matchers)
        object.__setattr__(self, "matching", Matching([route.match for route in matchers]))

    @property
    def every_route(self) -> tuple[Route, ...]:
        return (*self.routes.values(), self.default)

    def laid(self, snapshot: str, overlays: Mapping[str, Overlay]) -> "RouteTable":
        """This table with these overlays in place of its own, under another name; what they don't touch is shared."""
        table = copy(self)
        touched = [self.plans[name].route for name in {*self.overlays, *overlays} if name in self.plans]
        plans = {**self.plans, **{r.workload: _plan(self.models, r, overlays.get(r.workload)) for r in touched}}
        values = {"snapshot": snapshot, "overlays": overlays, "plans": plans}
        for name, value in (values | {"default_plan": plans[self.default.workload]}).items():
            object.__setattr__(table, name, value)
        return table

    def route_of(self, workload: str) -> Route:
        """The workload's route, or the default one."""
        return self.routes.get(workload, self.default)


def resolve(models: Mapping[str, Model], ref: Ref) -> Target | None:
    """The target that `ref` names, or None where the models lack it. An adapter is its server's model of that name."""
    model = models.get(ref.model)
    if model is None or (ref.adapter and not model.adapters):
        return None
    return Target(model=replace(model, model=ref.adapter) if ref.adapter else model, ref=ref, name=str(ref))


def _named(models: Mapping[str, Model], route: Route, name: str) -> Target:
    target = resolve(models, Ref.parse(name))
    if target is None:
        raise RulesError(f'workload {route.workload}: no model "{name}"')
    return target


def _plan(models: Mapping[str, Model], route: Route, overlay: Overlay | None) -> Plan:
    serve = _named(models, route, route.serve)
    fallbacks = tuple(_named(models, route, name) for name in route.fallbacks)
    standing = tuple(
        MirrorTarget(
            target=_named(models, route, mirror.model),
            share=mirror.sample,
            sampled=False,
            max_concurrency=mirror.max_concurrency,
            daily_budget_usd=mirror.daily_budget_usd,
        )
        for mirror in route.mirrors
    )
    split = _split(models, route, fallbacks)
    plain = Plan(route=route, incumbent=serve, incumbent_fallbacks=fallbacks, incumbent_mirrors=standing, split=split)
    if overlay is None:
        return plain
    if split:
        return replace(plain, lost=f"rollout {overlay.rollout} is not laid: serve names several models")
    candidate = resolve(models, overlay.candidate)
    incumbent = resolve(models, overlay.incumbent) if overlay.incumbent else serve
    if candidate is None or incumbent is None:
        missing = overlay.candidate if candidate is None else overlay.incumbent
        return replace(plain, lost=f"rollout {overlay.rollout} is not laid: routing.yaml has no {missing}")
    candidate = _hurried(candidate, overlay.first_token_seconds)
    behind = fallbacks if incumbent.name == serve.name else (serve, *fallbacks)
    return Plan(
        route=route,
        incumbent=incumbent,
        incumbent_fallbacks=_others(incumbent, behind),
        incumbent_mirrors=_mirrors(overlay, candidate, overlay.mirror, standing),
        overlay=overlay,
        candidate=candidate,
        candidate_fallbacks=_others(candidate, (incumbent, *behind)),
        candidate_mirrors=_mirrors(overlay, incumbent, overlay.reverse_mirror, standing),
    )


def _split(models: Mapping[str, Model], route: Route, fallbacks: tuple[Target, ...]) -> tuple[Part, ...]:
    whole = sum(share for _, share in route.split)
    parts: list[Part] = []
    below = 0.0
    for name, share in route.split:
        target = _named(models, route, name)
        below += share
        parts.append(Part(below=below / whole, share=share, target=target, fallbacks=_others(target, fallbacks)))
    return tuple(parts)


def _hurried(target: Target, first_token: float | None) -> Target:
    if first_token is None:
        return target
    timeouts = replace(target.model.timeouts, first_token=first_token)
    return replace(target, model=replace(target.model, timeouts=timeouts))


def _others(served: Target, fallbacks: tuple[Target, ...]) -> tuple[Target, ...]:
    by_name = {target.name: target for target in fallbacks if target.name != served.name}
    return tuple(by_name.values())


def _mirrors(
    overlay: Overlay, target: Target, share: float, standing: tuple[MirrorTarget, ...]
) -> tuple[MirrorTarget, ...]:
    if share <= 0:
        return standing
    own = MirrorTarget(
        target=target,
        share=share,
        sampled=False,
        max_concurrency=overlay.max_concurrency,
        daily_budget_usd=overlay.daily_budget_usd,
        rollout=overlay.rollout,
    )
    return (own, *(mirror for mirror in standing if mirror.target.name != target.name))
