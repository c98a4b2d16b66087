"""routing.yaml's JSON Schema, for editors: from the pydantic models, with a word about each key."""

import re
from collections.abc import Mapping
from typing import Any, Final

from routing.schema import EXPERIMENTS, METRIC_NAMES, File

__all__ = ["json_schema"]

JSON = dict[str, Any]
DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"

# By SECTION.KEY; a test sees to it that each key of the schema has its line, and that none is left over.
DESCRIPTIONS: Final[Mapping[str, str]] = {
    "File.version": "The format's version: 1.",
    "File.rollouts": "off sends everything to the incumbents: the way back that needs no database.",
    "File.models": "Named targets: where to send, as which upstream model, at which price.",
    "File.workloads": "By name, in order: the first workload whose match holds takes the request.",
    "File.default": "The workload `default`: for requests that no other takes.",
    "ModelSection.upstream": "What kind of server it is; litellm: a provider that does not speak OpenAI's API.",
    "ModelSection.base_url": "http:// or https:// up to and with /v1, or env:NAME. A provider's may be left out.",
    "ModelSection.model": "The name that the server knows the model by; of litellm PROVIDER/NAME.",
    "ModelSection.api_key": "env:NAME, the environment variable that holds the key; never the key itself.",
    "ModelSection.adapters": "true where the server takes LoRA adapters while it serves (vLLM with --enable-lora).",
    "ModelSection.options": "Of litellm: what it is told beside, as aws_region_name; a secret is env:NAME.",
    "ModelSection.ca_file": "Certificates to trust instead of the system's, as a PEM file.",
    "ModelSection.proxy": "HTTP proxy on the way, as http://proxy:3128 or env:NAME; none: whatever HTTPS_PROXY says.",
    "ModelSection.price": "USD per million tokens; without it a provider's is litellm's, and all others are unknown.",
    "ModelSection.timeouts": "Deadlines of a call to this model.",
    "ModelSection.retries": "A failed call is sent to this model again, before its first byte.",
    "ModelSection.limits": "Calls at a time, and how many more may wait.",
    "RetriesSection.attempts": "At most so many times.",
    "RetriesSection.on": "Failures: connect, timeout, cut, a status, or 4xx and 5xx.",
    "RetriesSection.backoff": "The first wait; each further one is twice as long.",
    "RetriesSection.most": "No wait is longer.",
    "LimitsSection.concurrent": "Calls at a time, of each worker.",
    "LimitsSection.queue": "How many more may wait for a place.",
    "LimitsSection.wait": "For how long.",
    "PriceSection.input": "USD per million tokens of the request.",
    "PriceSection.output": "USD per million tokens of the reply.",
    "TimeoutsSection.connect": "Until the connection stands.",
    "TimeoutsSection.first_token": "Until the reply's first byte.",
    "TimeoutsSection.total": "Until the reply's end.",
    "RouteSection.serve": "The incumbent: MODEL, or MODEL:ADAPTER; or several, each with its weight.",
    "ServeSection.model": "MODEL or MODEL:ADAPTER.",
    "ServeSection.weight": "Its share of the traffic in per cent; together they make 100.",
    "RouteSection.match": "Which requests belong here: every condition must hold. Or a request names the workload.",
    "RouteSection.fallbacks": "Models that take over in this order when a call fails before its first byte.",
    "RouteSection.fallback_on": "Failures that send a call to the fallbacks, in the words of retries.",
    "RouteSection.retries": "In place of the models' own.",
    "RouteSection.sticky": "What keeps a conversation on its arm: the first of these that the request has.",
    "RouteSection.include_usage": "Ask for the tokens of streams whose client did not.",
    "RouteSection.mirror": "Standing mirrors: a share of the requests is copied; the replies never reach a client.",
    "RouteSection.breaker": "When calls that go to a failing model, or candidate, go elsewhere at once.",
    "RouteSection.rollout": "How a candidate takes over: steps, gates, who approves.",
    "RouteSection.flywheel": "When runs start, and what they try.",
    "RouteSection.privacy": "What the log keeps of the bodies.",
    "RouteSection.retention": "How long the log keeps this workload's exchanges, as 30d.",
    "MatchSection.header": "Request headers and the value that each must have.",
    "MatchSection.metadata": "Keys of the body's metadata and the value that each must have.",
    "MatchSection.model": "The request's model is one of these.",
    "MatchSection.client": "The request's client is one of these.",
    "MatchSection.path": "The request's path is one of these.",
    "MatchSection.tools": "The request's tools have at least these names.",
    "MatchSection.tools_fingerprint": "Its tool set has one of these, as `understudy routes explain` shows it.",
    "MatchSection.system_fingerprint": "Its system prompt has one of these, as `understudy routes explain` shows it.",
    "MatchSection.system_pattern": "A regular expression of RE2 that its system prompt meets somewhere.",
    "MirrorSection.model": "MODEL or MODEL:ADAPTER that gets the copy.",
    "MirrorSection.sample": "The share of requests, 0 to 1.",
    "MirrorSection.max_concurrency": "At most so many at a time; the rest is shed.",
    "MirrorSection.daily_budget_usd": "No more copies once a day's cost has reached this.",
    "BreakerSection.failures": "Opens after so many failed calls in a row.",
    "BreakerSection.open": "Stays open for so long.",
    "RolloutSection.steps": "Shadow steps (mirror), then canary steps (weight) that rise to 100.",
    "RolloutSection.gates": "Conditions of every step.",
    "RolloutSection.approval": "manual: a person approves each step that raises the weight.",
    "RolloutSection.approvers": "2 asks two different people, each known by an API key, for each step.",
    "RolloutSection.on_drift": "What follows when a promoted candidate is proved to do harm.",
    "RolloutSection.cooldown": "How long a candidate that was taken back may not start again on the workload.",
    "RolloutSection.first_token": "The candidate's own deadline for the first byte; then the incumbent serves.",
    "RolloutSection.reverse_mirror": "The share of a promoted candidate's requests that its predecessor still gets.",
    "RolloutSection.max_concurrency": "At most so many mirrors at a time; the rest is shed.",
    "RolloutSection.daily_budget_usd": "No more mirrors once a day's cost has reached this.",
    "StepSection.mirror": "Shadow: the share of requests, 0 to 1, that is copied to the candidate.",
    "StepSection.weight": "Canary: the candidate's share of the traffic in per cent.",
    "StepSection.hold": "The step lasts at least so long.",
    "StepSection.min_pairs": "The step needs so many pairs.",
    "StepSection.min_exchanges": "The step needs so many exchanges of the candidate.",
    "GateSection.metric": "What is measured.",
    "GateSection.prove": "The gate must prove that the candidate is good enough before a step is passed.",
    "GateSection.guard": "The gate holds until harm is proved.",
    "GateSection.at_least": "A floor alone: prove for agreements, guard for the rest.",
    "GateSection.at_most": "A ceiling alone, as a figure or as 1.2x of the incumbent's: a guard.",
    "GateSection.slices": "A floor for each class of pairs as well.",
    "BoundSection.at_least": "The floor, a share from 0 to 1.",
    "BoundSection.at_most": "The ceiling: a share, milliseconds or USD, or as 1.2x of the incumbent's.",
    "BoundSection.non_inferior_to": "The floor is the incumbent, or how far it agrees with itself, less the margin.",
    "BoundSection.margin": "How much worse than the incumbent is no harm, a share from 0 to 1.",
    "BoundSection.alpha": "The chance to promote what is too bad, or to abort what does no harm.",
    "BoundSection.min_samples": "A guard, or a slice, is successful from so many samples on, while there is no harm.",
    "BoundSection.horizon": "A prove is inconclusive from so many samples on.",
    "BoundSection.bound": "Of cost_usd: the USD that one exchange counts as at most.",
    "SlicesSection.by": "The class: the tool that the reference called.",
    "SlicesSection.floor": "What no class may fall below, a share from 0 to 1.",
    "FlywheelSection.cadence": "A cron line of five fields in UTC, as 0 3 * * *; none starts runs by hand only.",
    "FlywheelSection.min_new_records": "A run waits for so many new exchanges.",
    "FlywheelSection.min_records": "A run needs so many records after curation.",
    "FlywheelSection.base_models": "Models that a run tries.",
    "FlywheelSection.experiments": "How a run uses each base model.",
    "FlywheelSection.test_fraction": "The share of the records that is held out.",
    "FlywheelSection.validation_fraction": "The share of the others that only watches the training; 0: all are learnt.",
    "FlywheelSection.limit": "At most so many records, the newest.",
    "FlywheelSection.seed": "Of every draw in a run.",
    "FlywheelSection.training": "Goes to the trainer as it stands.",
    "FlywheelSection.start_rollout": "The best candidate starts a rollout, where the file has one for the workload.",
    "PrivacySection.pii": "off: bodies as they are; mask: pseudonyms for personal data; drop: no bodies.",
    "PrivacySection.redact": "Before anything is on disk, or on the way to the log store.",
}

