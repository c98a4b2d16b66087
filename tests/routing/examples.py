"""Values that several of routing's tests start from."""

from routing.evidence import Gate, GateReading, Verdict, read
from routing.rollout import RolloutPolicy, Step
from routing.targets import Model, Overlay, Ref, Route, RouteTable

ROUTING_YAML = """\
version: 1
models:
  prod-70b: {upstream: nim, base_url: http://nim:8000/v1, model: meta/llama-3.3-70b, api_key: env:NIM_API_KEY}
  backup: {upstream: openai, base_url: http://backup:8000/v1, model: llama}
  small-1b:
    upstream: vllm
    base_url: http://vllm:8001/v1
    model: meta/llama-3.2-1b
    adapters: true
    price: {input: 0.01, output: 0.02}
    timeouts: {connect: 250ms, first_token: 2s, total: 1m}
workloads:
  support-router:
    match: {header: {X-Team: support}, metadata: {app: chat}, model: gpt-4o, tools: [refund]}
    serve: prod-70b
    fallbacks: [backup]
    sticky: [session, user]
    mirror: [{model: small-1b, sample: 0.1, max_concurrency: 2, daily_budget_usd: 10}]
    breaker: {failures: 5, open: 30s}
    privacy: {pii: mask, redact: before_spool}
    retention: 30d
    rollout:
      steps:
        - {mirror: 0.2, min_pairs: 200}
        - {weight: 5, hold: 10m, min_exchanges: 30}
        - {weight: 100}
      gates:
        - {metric: tool_name, prove: {at_least: .80, alpha: .05}}
        - {metric: error_rate, guard: {at_most: 0.01}}
        - {metric: latency_p95_ms, guard: {at_most: 900}}
      approval: manual
    flywheel:
      cadence: "0 3 * * *"
      min_new_records: 300
      base_models: [small-1b]
      experiments: [base, customized]
      training: {rank: 16, lr: 1e-4}
  plain:
    match: {model: [gpt-4o-mini, gpt-4.1-mini]}
    serve: small-1b
default: {serve: prod-70b}
"""
ENV = {"NIM_API_KEY": "sk-not-to-be-shown"}

GATE = Gate(metric="tool_name", kind="prove", threshold=0.8)
POLICY = RolloutPolicy(
    steps=(
        Step(mirror=0.2, min_pairs=50),
        Step(weight=5, hold_seconds=60, min_exchanges=20),
        Step(weight=50, min_exchanges=20),
        Step(weight=100, min_exchanges=20),
    ),
    gates=(GATE,),
    approval="auto",
)
CANDIDATE = Ref(model="small", adapter="a1")


def reading(verdict: Verdict, gate: Gate = GATE) -> GateReading:
    """A reading with that verdict, from counts where the counts can give it."""
    match verdict:
        case Verdict.SUCCESSFUL:
            return read(gate, 100, 100)
        case Verdict.FAILED:
            return read(gate, 0, 100)
        case Verdict.RUNNING:
            return read(gate, 8, 10)
        case Verdict.PENDING:
            return read(gate, 0, 0)
        case Verdict.ERROR | Verdict.INCONCLUSIVE:
            return GateReading(
                metric=gate.metric,
                kind=gate.kind,
                verdict=verdict,
                estimate=None,
                lower=0.0,
                upper=1.0,
                n=0,
                threshold=gate.threshold,
                why=f"{gate.metric} {verdict}",
            )


def table(overlay: Overlay | None = None, route: Route | None = None) -> RouteTable:
    """A table with one workload `w`, served by `prod`, then `backup`; `small` takes adapters."""
    models = {
        name: Model(
            name=name, upstream="vllm", base_url=f"http://{name}/v1", model=f"up/{name}", adapters=name == "small"
        )
        for name in ("prod", "backup", "small")
    }
    return RouteTable(
        snapshot="s",
        models=models,
        routes={"w": route or Route(workload="w", serve="prod", fallbacks=("backup",))},
        default=Route(workload="default", serve="prod"),
        overlays={"w": overlay} if overlay else {},
    )


def overlay(weight: int, **changes: object) -> Overlay:
    values = {"workload": "w", "rollout": "r1", "candidate": CANDIDATE, "weight": weight, "salt": "r1"} | changes
    return Overlay(**values)  # type: ignore[arg-type]
