"""routing.yaml: what it becomes, each error with its line and key, and overlays."""

import re
from pathlib import Path

import pytest

from routing.errors import NotFound, Refused, RulesError
from routing.evidence import Gate, Slices
from routing.matching import Match
from routing.rollout import RolloutPolicy, Step
from routing.rules import FlywheelPolicy, Rules, load, parse, startable, with_overlays
from routing.targets import (
    RETRY_ON,
    Breaker,
    Limits,
    Mirror,
    Model,
    Price,
    Privacy,
    Ref,
    Retries,
    Route,
    Timeouts,
)
from tests.routing.examples import ENV, ROUTING_YAML, overlay


def rules(text: str = ROUTING_YAML) -> Rules:
    return parse(text, "routing.yaml", ENV)


def test_models_and_routes() -> None:
    table = rules().table
    assert table.models["small-1b"] == Model(
        name="small-1b",
        upstream="vllm",
        base_url="http://vllm:8001/v1",
        model="meta/llama-3.2-1b",
        adapters=True,
        price=Price(input=0.01, output=0.02),
        timeouts=Timeouts(connect=0.25, first_token=2.0, total=60.0),
    )
    assert table.models["prod-70b"].api_key == "sk-not-to-be-shown"
    assert table.routes["support-router"] == Route(
        workload="support-router",
        serve="prod-70b",
        match=Match(
            headers=(("x-team", "support"),), metadata=(("app", "chat"),), models=("gpt-4o",), tools=("refund",)
        ),
        fallbacks=("backup",),
        sticky=("session", "user"),
        mirrors=(Mirror(model="small-1b", sample=0.1, max_concurrency=2, daily_budget_usd=10),),
        breaker=Breaker(failures=5, open_seconds=30),
        privacy=Privacy(pii="mask", redact="before_spool"),
        retention_seconds=30 * 86_400,
    )
    assert list(table.routes) == ["support-router", "plain"]
    assert table.default == Route(workload="default", serve="prod-70b")
    assert table.overlays == {}


def test_every_condition_of_a_match() -> None:
    """One value may stand without a list."""
    wanted = (
        "match: {client: app, path: [/v1/embeddings, /v1/completions], tools_fingerprint: '0123456789abcdef', "
        "system_fingerprint: [00000000000000aa], system_pattern: '(?i)refund|return'}"
    )
    table = rules(ROUTING_YAML.replace("match: {model: [gpt-4o-mini, gpt-4.1-mini]}", wanted)).table
    assert table.routes["plain"].match == Match(
        clients=("app",),
        paths=("/v1/embeddings", "/v1/completions"),
        tools_fingerprints=("0123456789abcdef",),
        system_fingerprints=("00000000000000aa",),
        system_pattern="(?i)refund|return",
    )


def test_privacy_is_off_unless_a_route_says_so() -> None:
    """The default route has the same keys; YAML reads a plain `off` as false, and means off."""
    table = rules().table
    assert table.routes["plain"].privacy == Privacy(pii="off", redact="before_store")
    assert table.routes["plain"].retention_seconds is None
    said = "default: {serve: prod-70b, privacy: {pii: drop}, retention: 12h}"
    default = rules(ROUTING_YAML.replace("default: {serve: prod-70b}", said)).table.default
    assert (default.privacy, default.retention_seconds) == (Privacy(pii="drop"), 43_200)
    off = rules(ROUTING_YAML.replace("pii: mask", "pii: off")).table.routes["support-router"]
    assert off.privacy.pii == "off"


def test_policies() -> None:
    found = rules()
    assert found.rollouts == {
        "support-router": RolloutPolicy(
            steps=(
                Step(mirror=0.2, min_pairs=200),
                Step(weight=5, hold_seconds=600, min_exchanges=30),
                Step(weight=100, min_exchanges=20),
            ),
            gates=(
                Gate(metric="tool_name", kind="prove", threshold=0.8, alpha=0.05, harm_alpha=0.05 / 3),
                Gate(metric="error_rate", kind="guard", threshold=0.01, harm_alpha=0.05 / 3),
                Gate(metric="latency_p95_ms", kind="guard", threshold=900, harm_alpha=0.05 / 3),
            ),
            approval="manual",
        )
    }
    assert found.flywheels == {
        "support-router": FlywheelPolicy(
            base_models=("small-1b",),
            cadence="0 3 * * *",
            min_new_records=300,
            training={"rank": 16, "lr": 1e-4},
        )
    }


