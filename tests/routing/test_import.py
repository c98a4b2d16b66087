"""Other gateways' files: what is taken over routes the same, what is not is listed, and no key is copied."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from flywheel.cli import app
from gateway.errors import ConfigError
from routing.errors import RulesError
from routing.import_litellm import import_litellm
from routing.import_tensorzero import import_tensorzero
from routing.imported import Imported
from routing.references import References
from routing.rules import Rules, parse
from routing.targets import Retries

FILES = Path(__file__).parent / "imports"
LITELLM = (FILES / "litellm.yaml").read_text()
TENSORZERO = (FILES / "tensorzero.toml").read_text()
SECRETS = ("do-not-copy-me", "hunter2")


def rules(imported: Imported) -> Rules:
    return parse(imported.text, "routing.yaml", References())


def asked(imported: Imported, model: str) -> str:
    """The workload whose rule takes the requests for `model`."""
    routes = rules(imported).table.routes.values()
    return next((route.workload for route in routes if model in route.match.models), "default")


def notes(imported: Imported, place: str) -> list[tuple[str, int, str]]:
    return [(note.kind, note.line, note.what) for note in imported.notes if note.place == place]


def test_litellm_s_names_are_asked_for_as_before() -> None:
    imported = import_litellm(LITELLM, "litellm.yaml")
    assert asked(imported, "support-chat") == "support-chat"
    assert asked(imported, "gpt-4") == "gpt-4o"  # an alias
    assert asked(imported, "claude") == "claude"


def test_litellm_s_deployments_are_models() -> None:
    models = rules(import_litellm(LITELLM, "litellm.yaml")).table.models
    first = models["support-chat"]
    assert (first.upstream, first.base_url, first.model) == ("vllm", "http://vllm-a:8000/v1", "qwen3-8b")
    assert (first.timeouts.first_token, first.timeouts.total) == (5.0, 30.0)
    assert (first.price.input, first.price.output) == (0.15, 0.6)
    assert models["support-chat-2"].timeouts.total == 60.0  # the router's
    assert models["small"].api_key is None
    assert {model.retries.attempts for model in models.values()} == {2}
    assert (models["nemotron"].upstream, models["nemotron"].model) == ("nim", "meta/llama-3.3-70b-instruct")
    assert (models["gpt-4o"].base_url, models["gpt-4o"].model) == ("https://api.openai.com/v1", "gpt-4o-2024-11-20")


def test_litellm_s_fallbacks_and_silent_models() -> None:
    table = rules(import_litellm(LITELLM, "litellm.yaml")).table
    route = table.routes["support-chat"]
    assert route.split == (("support-chat", 90.0), ("support-chat-2", 10.0))
    assert route.fallbacks == ("support-chat", "support-chat-2", "gpt-4o", "claude")
    assert [(mirror.model, mirror.sample) for mirror in route.mirrors] == [("small", 1.0)]
    assert table.routes["gpt-4o"].fallbacks == ("nemotron",)  # a default fallback
    assert table.routes["nemotron"].fallbacks == ()


def test_litellm_s_rest_is_listed_with_its_place() -> None:
    imported = import_litellm(LITELLM, "litellm.yaml")
    assert notes(imported, "model_list.7.litellm_params.model")[0][2] == "wants its provider, as openai/NAME"
    assert notes(imported, "router_settings.routing_strategy") == [("left out", 38, "has no equivalent")]
    assert notes(imported, "model_list.2.litellm_params.rpm")  # a limit, where there is nothing to weigh
    assert imported.variables == (
        "ANTHROPIC_API_KEY", "AZURE_API_KEY", "GPT_4O_API_KEY", "NVIDIA_NIM_API_KEY", "VLLM_B", "VLLM_KEY",
    )  # fmt: skip


def test_litellm_s_providers_that_translate_stay_with_litellm() -> None:
    models = rules(import_litellm(LITELLM, "litellm.yaml")).table.models
    claude, azure = models["claude"], models["gpt-4-eu"]
    assert (claude.upstream, claude.model, claude.base_url) == ("litellm", "anthropic/claude-sonnet-4-5", "")
    assert (azure.upstream, azure.model, azure.base_url) == (
        "litellm",
        "azure/gpt-4-eu",
        "https://ours.openai.azure.com",
    )
    assert dict(azure.options) == {"api_version": "2023-05-15"}
    text = """
model_list:
  - model_name: nova
    litellm_params:
      model: bedrock/amazon.nova-pro-v1:0
      aws_region_name: os.environ/REGION
      aws_access_key_id: os.environ/AWS_ID
      aws_secret_access_key: do-not-copy-me
      drop_params: true
      odd: 1
