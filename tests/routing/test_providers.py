"""Models of providers, and of upstreams behind a proxy or a private CA, as routing.yaml has them."""

from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from routing.diff import diff
from routing.errors import RulesError
from routing.json_schema import json_schema
from routing.packed import pack, unpack
from routing.proxies import proxy_of
from routing.references import References
from routing.rules import load, parse
from routing.targets import Price

CLAUDE = """\
version: 1
models:
  claude:
    upstream: litellm
    model: bedrock/anthropic.claude
    api_key: env:CLAUDE_KEY
    options: {aws_region_name: eu-west-1, aws_secret_access_key: env:AWS, drop_params: true}
  open: {base_url: https://api.example.com/v1, model: m}
default: {serve: claude}
"""
ENV = {"CLAUDE_KEY": "sk-1", "AWS": "as-2", "HTTPS_PROXY": "http://me:pw@proxy:3128"}


def test_a_provider_s_model_needs_no_address() -> None:
    model = parse(CLAUDE, "routing.yaml", ENV).table.models["claude"]
    assert (model.base_url, model.api_key, model.proxy) == ("", "sk-1", None)
    assert dict(model.options) == {"aws_region_name": "eu-west-1", "aws_secret_access_key": "as-2", "drop_params": True}
    assert not any(secret in repr(model) for secret in ("sk-1", "as-2"))
    assert list(Draft202012Validator(json_schema()).iter_errors(yaml.safe_load(CLAUDE))) == []


def test_any_other_model_does() -> None:
    text = CLAUDE.replace("base_url: https://api.example.com/v1, ", "")
    with pytest.raises(RulesError, match=r"^routing\.yaml:8: models\.open\.base_url: missing$"):
        parse(text, "routing.yaml", ENV)
    assert list(Draft202012Validator(json_schema()).iter_errors(yaml.safe_load(text))) != []


def test_what_it_costs_is_asked_for_where_the_file_does_not_say() -> None:
    known = {"bedrock/anthropic.claude": Price(input=3, output=15)}
    models = parse(CLAUDE, "routing.yaml", ENV, known.get).table.models
    assert models["claude"].price == Price(input=3, output=15)
    assert models["open"].price is None
    said = CLAUDE.replace("model: bedrock", "price: {output: 1}\n    model: bedrock")
    assert parse(said, "routing.yaml", ENV, known.get).table.models["claude"].price == Price(input=0, output=1)
    assert parse(CLAUDE, "routing.yaml", ENV).table.models["claude"].price is None


def test_its_secrets_are_not_in_what_is_kept() -> None:
    rules = parse(CLAUDE, "routing.yaml", ENV)
    packed = pack(rules)
    assert not any(secret.encode() in packed for secret in ("sk-1", "as-2", "me:pw"))
    assert unpack(packed, ENV).table.models == rules.table.models
    other = parse(CLAUDE.replace("eu-west-1", "us-east-1"), "routing.yaml", References())
    told = str(diff(parse(CLAUDE, "routing.yaml", References()), other))
    assert "us-east-1" in told
    assert "sk-1" not in told


def test_a_run_does_not_try_one() -> None:
    text = CLAUDE + "workloads: {w: {serve: open, flywheel: {base_models: [claude]}}}\n"
    with pytest.raises(RulesError, match=r'base_models\.0: model "claude" is a provider\'s'):
        parse(text, "routing.yaml", ENV)


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("upstream: litellm, model: claude", "model: wants its provider, as anthropic/claude-sonnet-4-5"),
        ("upstream: litellm, model: a/b, adapters: true", "adapters: a provider takes no adapters of ours"),
        (
            "upstream: litellm, model: a/b, options: {aws_secret_access_key: abc}",
            "options.aws_secret_access_key: a secret does not belong in this file; write env:NAME",
        ),
        ("upstream: litellm, model: a/b, options: {stream: true}", "options.stream: has a key of its own in the model"),
        (
            "upstream: litellm, model: a/b, options: {x: env:NONE}",
            "options.x: the environment variable NONE is not set",
        ),
        (
            "upstream: litellm, model: a/b, ca_file: ca.pem",
            "ca_file: not with upstream: litellm, which heeds the variable SSL_CERT_FILE",
        ),
        ("base_url: http://a, model: b, options: {region: x}", "options: only upstream: litellm takes options"),
        (
            'base_url: http://a, model: b, proxy: "http://me:pw@proxy:3128"',
            "proxy: a password does not belong in this file; put the URL in a variable and write env:NAME",
        ),
        (
            "base_url: http://a, model: b, proxy: proxy:3128",
            "proxy: wants http:// or https://, as http://proxy:3128, or none",
        ),
    ],
)
def test_what_is_wrong_is_told_by_its_key(said: str, error: str) -> None:
    text = f"version: 1\nmodels:\n  m: {{{said}}}\ndefault: {{serve: m}}\n"
    with pytest.raises(RulesError) as caught:
        parse(text, "routing.yaml", ENV)
    assert str(caught.value) == f"routing.yaml:3: models.m.{error}"


def test_a_ca_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    file = tmp_path / "routing.yaml"
    file.write_text(CLAUDE.replace("model: m", f"model: m, ca_file: {tmp_path}/ca.pem"))
    with pytest.raises(RulesError, match=r"models\.open\.ca_file: .*ca\.pem: no such file"):
        load(file, ENV)
    (tmp_path / "ca.pem").touch()
    assert load(file, ENV).table.models["open"].ca_file == f"{tmp_path}/ca.pem"


@pytest.mark.parametrize(
    ("url", "no_proxy", "by_it"),
    [
        ("https://api.example.com/v1", "", True),
        ("https://api.example.com/v1", "example.org, api.example.co", True),
        ("https://api.example.com/v1", "other, .example.com", False),
        ("https://api.example.com/v1", "example.com", False),
        ("https://api.example.com/v1", "*.Example.com", False),
        ("https://myexample.com/v1", "example.com", True),
        ("https://api.example.com/v1", "api.example.com:443", False),
        ("https://api.example.com/v1", "api.example.com:8443", True),
        ("https://api.example.com/v1", "*", False),
        ("https://10.1.2.3/v1", "10.0.0.0/8", False),
        ("https://11.1.2.3/v1", "10.0.0.0/8", True),
        ("https://11.1.2.3/v1", "1.2.3", True),
        ("https://[fd00::1]/v1", "fd00::/8", False),
        ("https://[fd00::1]:8443/v1", "[fd00::1]", False),
        ("https://localhost:8443/v1", "", False),
        ("https://127.0.0.7/v1", "", False),
        ("http://nim:8000/v1", "", False),
        ("", "", False),
    ],
)
def test_the_environment_s_proxy_is_for_https_outside(url: str, no_proxy: str, by_it: bool) -> None:
    env = {"HTTPS_PROXY": "proxy:3128", "HTTP_PROXY": "http://other:1", "NO_PROXY": no_proxy}
    assert proxy_of(url, env) == ("http://proxy:3128" if by_it else None)
    assert proxy_of(url, {}) is None


def test_a_model_s_own_proxy_comes_first() -> None:
    def proxy(written: str) -> str | None:
        text = CLAUDE.replace("model: m", f"model: m, proxy: {written}") if written else CLAUDE
        return parse(text, "routing.yaml", ENV | {"OWN": "https://own:1"}).table.models["open"].proxy

    assert proxy("") == "http://me:pw@proxy:3128"
    assert proxy("http://mine:3128") == "http://mine:3128"
    assert proxy("env:OWN") == "https://own:1"
    assert proxy("none") is None