def gate(line: str) -> Gate:
    """The gate of a file in which that line is the only one."""
    head, _, rest = ROUTING_YAML.partition("        - {metric: tool_name")
    found = rules(f"{head}        - {line}\n      approval{rest.partition('approval')[2]}").rollouts["support-router"]
    assert len(found.gates) == 1
    return found.gates[0]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (
            "{metric: tool_call_match, prove: {non_inferior_to: incumbent, margin: 0.03, alpha: 0.05}}",
            Gate(metric="tool_call", kind="prove", threshold=0.97, against="incumbent", margin=0.03),
        ),
        (
            "{metric: tool_call, prove: {non_inferior_to: noise_ceiling, margin: 0.03}}",
            Gate(metric="tool_call", kind="prove", threshold=0.97, against="noise_ceiling", margin=0.03),
        ),
        (
            "{metric: latency_p95, guard: {at_most: 1.0x}}",
            Gate(metric="latency_p95_ms", kind="guard", threshold=1.0, against="incumbent", ratio=1.0),
        ),
        (
            "{metric: ttft_p50, guard: {non_inferior_to: incumbent, margin: 0.1}}",
            Gate(metric="ttft_p50_ms", kind="guard", threshold=-0.1, against="incumbent", margin=0.1),
        ),
        (
            "{metric: format_valid, prove: {non_inferior_to: incumbent, margin: 0.02, horizon: 900}}",
            Gate(metric="format_valid", kind="prove", threshold=-0.02, against="incumbent", margin=0.02, horizon=900),
        ),
        ("{metric: error_rate, at_most: 0.01}", Gate(metric="error_rate", kind="guard", threshold=0.01)),
        ("{metric: feedback, at_most: 0.1}", Gate(metric="feedback", kind="guard", threshold=0.1)),
        ("{metric: refusal_rate, at_most: 0.1}", Gate(metric="refusal_rate", kind="guard", threshold=0.1)),
        ("{metric: latency_p99_ms, at_most: 900}", Gate(metric="latency_p99_ms", kind="guard", threshold=900)),
        (
            "{metric: cost, at_most: 0.002}",
            Gate(metric="cost_usd", kind="guard", threshold=0.002, bound=0.02),
        ),
        (
            "{metric: cost_usd, prove: {at_most: 0.5x, bound: 0.1}}",
            Gate(metric="cost_usd", kind="prove", threshold=0.5, against="incumbent", ratio=0.5, bound=0.1),
        ),
        (
            "{metric: tool_call, at_least: .9, slices: {by: tool, floor: .7}}",
            Gate(metric="tool_call", kind="prove", threshold=0.9, slices=Slices(floor=0.7), harm_alpha=0.025),
        ),
    ],
)
def test_each_form_of_a_gate(line: str, wanted: Gate) -> None:
    """The kind where none is written: prove for agreements, guard for all else."""
    assert gate(line) == wanted


def test_the_life_after_promotion_and_its_keys() -> None:
    """Safe where the file says nothing: roll back, rest for a day, one approver, the model's own deadlines."""
    plain = rules().rollouts["support-router"]
    assert (plain.on_drift, plain.cooldown_seconds, plain.approvers) == ("rollback", 86_400, 1)
    assert plain.first_token_seconds is None
    keys = "approval: manual\n      approvers: 2\n      on_drift: pause\n      cooldown: 2h\n      first_token: 2s"
    said = rules(ROUTING_YAML.replace("approval: manual", keys)).rollouts["support-router"]
    assert (said.on_drift, said.cooldown_seconds, said.approvers) == ("pause", 7200, 2)
    assert said.first_token_seconds == 2.0


