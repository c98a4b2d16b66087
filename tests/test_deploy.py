"""What stands beside the code: the example rules, the compose file, the image, the Makefile's options."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from routing.rules import load

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"


OPTIONS = {"DATA", "LABEL", "ONLY", "LABELS", "UPSTREAM", "N", "SEED"}


def make(*arguments: str) -> str:
    """What make says, run as if from a shell of its own: the suite may itself run under make."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    env = {name: value for name, value in env.items() if name not in OPTIONS}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout


def dry_run(*arguments: str) -> str:
    """The last command that make would run."""
    return make("--dry-run", *arguments).rstrip().splitlines()[-1]


def pins(path: Path) -> dict[str, str]:
    found = (line.partition("==") for line in path.read_text().splitlines() if "==" in line and line[0] != "#")
    return {name.strip(): version.partition(";")[0].strip() for name, _, version in found}


def test_the_example_rules_can_be_used_as_they_stand() -> None:
    rules = load(DEPLOY / "routing.example.yaml", {})
    assert rules.table.default.serve == "prod-70b"
    assert rules.rollouts["support-router"].gates[0].metric == "tool_call"
    assert rules.flywheels["support-router"].base_models == ("small-1b",)


def test_the_command_line_accepts_the_example_rules() -> None:
    command = [sys.executable, "-m", "flywheel.cli", "routes", "check", str(DEPLOY / "routing.example.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_compose_file_runs_commands_that_there_are() -> None:
    from flywheel.cli import GROUPS

    services: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    commands = {name: service["command"] for name, service in services.items() if "command" in service}
    assert commands == {"upgrade": ["db", "upgrade"], "gateway": ["serve"], "controller": ["work"]}
    assert {command[0] for command in commands.values()} <= set(GROUPS)
    assert "depends_on" not in services["gateway"]


def test_the_image_copies_files_that_there_are_and_is_not_root() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.M) for name in line.split()[:-1]]
    assert [name for name in copied if not (ROOT / name).exists()] == []
    kept = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) <= kept
    assert re.findall(r"^USER (.+)$", text, re.M) == ["understudy"]


def test_settings_in_the_image_are_settings_that_there_are() -> None:
    from gateway.config import Settings

    for path in (DEPLOY / "Dockerfile", DEPLOY / "compose.yaml"):
        for name in re.findall(r"UNDERSTUDY_([A-Z_]+)[=:]", path.read_text()):
            section, _, key = name.lower().partition("__")
            assert section in Settings.model_fields, name
            if key:
                assert key in type(getattr(Settings(), section)).model_fields, name


def test_one_torch_is_named_everywhere() -> None:
    constraints = pins(DEPLOY / "models-constraints.txt")
    assert pins(DEPLOY / "models-overrides.txt")["torch"] == constraints["torch"]
    assert not {"torch", "vllm", "peft", "transformers"} & set(pins(ROOT / "constraints.txt"))


def test_make_passes_only_the_options_that_are_set() -> None:
    assert dry_run("demo").endswith("understudy demo")
    given = dry_run(
        "demo", "DATA=a b.jsonl", "LABEL=domain", "ONLY=x,y", "LABELS=shuffled", "UPSTREAM=http://u", "N=9", "SEED=3"
    )
    assert given.endswith(
        "understudy demo --data 'a b.jsonl' --label 'domain' --only 'x,y' --labels 'shuffled' "
        "--upstream 'http://u' --records '9' --seed '3'"
    )


def test_make_alone_lists_every_target() -> None:
    text = make()
    for target in ("setup", "models", "demo", "up", "check", "test", "services", "clean", "help"):
        assert f"make {target} " in text


def test_contributing_names_files_that_there_are() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("## Where a line")[2].partition("## House rules")[0]
    named = re.findall(r"`((?:gateway|routing|flywheel|migrations|deploy)/[\w/.]*)`", table)
    assert len(named) > 25
    assert [name for name in named if not (ROOT / name).exists()] == []