NAME: Final[JSON] = {"type": "string", "minLength": 1, "maxLength": 255}
FINGERPRINT: Final[JSON] = {"type": "string", "pattern": "^[0-9a-f]{16}$"}
ONE_OR_MORE: Final[Mapping[str, JSON]] = {
    "path": {"type": "string", "pattern": "^/"},
    "tools_fingerprint": FINGERPRINT,
    "system_fingerprint": FINGERPRINT,
}
CAUSES: Final[JSON] = {
    "anyOf": [
        {"type": "integer", "minimum": 400, "maximum": 599},
        {"type": "string", "pattern": r"^(connect|timeout|cut|[45](xx|\d\d))$"},
    ]
}

# What validators see to, and the types alone do not say.
REFINED: Final[Mapping[str, JSON]] = {
    "File.rollouts": {"enum": [True, False, "on", "off"]},  # YAML 1.2 editors read on and off as words
    "ModelSection.base_url": {"pattern": "^(https?://|env:)"},
    "ModelSection.api_key": {"pattern": "^env:"},
    "ModelSection.proxy": {"pattern": "^(https?://[^@]*|env:.*|none)$"},
    **{f"MatchSection.{key}": {"anyOf": [one, {"type": "array", "items": one}]} for key, one in ONE_OR_MORE.items()},
    "GateSection.metric": {"enum": list(METRIC_NAMES)},
    "RetriesSection.on": {"items": CAUSES},
    "RouteSection.fallback_on": {"items": CAUSES},
    "RouteSection.serve": {
        "anyOf": [NAME, {"type": "array", "items": {"$ref": "#/$defs/ServeSection"}, "minItems": 1}]
    },
    "FlywheelSection.experiments": {"items": {"enum": list(EXPERIMENTS)}, "minItems": 1},
    "PrivacySection.pii": {"enum": ["off", "mask", "drop", False]},  # YAML 1.1 reads a plain off as false
}
LOOSER: Final = ("File.rollouts", "PrivacySection.pii")  # their own type says too little
EITHER: Final[Mapping[str, tuple[str, ...]]] = {
    "StepSection": ("mirror", "weight"),
    "GateSection": ("prove", "guard", "at_least", "at_most"),
    "BoundSection": ("at_least", "at_most", "non_inferior_to"),
}
DURATION: Final = [{"type": "number"}, {"type": "string"}]  # as schema.Duration says it; and what it means by that:
DURATION_REFINED: Final = [
    {"type": "number", "minimum": 0},
    {"type": "string", "pattern": r"^\s*\d+(\.\d+)?(ms|s|m|h|d)\s*$"},
]


def json_schema() -> JSON:
    """The schema of the whole file, JSON Schema 2020-12. References between models are `routes check`'s to see."""
    schema = File.model_json_schema()
    sections: dict[str, JSON] = {"File": schema, **schema["$defs"]}
    for section, body in sections.items():
        for key, value in body["properties"].items():
            _refine(f"{section}.{key}", value)
        body["title"] = _title(section)
    for section, keys in EITHER.items():
        sections[section]["oneOf"] = [{"required": [key]} for key in keys]
    sections["ModelSection"]["anyOf"] = [
        {"required": ["base_url"]},
        {"properties": {"upstream": {"const": "litellm"}}, "required": ["upstream"]},
    ]
    return {"$schema": DIALECT, **schema}


def _refine(name: str, value: JSON) -> None:
    value.pop("title", None)  # the key itself, in capitals
    if name in LOOSER:
        value.pop("type", None)
    if value.get("anyOf", [])[:2] == DURATION:
        value["anyOf"][:2] = DURATION_REFINED
    value.update(REFINED.get(name, {}))
    if name in DESCRIPTIONS:
        value["description"] = DESCRIPTIONS[name]


def _title(section: str) -> str:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", section.removesuffix("Section")).lower()
    return "routing.yaml" if section == "File" else words