def test_secrets_are_never_printed() -> None:
    assert "sk-not" not in repr(rules())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("serve: prod-70b\n    fall", "serve: prod\n    fall", '@serve: no model "prod"; did you mean "prod-70b"?'),
        ("fallbacks: [backup]", "fallbacks: [backup, bakup]", '@fallbacks.1: no model "bakup"; did you mean "backup"?'),
        (
            "mirror: [{model: small-1b",
            "mirror: [{model: big",
            '@mirror.0.model: no model "big"; there are: backup, prod-70b, small-1b',
        ),
        (
            "base_models: [small-1b]",
            "base_models: [smal-1b]",
            '@flywheel.base_models.0: no model "smal-1b"; did you mean "small-1b"?',
        ),
        (
            "base_models: [small-1b]",
            "base_models: [backup]",
            '@flywheel.base_models.0: model "backup" serves no adapters; give it adapters: true, or drop customized',
        ),
        (
            "default: {serve: prod-70b}",
            "default: {serve: 'backup:a1'}",
            'default.serve: model "backup" serves no adapters; give it adapters: true',
        ),
        ("    fallbacks:", "    fallback:", '@fallback: unknown key; did you mean "fallbacks"?'),
        (
            "first_token: 2s",
            "first_tokn: 2s",
            'models.small-1b.timeouts.first_tokn: unknown key; did you mean "first_token"?',
        ),
        (
            "first_token: 2s",
            "first_token: soon",
            "models.small-1b.timeouts.first_token: not a duration; write 30s, 10m, 1h,…",
        ),
        (
            "approval: manual",
            "approval: auto\n      approvers: 2",
            "@rollout.approvers: approval: auto asks nobody; write approval: manual",
        ),
        (
            "approval: manual",
            "on_drift: restart",
            "@rollout.on_drift: input should be 'pause', 'rollback', 'run' or 'mark'",
        ),
        ("approval: manual", "first_token: 0s", "@rollout.first_token: wants a time above zero, as 2s"),
        ("hold: 10m", "hold: -3", "@rollout.steps.1.hold: not a duration; write 30s, 10m, 1h,…"),
        ("hold: 10m", "hold: yes", "@rollout.steps.1.hold: not a duration; write 30s, 10m, 1h,…"),
        ("env:NIM_API_KEY", "env:OTHER_KEY", "models.prod-70b.api_key: the environment variable OTHER_KEY is not set"),
        (
            "env:NIM_API_KEY",
            "sk-12345",
            "models.prod-70b.api_key: a key does not belong in this file; put it in an environment variable and "
            "write env:NAME",
        ),
        (
            "http://vllm:8001/v1",
            "vllm:8001",
            "models.small-1b.base_url: wants http:// or https://, as http://host:8000/v1",
        ),
        (
            "upstream: vllm",
            "upstream: anthropic",
            "models.small-1b.upstream: no such upstream; write openai, nim or vllm, or litellm with the provider in "
            "model, as anthropic/claude-sonnet-4-5",
        ),
        ("adapters: true", "adapters: 3", "models.small-1b.adapters: input should be a valid boolean"),
        (
            "serve: prod-70b",
            "serve: [{model: prod-70b, weight: 80}, {model: backup, weight: 10}]",
            "@serve: the weights must add up to 100, but these make 90",
        ),
        (
            "serve: prod-70b",
            "serve: [{model: prod-70b, weight: 80}, {model: backup, weight: 20}]",
            "@rollout: a rollout takes over from one incumbent, but serve names several models: name one, or drop this",
        ),
        (
            "serve: small-1b",
            "serve: [{model: small-1b, weight: 80}, {model: bakup, weight: 20}]",
            'workloads.plain.serve.1.model: no model "bakup"; did you mean "backup"?',
        ),
        (
            "serve: prod-70b",
            "serve: [{model: backup, weight: 80}, {model: backup, weight: 20}]",
            "@serve: names a model twice",
        ),
        (
            "serve: small-1b",
            "serve: [{model: a, wait: 1}]",
            'workloads.plain.serve.0.wait: unknown key; did you mean "weight"?',
        ),
        (
            "serve: small-1b",
            "serve: 3",
            "workloads.plain.serve: wants a model's name, or several as [(model: NAME, weight: PER CENT), ...]",
        ),
        (
            "fallbacks: [backup]",
            "fallback_on: [429, slow]",
            "@fallback_on.1: not a failure; write connect, timeout, cut, 4xx, 5xx or a status from 400 to 599, as 429",
        ),
        (
            "fallbacks: [backup]",
            "retries: {on: [200]}",
            "@retries.on.0: not a failure; write connect, timeout, cut, 4xx, 5xx or a status from 400 to 599, as 429",
        ),
        (
            "adapters: true",
            "limits: {concurrent: 0}",
            "models.small-1b.limits.concurrent: input should be greater than or equal to 1",
        ),
        ("sample: 0.1,", "sample: 10,", "@mirror.0.sample: input should be less than or equal to 1"),
        ("app: chat", "app: 3", "@match.metadata.app: input should be a valid string"),
        ("sticky: [session, user]", "sticky: [ip]", "@sticky.0: input should be 'session', 'user' or 'conversation'"),
        (
            "metric: tool_name",
            "metric: tool_match",
            '@rollout.gates.0.metric: "tool_match" is not available; there are: '
            "tool_name, tool_call, format_valid, refusal_rate, error_rate, feedback, cost_usd, latency_p50_ms, "
            "latency_p95_ms, latency_p99_ms, ttft_p50_ms, ttft_p95_ms, ttft_p99_ms",
        ),
        (
            "at_least: .80, ",
            "non_inferior_to: incumbent, ",
            "@rollout.gates.0.prove: non_inferior_to wants a margin, as 0.03",
        ),
        ("at_least: .80, ", "", "@rollout.gates.0.prove: tool_name takes at_least or non_inferior_to"),
        ("at_least: .80", "at_least: 80", "@rollout.gates.0.prove.at_least: input should be less than 1"),
        (
            "at_least: .80",
            "at_least: .80, margin: .1",
            "@rollout.gates.0.prove: a margin belongs to non_inferior_to, or to a ratio of latencies",
        ),
        (
            "guard: {at_most: 0.01}",
            "prove: {at_least: 0.5}",
            "@rollout.gates.1.prove: error_rate takes at_most or non_inferior_to",
        ),
        (
            "guard: {at_most: 0.01}",
            "guard: {at_most: 1}",
            "@rollout.gates.1.guard: error_rate is a share: at_most lies between 0 and 1",
        ),
        (
            "guard: {at_most: 0.01}",
            "guard: {at_most: 1.1x}",
            "@rollout.gates.1.guard: error_rate is a share: compare it by non_inferior_to and margin, not by a ratio",
        ),
        (
            "guard: {at_most: 0.01}",
            "guard: {non_inferior_to: noise_ceiling, margin: 0.1}",
            "@rollout.gates.1.guard: a noise_ceiling is there for tool_call, tool_name",
        ),
        (
            "guard: {at_most: 0.01}",
            "guard: {at_most: 0.01, bound: 1}",
            "@rollout.gates.1.guard: bound is there for cost_usd: the USD from which on one exchange counts "
            "as that much",
        ),
        (
            "error_rate, guard: {at_most: 0.01}",
            "cost, guard: {at_most: 0.01, bound: 0.01}",
            "@rollout.gates.1.guard: bound lies above at_most",
        ),
        (
            "error_rate, guard: {at_most: 0.01}",
            "cost, guard: {non_inferior_to: incumbent}",
            "@rollout.gates.1.guard: cost_usd takes at_most or at_most as 1.2x",
        ),
        (
            "guard: {at_most: 900}",
            "guard: {at_least: .9}",
            "@rollout.gates.2.guard: latency_p95_ms takes at_most or at_most as 1.2x",
        ),
        (
            "guard: {at_most: 900}",
            "guard: {at_most: fast}",
            "@rollout.gates.2.guard.at_most: wants a number, or a ratio to the incumbent as 1.2x",
        ),
        (
            "guard: {at_most: 900}",
            "guard: {at_most: 900}, slices: {by: tool, floor: .7}",
            "@rollout.gates.2.slices: slices are there for tool_call, tool_name",
        ),
        (
            ", guard: {at_most: 900}",
            "",
            "@rollout.gates.2: a gate has either prove or guard, or a bound alone (at_least, at_most)",
        ),
        ("{weight: 100}", "{weight: 99}", "@rollout.steps: the last step must have weight 100"),
        (
            "{weight: 5,",
            "{weight: 100,",
            "@rollout.steps: the weights must rise from step to step, but 100 follows 100",
        ),
        ("{weight: 100}", "{mirror: 0.5}", "@rollout.steps: shadow steps come before the first weight"),
        ("{weight: 100}", "{hold: 1m}", "@rollout.steps.2: a step has either mirror (shadow) or weight (canary)"),
        (
            "min_pairs: 200",
            "min_exchanges: 200",
            "@rollout.steps.0.min_exchanges: a shadow step serves nothing: it takes min_pairs",
        ),
        ("approval: manual", "approval: maybe", "@rollout.approval: input should be 'manual' or 'auto'"),
        (
            "[base, customized]",
            "[base, icl]",
            '@flywheel.experiments: "icl" is not available yet; there are: base, customized',
        ),
        ("[base, customized]", "[bass]", '@flywheel.experiments: "bass" is unknown; there are: base, customized'),
        (
            "0 3 * * *",
            "at three",
            '@flywheel.cadence: wants a cron line of five fields (minute hour day month weekday), as "0 3 * * *"',
        ),
        ("pii: mask", "pii: hide", "@privacy.pii: input should be 'off', 'mask' or 'drop'"),
        ("pii: mask", "pii: on", "@privacy.pii: input should be 'off', 'mask' or 'drop'"),
        ("before_spool", "later", "@privacy.redact: input should be 'before_store' or 'before_spool'"),
        ("{pii: mask, ", "{ppi: mask, ", '@privacy.ppi: unknown key; did you mean "pii"?'),
        ("retention: 30d", "retention: a month", "@retention: not a duration; write 30s, 10m, 1h,…"),
        (
            "retention: 30d",
            "retention: 0",
            "@retention: wants a time above zero, as 30d; where bodies shall not be kept, write privacy: (pii: drop)",
        ),
        ("tools: [refund]", "tool: [refund]", '@match.tool: unknown key; did you mean "tools"?'),
        ("tools: [refund]", "sytem_pattern: x", '@match.sytem_pattern: unknown key; did you mean "system_pattern"?'),
        (
            "tools: [refund]",
            "system_pattern: 'refund('",
            "@match.system_pattern: not a regular expression of RE2: missing ): refund(",
        ),
        (
            "tools: [refund]",
            r"system_pattern: '(?=x)'",
            "@match.system_pattern: not a regular expression of RE2: invalid perl operator: (?=",
        ),
        (
            "tools: [refund]",
            "system_pattern: ''",
            "@match.system_pattern: an empty pattern is in every prompt; leave the key out",
        ),
        (
            "tools: [refund]",
            "tools_fingerprint: 1234567812345678",
            "@match.tools_fingerprint.0: not a fingerprint: 16 hexadecimal digits in quotes, "
            "as `understudy routes explain` shows it",
        ),
        (
            "tools: [refund]",
            "path: embeddings",
            "@match.path: wants the whole path, as /v1/chat/completions",
        ),
        ("version: 1", "version: 2", "version: input should be 1"),
        ("  plain:", "  default:", "workloads.default: the workload default is the section default, beside workloads"),
        ("  plain:", "  support-router:", "support-router: this key stands here twice"),
        ("  backup:", "  back:up:", None),
        (
            "default: {serve: prod-70b}",
            "default: prod-70b",
            "default: wants a mapping with serve, match, fallbacks, fallback_on, retries, sticky, include_usage, "
            "mirror, breaker, rollout, flywheel, privacy, retention",
        ),
        ("default: {serve: prod-70b}", "default: {serve: prod-70b", None),
        ("default: {serve: prod-70b}", "default: &a [*a]", "an alias that contains itself"),
        ("default: {serve: prod-70b}", "? [a, b]\n: c", "a key must be a word"),
    ],
)
def test_each_error_names_line_and_key(old: str, new: str, message: str | None) -> None:
    """`@` stands for `workloads.support-router.`, and the dots at the end for the rest of a sentence."""
    assert old in ROUTING_YAML
    text = ROUTING_YAML.replace(old, new, 1)
    with pytest.raises(RulesError) as caught:
        rules(text)
    told = str(caught.value)
    assert "\n" not in told
    where, _, what = told.removeprefix("routing.yaml:").partition(": ")
    if message is not None:
        message = re.sub("^@", "workloads.support-router.", message)
        assert what.replace(" 250ms or a number of seconds", "…") == message
        leaf = message.split(": ")[0].split(".")[-1]
        shown = text.splitlines()[int(where) - 1]
        assert leaf.isdigit() or leaf in shown or "alias" in leaf or "word" in leaf
    assert 1 <= int(where) <= len(text.splitlines()) + 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "routing.yaml:1: the file is empty; it needs at least models and default"),
        ("# nothing\n", "routing.yaml:1: the file is empty; it needs at least models and default"),
        (
            "models: {}\ndefault: {serve: a}",
            "routing.yaml:1: models: dictionary should have at least 1 item after validation, not 0",
        ),
        ("version: 1\nmodels: {a: {base_url: http://a, model: a}}\n", "routing.yaml:1: default: missing"),
        ("just words", "routing.yaml:1: wants a mapping with version, rollouts, models, workloads, default"),
        ("a: 1\nb: [1\n", "routing.yaml:3: not YAML: expected ',' or ']', but got '<stream end>'"),
        ("a: 1\n\tb: 2", "routing.yaml:2: not YAML: found character '\\t' that cannot start any token"),
        ("a: 1\n---\nb: 1", "routing.yaml:2: not YAML: but found another document"),
        ("a: \0", "routing.yaml:1: not YAML: unacceptable character #x0000: special characters are not allowed"),
        ("a: " + "[" * 5000, "routing.yaml:1: nested too deeply"),
    ],
)
def test_files_that_are_none(text: str, message: str) -> None:
    with pytest.raises(RulesError) as caught:
        rules(text)
    assert str(caught.value) == message