"""
    imported = import_litellm(text, "litellm.yaml")
    assert "do-not-copy-me" not in imported.text
    assert imported.variables == ("AWS_ID", "NOVA_AWS_SECRET_ACCESS_KEY_API_KEY", "REGION")
    env = dict.fromkeys(imported.variables, "set")
    options = dict(parse(imported.text, "routing.yaml", env).table.models["nova"].options)
    assert options == {
        "aws_region_name": "set", "aws_access_key_id": "set", "aws_secret_access_key": "set", "drop_params": True,
    }  # fmt: skip
    assert notes(imported, "model_list.0.litellm_params.odd") == [("left out", 10, "has no equivalent")]


def test_tensorzero_s_functions_are_workloads_under_the_names_that_clients_ask_for() -> None:
    imported = import_tensorzero(TENSORZERO, "tensorzero.toml")
    assert asked(imported, "tensorzero::function_name::draft") == "draft"
    assert asked(imported, "tensorzero::model_name::llama-3.1:70b") == "llama-3.1:70b"
    assert asked(imported, "tensorzero::model_name::qwen") == "default"
    assert notes(imported, "models.qwen")
    table = rules(imported).table
    route = table.routes["draft"]
    assert route.split == (("openai-gpt-5-mini", 90.0), ("qwen", 10.0))
    assert (route.retries, table.routes["extract"].retries) == (Retries(attempts=4, most=10.0), None)
    assert notes(imported, "functions.draft.variants.own") == [
        ("changed", 47, "its calls are tried again 4 times, as those of other variants are")
    ]
    assert route.fallbacks == ("openai-gpt-5-mini", "qwen", "qwen-together")


def test_tensorzero_s_providers_stand_behind_one_another() -> None:
    table = rules(import_tensorzero(TENSORZERO, "tensorzero.toml")).table
    assert (table.routes["extract"].serve, table.routes["extract"].fallbacks) == ("qwen", ("qwen-together",))
    qwen = table.models["qwen"]
    assert (qwen.upstream, qwen.base_url, qwen.api_key) == ("vllm", "http://vllm:8000/v1", None)
    assert (qwen.timeouts.first_token, qwen.timeouts.total) == (3.0, 15.0)
    assert table.models["llama-3.1-70b"].model == "llama-3.1-70b"  # no colon in our names


def test_tensorzero_s_rest_is_listed_with_its_place() -> None:
    imported = import_tensorzero(TENSORZERO, "tensorzero.toml")
    assert notes(imported, "functions.draft.variants.mini.temperature") == [("left out", 44, "has no equivalent")]
    assert notes(imported, "rate_limiting.rules") == [("left out", 79, "has no equivalent")]
    assert "asked for it" in notes(imported, "functions.extract.variants.pinned")[0][2]
    assert imported.variables == ("LLAMA_3_1_70B_API_KEY", "OPENAI_API_KEY", "TOGETHER_KEY")


def test_a_split_that_moves_by_itself_is_told_and_old_weights_are_read() -> None:
    adaptive = TENSORZERO.replace('type = "static"\n', 'type = "adaptive"\nmetric = "exact_match"\n').replace(
        "{ mini = 0.9, own = 0.1 }", '["own", "mini"]'
    )
    imported = import_tensorzero(adaptive, "tensorzero.toml")
    assert "moves the weights by itself" in notes(imported, "functions.draft.experimentation.type")[0][2]
    assert rules(imported).table.routes["draft"].serve == "qwen"
    weighed = TENSORZERO.partition("[functions.draft.experimentation]")[0].replace(
        'model = "qwen"\n', 'model = "qwen"\nweight = 0.7\n'
    )
    assert rules(import_tensorzero(weighed, "tensorzero.toml")).table.routes["draft"].serve == "qwen"


@pytest.mark.parametrize(
    ("convert", "text"),
    [
        (import_litellm, "models: {}"),
        (import_litellm, "model_list: []"),
        (import_litellm, "model_list: [{model_name: a, litellm_params: {model: x}}]"),
        (import_litellm, "model_list: ["),
        (import_litellm, ""),
        (import_tensorzero, "[gateway]"),
        (import_tensorzero, "[models"),
        (import_tensorzero, '[functions.a.variants.b]\nmodel = "anthropic::claude"'),
    ],
)
def test_a_file_that_nothing_can_be_made_of_is_told_by_name(convert: Callable[..., Any], text: str) -> None:
    with pytest.raises(RulesError, match=r"^theirs: |^theirs:1: "):
        convert(text, "theirs")


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of each value in a document."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*at, key)
        yield from places(inner, (*at, key))


def at(data: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        data = data[key]
    return data


THEIRS: Any = yaml.safe_load(LITELLM)
PLACES = list(places(THEIRS))
MAPPINGS = [place for place in [(), *PLACES] if isinstance(at(THEIRS, place), dict)]
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.lists(st.text(max_size=4), max_size=2), st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)  # fmt: skip


@settings(max_examples=60)  # reading YAML with its lines takes its time
@given(st.sampled_from(PLACES), VALUES)
def test_whatever_stands_somewhere_it_is_made_into_a_usable_file_or_told(place: tuple[Any, ...], value: Any) -> None:
    data = copy.deepcopy(THEIRS)
    at(data, place[:-1])[place[-1]] = value
    try:
        imported = import_litellm(yaml.safe_dump(data), "theirs")
    except RulesError:
        return
    assert rules(imported).table.models
    assert not any(secret in str(imported) for secret in SECRETS)


@pytest.mark.parametrize("place", MAPPINGS, ids=str)
def test_no_key_is_dropped_silently(place: tuple[Any, ...]) -> None:
    """A key that nobody knows is in a note of its own, or stands in something that is left out as a whole."""
    data = copy.deepcopy(THEIRS)
    at(data, place)["unheard_of"] = 1
    imported = import_litellm(yaml.safe_dump(data), "theirs")
    dotted = ".".join(map(str, (*place, "unheard_of")))
    told = [note.place for note in imported.notes]
    assert any(dotted == name or dotted.startswith(f"{name}.") for name in told) or lost(place, told)


def lost(place: tuple[Any, ...], told: list[str]) -> bool:
    """In a deployment that is left out for its model or its name."""
    entry = ".".join(map(str, place[:2]))
    return any(name in (f"{entry}.litellm_params.model", f"{entry}.model_name") for name in told)


LINES = TENSORZERO.splitlines()
HEADERS = [number for number, line in enumerate(LINES) if line.startswith("[")]
VALUED = [number for number, line in enumerate(LINES) if " = " in line]


@given(st.sampled_from(VALUED), st.sampled_from(["1", "-1.5", "true", '""', '"a::b"', "[]", "[1]", "{}", "{ a = 1 }"]))
def test_whatever_stands_in_toml_is_made_into_a_usable_file_or_told(number: int, value: str) -> None:
    lines = [*LINES]
    lines[number] = f"{lines[number].partition(' = ')[0]} = {value}"
    try:
        imported = import_tensorzero("\n".join(lines), "theirs")
    except RulesError:
        return
    assert rules(imported).table.models
    assert not any(secret in str(imported) for secret in SECRETS)


@pytest.mark.parametrize("number", HEADERS, ids=lambda number: LINES[number])
def test_no_key_of_a_table_is_dropped_silently(number: int) -> None:
    lines = [*LINES[: number + 1], "unheard_of = 1", *LINES[number + 1 :]]
    imported = import_tensorzero("\n".join(lines), "theirs")
    table = LINES[number].strip("[]").replace('"', "")
    told = [note.place for note in imported.notes]
    assert any(f"{table}.unheard_of" == name or table == name or table.startswith(f"{name}.") for name in told)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)
    return lambda *words, **options: CliRunner().invoke(app, ["routes", *words], **options)


@pytest.mark.parametrize("origin", ["litellm.yaml", "tensorzero.toml"])
def test_the_command_writes_a_file_that_check_accepts(command: Callable[..., Any], tmp_path: Path, origin: str) -> None:
    words = ["import", "--from", origin.partition(".")[0], str(FILES / origin)]
    made = command(*words, "--out", "routing.yaml")
    assert (made.exit_code, made.stdout) == (0, "")
    assert f"left out: {FILES / origin}:" in made.stderr
    variables = json.loads(command(*words, "--json").stdout)["variables"]
    assert f"set before it is used: {', '.join(variables)}" in made.stderr
    env = dict.fromkeys(variables, "http://set")
    assert command("check", env=env).exit_code == 0
    said = made.stderr + (tmp_path / "routing.yaml").read_text()
    assert not any(secret in said for secret in SECRETS)
    again = command(*words, "--out", "routing.yaml")
    assert isinstance(again.exception, ConfigError)
    assert "is there already" in str(again.exception)


def test_the_command_reads_stdin_and_prints(command: Callable[..., Any]) -> None:
    made = command("import", "--from", "litellm", "-", input=LITELLM)
    assert made.exit_code == 0
    assert yaml.safe_load(made.stdout)["default"]["serve"][0] == {"model": "support-chat", "weight": 90}
    assert "left out: -:33: model_list.7.litellm_params.model: wants its provider" in made.stderr
    assert isinstance(command("import", "--from", "litellm", "gone.yaml").exception, ConfigError)
    assert isinstance(command("import", "--from", "litellm", "-", input=b"\xff").exception, ConfigError)
