"""What the control plane's requests say and what its replies hold, as OpenAPI describes them."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from flywheel.client_keys import NewKey, Text
from routing.approval import Approval
from routing.evidence import Kind, Metric
from routing.rollout import Degraded, Observed, RolloutPolicy, State
from routing.targets import Overlay, Ref

__all__ = [
    "AskedBody",
    "AuditBody",
    "ErrorBody",
    "ExpectedBody",
    "HealthBody",
    "KeptKeyBody",
    "MadeKeyBody",
    "NewKeyBody",
    "PromoteBody",
    "RolloutBody",
    "StartBody",
    "StartedBody",
    "TrafficBody",
    "WhoBody",
]


class _Asking(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class WhoBody(_Asking):
    """Who asks."""

    who: Text = Field(
        default="", max_length=255, description="Who asks, where authentication is off; with a key its owner does."
    )


class _WhyBody(WhoBody):
    why: Text = Field(default="", max_length=10_000, description="Why; it goes into the history.")


class AskedBody(_WhyBody):
    """What is asked of a rollout."""

    if_version: int | None = Field(
        default=None, ge=0, description="The version that was seen: 409 where anybody changed the rollout since."
    )


class PromoteBody(AskedBody):
    """An approval."""

    full: bool = Field(default=False, description="Go to promoted at once, without waiting for evidence.")


class StartBody(_WhyBody):
    """A rollout to be started."""

    workload: Text = Field(description="A workload of routing.yaml with a rollout section.")
    candidate: Text = Field(description="MODEL of routing.yaml, or MODEL:ADAPTER.")
    supersede: bool = Field(default=False, description="End a rollout that is under way on the workload.")
    despite_cooldown: bool = Field(
        default=False, description="Although it was taken back a short while ago; wants a why."
    )


class TrafficBody(BaseModel):
    """The newest exchanges of the step under way."""

    exchanges: int
    candidate: int = Field(description="How many of them the candidate served.")
    keys: int = Field(description="Their distinct sticky keys.")
    largest: float = Field(description="The share (0..1) of the commonest key.")
    actual: float | None = Field(description="The candidate's share (0..1); null where there was no traffic.")
    warning: str = Field(description='What to know before trusting a weight; "" where the keys are many.')


class RolloutBody(BaseModel):
    """A rollout and where it stands, as `rollout status --json` says it. Times are epoch seconds."""

    model_config = ConfigDict(extra="forbid")

    id: str
    workload: str
    candidate: Ref
    policy: RolloutPolicy = Field(description="What routing.yaml said when it started.")
    created_at: float
    step_started_at: float
    salt: str
    incumbent: Ref | None
    before: Overlay | None = Field(description="What comes back when it is taken back.")
    state: State
    step: int = Field(description="From 0.")
    approved: int = Field(description="The last step whose end was approved, -1 for none.")
    approvals: tuple[Approval, ...]
    degraded: Degraded | None
    taken_back_at: float | None
    paused_from: State | None
    reason: str = Field(description="What it waits for, or why it ended.")
    version: int = Field(description="Counts its changes: see if_version.")
    weight: int = Field(description="The share of live traffic, in per cent, that it is to have.")
    traffic: TrafficBody | None = Field(description="The actual share; null where it is not live, or the log away.")
    observed_at: float | None = Field(description="When the controller last looked.")
    observed: Observed | None = Field(description="Each gate's estimate, bounds, samples and verdict, and the counts.")
    exit_code: int = Field(description="As `rollout status` exits: 0 on its way, 1 ended, 3 a person has to act.")


class ExpectedBody(BaseModel):
    """What a gate will need about: in half of such rollouts fewer samples, in half more."""

    metric: Metric
    kind: Kind
    to_pass: int | None = Field(description="Samples that a good candidate needs; null is endlessly many.")
    if_good: str
    to_fail: int | None = Field(description="Samples after which a bad one is ended; null is endlessly many.")
    if_bad: str


class StartedBody(RolloutBody):
    """The rollout that was started."""

    expected: list[ExpectedBody]


class NewKeyBody(NewKey):
    """A key to be made."""

    who: Text = Field(
        default="", max_length=255, description="Who asks, where authentication is off; with a key its owner does."
    )


class _KeyBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: str
    client: str
    workload: str
    scopes: list[str]
    models: list[str]
    rpm: int | None
    tpm: int | None
    daily_usd: float | None
    expires_at: float | None


class MadeKeyBody(_KeyBody):
    """A new key. Times are epoch seconds."""

    secret: str = Field(description="Shown this once: it is stored nowhere.")


class KeptKeyBody(_KeyBody):
    """A key and its history. Times are epoch seconds."""

    state: str = Field(description="active, expired or revoked.")
    created_at: float
    created_by: str
    revoked_at: float | None
    revoked_by: str | None


class AuditBody(BaseModel):
    """One entry of the audit log. `at` is epoch seconds."""

    seq: int
    at: float
    who: str
    kind: str
    subject: str
    body: Any = Field(description="What happened, with the evidence of that moment.")
    previous: str = Field(description="The hash of the entry before.")
    hash: str


class HealthBody(BaseModel):
    """The process runs."""

    status: str


class _Error(BaseModel):
    message: str
    type: str
    code: str | None
    param: str | None


class ErrorBody(BaseModel):
    """Why not, in OpenAI's shape."""

    error: _Error