def test_how_calls_are_served() -> None:
    """Several models that share a workload, failures that are tried again or fall back, and a model's limits."""
    several = "serve: [{model: small-1b, weight: 99.5}, {model: backup, weight: 0.5}]"
    more = "fallback_on: [timeout, 429, 5xx]\n    retries: {attempts: 1, on: [429], backoff: 1s, most: 2s}"
    text = ROUTING_YAML.replace("serve: small-1b", f"{several}\n    {more}")
    limits = "limits: {concurrent: 4, queue: 8, wait: 500ms}"
    text = text.replace("adapters: true", f"adapters: true\n    {limits}\n    retries: {{}}")
    table = rules(text).table
    plain, small = table.routes["plain"], table.models["small-1b"]
    assert (plain.serve, plain.split) == ("small-1b", (("small-1b", 99.5), ("backup", 0.5)))
    assert plain.fallback_on == ("timeout", "429", "5xx")
    assert plain.retries == Retries(attempts=1, on=("429",), backoff=1.0, most=2.0)
    assert small.limits == Limits(concurrent=4, queue=8, wait=0.5)
    assert small.retries == Retries(attempts=2, on=RETRY_ON)
    assert table.models["backup"].retries.attempts == 0


def test_no_deadline_is_later_than_the_total() -> None:
    text = ROUTING_YAML.replace("{connect: 250ms, first_token: 2s, total: 1m}", "{total: 100ms}")
    assert rules(text).table.models["small-1b"].timeouts == Timeouts(connect=0.1, first_token=0.1, total=0.1)


