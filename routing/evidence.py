"""Anytime-valid evidence on success rates: e-processes, gates and their verdicts. Pure, from counts alone."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from math import exp, inf, lgamma, log, log1p, sqrt
from typing import Literal, assert_never

__all__ = ["Gate", "GateReading", "Verdict", "confidence", "e_value", "prove_at_least", "read", "unreadable", "wilson"]

Metric = Literal["tool_name", "tool_call", "error_rate", "latency_p95_ms"]
Kind = Literal["prove", "guard"]

LATENCY_TAIL = 0.05  # a 95th percentile is above its bound when more than this share of the exchanges is

# The mixture's prior: log odds ratios, normal around log 2.2 (that is .95 against .90), cut off at 0.
_PRIOR_MEAN = log(2.2)
_PRIOR_SD = 0.6
_PRIOR = [0.1 + 0.15 * k for k in range(24)]


class Verdict(StrEnum):
    """What a gate says. ERROR (could not be measured) is not FAILED (measured, and bad)."""

    PENDING = "pending"  # nothing measured yet
    RUNNING = "running"  # measured, not decided
    SUCCESSFUL = "successful"
    FAILED = "failed"
    ERROR = "error"
    INCONCLUSIVE = "inconclusive"  # the horizon was reached without a decision: a person decides


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """One condition of a rollout.

    `threshold` is a share (0..1) for the tool metrics (at least) and for error_rate (at most), and milliseconds for
    latency_p95_ms (at most). `prove` must reject "too bad" at `alpha` within `horizon` samples; `guard` holds, once it
    has `min_samples`, until harm is proved at `alpha`.
    """

    metric: Metric
    kind: Kind
    threshold: float
    alpha: float = 0.05
    min_samples: int = 20
    horizon: int = 5000


@dataclass(frozen=True, slots=True, kw_only=True)
class GateReading:
    """A gate's verdict and what it stands on.

    `estimate`, `lower` and `upper` are shares (0..1): of successes for the tool metrics, of errors for error_rate, of
    replies slower than the threshold for latency_p95_ms. The bounds hold at all times at once, at 1 - alpha.
    """

    metric: Metric
    kind: Kind
    verdict: Verdict
    estimate: float | None
    lower: float
    upper: float
    n: int
    threshold: float
    why: str


@lru_cache(maxsize=256)
def _bets(floor: float) -> tuple[tuple[float, float, float], ...]:
    """For each alternative: log prior weight, and what a success and a failure add to its log likelihood ratio."""
    density = [exp(-(((x - _PRIOR_MEAN) / _PRIOR_SD) ** 2) / 2) for x in _PRIOR]
    total = sum(density)
    bets = []
    for x, weight in zip(_PRIOR, density, strict=True):
        # with odds ratio r = exp(x), p = r f / (1 - f + r f), so p/f = r / c and (1-p)/(1-f) = 1 / c
        c = log1p(floor * (exp(x) - 1))
        bets.append((log(weight / total), x - c, -c))
    return tuple(bets)


def e_value(successes: int, n: int, floor: float) -> float:
    """Evidence against "the success rate is at most `floor`" (0 < floor < 1), as a betting score: 1 is none.

    The mixture sum_k w_k prod_i p_k(x_i) / floor(x_i) over alternatives p_k > floor is a non-negative supermartingale
    under every rate <= floor that starts at 1, so that P(it ever reaches 1/alpha) <= alpha, whenever one looks and
    stops (Ville's inequality: J. Ville, Etude critique de la notion de collectif, 1939; Howard, Ramdas, McAuliffe and
    Sekhon, Time-uniform, nonparametric, nonasymptotic confidence sequences, Annals of Statistics 49(2), 2021; Ramdas,
    Grunwald, Vovk and Shafer, Game-theoretic statistics and safe anytime-valid inference, 2023).
    It depends on the counts alone. For harm ("the rate is at least `floor`") call it with failures and 1 - floor.
    """
    failures = n - successes
    logs = [weight + successes * win + failures * loss for weight, win, loss in _bets(floor)]
    top = max(logs)
    if top > 600:
        return inf
    return exp(top) * sum([exp(value - top) for value in logs])


def confidence(successes: int, n: int, alpha: float) -> tuple[float, float]:
    """A confidence sequence for a success rate: (lower, upper) that hold at all n at once with probability 1 - alpha.

    It holds the rates p for which the mixture martingale with a uniform prior, B(s+1, n-s+1) / (p^s (1-p)^(n-s)), is
    below 1/alpha now (H. Robbins, Statistical methods related to the law of the iterated logarithm, Annals of
    Mathematical Statistics 41, 1970). For display: gates decide by `e_value`, whose prior is sharper.
    """
    if n == 0:
        return 0.0, 1.0
    failures = n - successes
    level = log(alpha) + lgamma(successes + 1) + lgamma(failures + 1) - lgamma(n + 2)

    def inside(p: float) -> bool:
        return (successes * log(p) if successes else 0.0) + (failures * log1p(-p) if failures else 0.0) >= level

    peak = successes / n
    lower = 0.0 if successes == 0 else _edge(inside, 0.0, peak)
    upper = 1.0 if failures == 0 else _edge(inside, 1.0, peak)
    return lower, upper


def _edge(inside: Callable[[float], bool], out: float, within: float) -> float:
    """Where `inside` changes between a point outside and one within, to 2^-20, on the outside."""
    for _ in range(20):
        middle = (out + within) / 2
        if inside(middle):
            within = middle
        else:
            out = middle
    return out


def prove_at_least(successes: int, n: int, floor: float, alpha: float) -> Verdict:
    """Is the success rate above `floor`? SUCCESSFUL and FAILED each err with probability at most `alpha`, ever."""
    if n == 0:
        return Verdict.PENDING
    if e_value(n - successes, n, 1 - floor) >= 1 / alpha:
        return Verdict.FAILED
    if e_value(successes, n, floor) >= 1 / alpha:
        return Verdict.SUCCESSFUL
    return Verdict.RUNNING


def _guard(bad: int, n: int, at_most: float, gate: Gate) -> Verdict:
    if n == 0:
        return Verdict.PENDING
    if e_value(bad, n, at_most) >= 1 / gate.alpha:
        return Verdict.FAILED
    return Verdict.SUCCESSFUL if n >= gate.min_samples else Verdict.RUNNING


def read(gate: Gate, hits: int, n: int) -> GateReading:
    """The gate's reading for `hits` of `n` samples.

    A hit is a pair that agrees (tool_name, tool_call), an exchange that failed (error_rate), or one that was slower
    than the threshold (latency_p95_ms). Raises ValueError where hits lies outside 0..n.
    """
    if not 0 <= hits <= n:
        raise ValueError(f"{gate.metric}: {hits} hits in {n} samples")
    lower, upper = confidence(hits, n, gate.alpha)
    verdict = _verdict(gate, hits, n)
    return GateReading(
        metric=gate.metric,
        kind=gate.kind,
        verdict=verdict,
        estimate=hits / n if n else None,
        lower=lower,
        upper=upper,
        n=n,
        threshold=gate.threshold,
        why=_why(gate, verdict, hits, n),
    )


def unreadable(gate: Gate, why: str) -> GateReading:
    """The reading of a gate that could not be measured; `why` is one line."""
    return GateReading(
        metric=gate.metric,
        kind=gate.kind,
        verdict=Verdict.ERROR,
        estimate=None,
        lower=0.0,
        upper=1.0,
        n=0,
        threshold=gate.threshold,
        why=f"{gate.metric}: {why}",
    )


def _verdict(gate: Gate, hits: int, n: int) -> Verdict:
    match gate.metric:
        case "tool_name" | "tool_call":
            if gate.kind == "guard":
                return _guard(n - hits, n, 1 - gate.threshold, gate)
            verdict = prove_at_least(hits, n, gate.threshold, gate.alpha)
            return Verdict.INCONCLUSIVE if verdict is Verdict.RUNNING and n >= gate.horizon else verdict
        case "error_rate":
            return _guard(hits, n, gate.threshold, gate)
        case "latency_p95_ms":
            return _guard(hits, n, LATENCY_TAIL, gate)
        case _:
            assert_never(gate.metric)


def _why(gate: Gate, verdict: Verdict, hits: int, n: int) -> str:
    match gate.metric:
        case "tool_name" | "tool_call":
            counted = f"{hits} of {n} pairs agree, wanted at least {gate.threshold:g}"
        case "error_rate":
            counted = f"{hits} of {n} exchanges failed, at most {gate.threshold:g} is allowed"
        case "latency_p95_ms":
            counted = f"{hits} of {n} replies took over {gate.threshold:g} ms, at most {LATENCY_TAIL:g} may"
        case _:
            assert_never(gate.metric)
    return f"{gate.metric} {verdict}: {counted}"


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval for a success rate, for reports on a sample that is looked at once; z = 1.96 is 95 %.

    E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22, 1927.
    """
    if n == 0:
        return 0.0, 1.0
    rate = successes / n
    centre = rate + z * z / (2 * n)
    spread = z * sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