def test_the_first_of_several_errors_is_told() -> None:
    text = ROUTING_YAML.replace("hold: 10m", "hold: x").replace("upstream: nim", "upstream: nimm")
    with pytest.raises(RulesError, match=r"^routing\.yaml:3: models\.prod-70b\.upstream"):
        rules(text)


def test_loading_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(RulesError, match=r"gone\.yaml: no such file"):
        load(tmp_path / "gone.yaml", {})
    with pytest.raises(RulesError, match="Is a directory"):
        load(tmp_path, {})
    (tmp_path / "routing.yaml").write_bytes(b"a: \xff")
    with pytest.raises(RulesError, match="not UTF-8 text"):
        load(tmp_path / "routing.yaml", {})
    (tmp_path / "routing.yaml").write_text(ROUTING_YAML)
    assert load(tmp_path / "routing.yaml", ENV).table == rules().table


def test_base_urls_may_come_from_the_environment() -> None:
    text = ROUTING_YAML.replace("http://vllm:8001/v1", "env:VLLM_URL")
    one, other = (parse(text, "r", ENV | {"VLLM_URL": url}) for url in ("http://a/v1/", "http://b/v1"))
    assert one.table.models["small-1b"].base_url == "http://a/v1"
    assert one.table.snapshot != other.table.snapshot


OVERLAY = overlay(25, workload="support-router", candidate=Ref(model="small-1b", adapter="a1"))


def test_overlays_are_laid_and_named() -> None:
    """The snapshot's name depends on the file and on the overlays, and on nothing else."""
    found = rules()
    laid = with_overlays(found, {"support-router": OVERLAY, "unheard-of": overlay(5)})
    assert laid.overlays == {"support-router": OVERLAY}
    assert laid.snapshot == with_overlays(rules(), {"support-router": OVERLAY}).snapshot
    others = [with_overlays(found, {}), with_overlays(rules(ROUTING_YAML + "#"), {"support-router": OVERLAY})]
    assert len({laid.snapshot, *(table.snapshot for table in others)}) == 3
    assert with_overlays(found, {}) is found.table


def test_rollouts_off_sends_everything_to_the_incumbents() -> None:
    off = rules(ROUTING_YAML + "rollouts: off\n")
    assert with_overlays(off, {"support-router": OVERLAY}).overlays == {}


def test_a_rollout_follows_the_policy_of_its_workload() -> None:
    found = rules()
    assert startable(found, "support-router", Ref(model="small-1b", adapter="a")) is found.rollouts["support-router"]


@pytest.mark.parametrize(
    ("workload", "candidate", "message"),
    [
        ("support", "small-1b", 'no workload support in routing.yaml; did you mean "support-router"?'),
        ("plain", "backup", "workload plain has no rollout section in routing.yaml: write its steps and gates first"),
        ("support-router", "small", 'no model "small" in routing.yaml; did you mean "small-1b"?'),
        ("support-router", "backup:a", 'model "backup" serves no adapters; give it adapters: true in routing.yaml'),
        ("support-router", "prod-70b", "prod-70b serves workload support-router already"),
    ],
)
def test_what_cannot_be_rolled_out_is_refused(workload: str, candidate: str, message: str) -> None:
    with pytest.raises((Refused, NotFound)) as caught:
        startable(rules(), workload, Ref.parse(candidate))
    assert str(caught.value) == message


def test_no_rollout_starts_where_several_models_serve() -> None:
    several = "serve: [{model: small-1b, weight: 50}, {model: backup, weight: 50}]"
    found = rules(ROUTING_YAML.replace("serve: small-1b", several))
    with pytest.raises(Refused, match="workload plain has several models in serve"):
        startable(found, "plain", Ref(model="prod-70b"))


def test_no_rollout_starts_where_rollouts_are_off() -> None:
    with pytest.raises(Refused, match="rollouts: off"):
        startable(rules(ROUTING_YAML + "rollouts: off\n"), "support-router", Ref(model="small-1b"))
