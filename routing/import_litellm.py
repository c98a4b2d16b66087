"""LiteLLM's config.yaml -> routing.yaml: a workload for each name that clients ask for. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from routing.document import read_document
from routing.errors import RulesError
from routing.imported import JSON, PROVIDERS, Draft, Imported, Place, Share

__all__ = ["import_litellm"]

# What LiteLLM calls a provider -> ours. All others translate, and stay with litellm.
NAMES: Final[Mapping[str, str]] = {
    "openai": "openai",
    "text-completion-openai": "openai",
    "hosted_vllm": "vllm",
    "nvidia_nim": "nim",
    "litellm_proxy": "other",
    "openai_like": "other",
    "custom_openai": "other",
    "lm_studio": "other",
    "llamafile": "other",
    "deepseek": "deepseek",
    "fireworks_ai": "fireworks",
    "groq": "groq",
    "hyperbolic": "hyperbolic",
    "mistral": "mistral",
    "openrouter": "openrouter",
    "together_ai": "together",
    "xai": "xai",
}
OPENAI_MODELS: Final = ("gpt-", "o1", "o3", "o4", "chatgpt-", "text-embedding-", "davinci-", "babbage-", "ft:gpt-")
MILLION: Final = 1_000_000
RETRIES: Final = 10  # ours are at most so many
PRICES: Final = {"input": "input_cost_per_token", "output": "output_cost_per_token"}
OPTIONS: Final = (  # of providers that translate, and what of it is secret
    "api_version", "aws_region_name", "aws_profile_name", "aws_role_name", "aws_session_name", "vertex_project",
    "vertex_location", "organization", "region_name", "project", "drop_params",
)  # fmt: skip
SECRET_OPTIONS: Final = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token", "vertex_credentials")
PARAMETERS: Final = (
    "model", "custom_llm_provider", "api_base", "base_url", "api_key", "timeout", "stream_timeout", "silent_model",
    *PRICES.values(),
)  # fmt: skip
WEIGHTS: Final = ("weight", "rpm", "tpm")  # the first that any deployment of a name has


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """An entry of model_list that was taken over as `model`. `given` is its litellm_params."""

    place: Place
    model: str
    given: Mapping[str, Any]


Groups = dict[str, list[Deployment]]  # by the name that clients ask for


def import_litellm(text: str, name: str) -> Imported:
    """Raises RulesError where `text`, whose file is called `name`, is no config of LiteLLM's proxy."""
    document = read_document(text, name)
    data = document.data
    if not isinstance(data, dict) or not isinstance(data.get("model_list"), list):
        raise RulesError(f"{name}:1: not a LiteLLM config: it has no model_list")
    draft = Draft(name, document.line)
    settings = {key: draft.mapping((key,), data.get(key)) for key in ("router_settings", "litellm_settings")}
    deadlines = _deadlines(draft, settings)
    groups: Groups = {}
    for index, entry in enumerate(data["model_list"]):
        _deployment(draft, ("model_list", index), entry, deadlines, groups)
    retries = [_number(given.get("num_retries")) for given in settings.values()]
    if attempts := next((number for number in retries if number is not None), None):
        for model in draft.models.values():
            model["retries"] = {"attempts": min(int(attempts), RETRIES) or 1}
    behind = _fallbacks(draft, settings, groups)
    aliases = _aliases(draft, settings["router_settings"], groups)
    for group, deployments in groups.items():
        shares = _shares(draft, deployments)
        served = draft.split(shares, behind.get(group, ()))
        mirrors = _mirrors(draft, deployments, groups)
        draft.workload(group, [group, *aliases.get(group, ())], served | ({"mirror": mirrors} if mirrors else {}))
    draft.rest((), data, ("model_list", *settings))
    return draft.done(("model_list",))


def _deployment(draft: Draft, place: Place, entry: Any, deadlines: JSON, groups: Groups) -> None:
    entry = draft.mapping(place, entry)
    group, given = entry.get("model_name"), draft.mapping((*place, "litellm_params"), entry.get("litellm_params"))
    if not isinstance(group, str) or not group or not isinstance(given.get("model"), str):
        draft.left_out(place, "a deployment has model_name and litellm_params.model")
        return
    if "*" in group:
        draft.left_out((*place, "model_name"), "a pattern for names: write a model for each name that is asked for")
        return
    info = draft.mapping((*place, "model_info"), entry.get("model_info"))
    name = draft.free(group)
    section = _model(draft, (*place, "litellm_params"), name, given, deadlines)
    if section is None:
        return
    if price := _price({**info, **given}):
        section["price"] = price
    draft.models[name] = section
    for part, said in (("litellm_params", given), ("model_info", info)):
        _no_numbers(draft, (*place, part), said, (*PRICES.values(), *_DEADLINES.values(), *WEIGHTS))
    taken = section.get("options", ())
    draft.rest((*place, "litellm_params"), given, (*PARAMETERS, *WEIGHTS, *taken))
    draft.rest((*place, "model_info"), info, ("id", *PRICES.values()))
    draft.rest(place, entry, ("model_name", "litellm_params", "model_info"))
    groups.setdefault(group, []).append(Deployment(place=place, model=name, given=given))


def _model(draft: Draft, place: Place, name: str, given: Mapping[str, Any], deadlines: JSON) -> JSON | None:
    kind, model = _provider(given)
    if not kind:
        draft.left_out((*place, "model"), "wants its provider, as openai/NAME")
        return None
    provider = PROVIDERS[NAMES.get(kind, "other")]
    where = "base_url" if "base_url" in given and "api_base" not in given else "api_base"
    said = _reference(given.get(where)) or ""
    url = draft.address((*place, where), said, provider, name) if said or kind in NAMES else ""
    if url is None:
        return None
    if kind in NAMES:
        section: JSON = {"upstream": provider.upstream, "base_url": url, "model": model}
    else:
        section = _translated(draft, place, name, given, f"{kind}/{model}", url)
    if key := draft.key((*place, "api_key"), _reference(given.get("api_key")), provider, name):
        section["api_key"] = key
    own = {ours: _number(given.get(theirs)) for ours, theirs in _DEADLINES.items()}
    timeouts = deadlines | {ours: value for ours, value in own.items() if value is not None}
    return section | ({"timeouts": timeouts} if timeouts else {})


def _translated(draft: Draft, place: Place, name: str, given: Mapping[str, Any], model: str, url: str) -> JSON:
    """A provider that litellm is to go on talking to, with what it was told of it."""
    section: JSON = {"upstream": "litellm", "model": model} | ({"base_url": url} if url else {})
    options: JSON = {key: _reference(given[key]) for key in OPTIONS if isinstance(given.get(key), str | int | float)}
    options |= {key: given[key] for key in options if isinstance(given[key], bool)}
    for key in SECRET_OPTIONS:
        if key in given:
            secret = draft.key((*place, key), _reference(given[key]), PROVIDERS["other"], f"{name}_{key}")
            options |= {key: secret} if secret else {}
    return section | ({"options": options} if options else {})


_DEADLINES: Final = {"first_token": "stream_timeout", "total": "timeout"}


def _provider(given: Mapping[str, Any]) -> tuple[str, str]:
    """The provider, "" where the file leaves it to LiteLLM's own list of models, and the model's name there."""
    model = str(given["model"])
    if isinstance(kind := given.get("custom_llm_provider"), str):
        return kind, model.removeprefix(f"{kind}/")
    kind, slash, rest = model.partition("/")
    if slash:
        return kind, rest
    if _reference(given.get("api_base")) or model.startswith(OPENAI_MODELS):
        return "openai", model
    return "", model


def _reference(value: Any) -> str | None:
    """`os.environ/NAME` -> `env:NAME`; other text as it stands."""
    if value is None:
        return None
    value = str(value)
    return f"env:{value.removeprefix('os.environ/')}" if value.startswith("os.environ/") else value


def _number(value: Any) -> float | None:
    """A number above zero, which LiteLLM takes as text too."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if not isinstance(value, bool) and 0 < number < float("inf") else None


def _no_numbers(draft: Draft, place: Place, given: Mapping[str, Any], keys: Sequence[str]) -> None:
    """What should be a number and is none is left out."""
    for key in keys:
        if given.get(key) not in (None, 0) and _number(given[key]) is None:
            draft.left_out((*place, key), "is no number above zero")


def _price(given: Mapping[str, Any]) -> JSON:
    found = {ours: _number(given.get(theirs)) for ours, theirs in PRICES.items()}
    return {ours: round(price * MILLION, 6) for ours, price in found.items() if price is not None}


def _deadlines(draft: Draft, settings: Mapping[str, Mapping[str, Any]]) -> JSON:
    """For deployments without their own. What else the settings say is left out, key by key."""
    router, module = settings["router_settings"], settings["litellm_settings"]
    draft.rest(("router_settings",), router, ("num_retries", "timeout", "stream_timeout", "fallbacks",
                                              "default_fallbacks", "model_group_alias"))  # fmt: skip
    draft.rest(("litellm_settings",), module, ("num_retries", "request_timeout", "fallbacks", "default_fallbacks"))
    _no_numbers(draft, ("router_settings",), router, ("num_retries", "timeout", "stream_timeout"))
    _no_numbers(draft, ("litellm_settings",), module, ("num_retries", "request_timeout"))
    total = _number(router.get("timeout")) or _number(module.get("request_timeout"))
    first = _number(router.get("stream_timeout"))
    return {name: value for name, value in (("first_token", first), ("total", total)) if value is not None}


def _fallbacks(draft: Draft, settings: Mapping[str, Mapping[str, Any]], groups: Groups) -> dict[str, list[str]]:
    """By group, the models behind it: the router's own list, else the defaults."""
    found: dict[str, list[str]] = {}
    general: list[str] = []
    for section, given in settings.items():
        for index, entry in enumerate(_list(given.get("fallbacks"))):
            for group, names in draft.mapping((section, "fallbacks", index), entry).items():
                models = _behind(draft, (section, "fallbacks", index, group), names, groups)
                if group == "*":
                    general += models
                elif group in groups:
                    found.setdefault(group, models)
                else:
                    draft.left_out((section, "fallbacks", index, group), "no deployment of that name was taken over")
        general += _behind(draft, (section, "default_fallbacks"), given.get("default_fallbacks"), groups)
    return {group: found.get(group, general) for group in groups}


def _behind(draft: Draft, place: Place, names: Any, groups: Groups) -> list[str]:
    models: list[str] = []
    for index, name in enumerate(_list(names)):
        if isinstance(name, str) and name in groups:
            models += [deployment.model for deployment in groups[name]]
        else:
            draft.left_out((*place, index), "is no name of a deployment that was taken over")
    return models


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _aliases(draft: Draft, router: Mapping[str, Any], groups: Groups) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    place: Place = ("router_settings", "model_group_alias")
    for alias, target in draft.mapping(place, router.get("model_group_alias")).items():
        group = target.get("model") if isinstance(target, Mapping) else target
        if isinstance(group, str) and group in groups and alias not in groups:
            found.setdefault(group, []).append(alias)
        else:
            draft.left_out((*place, alias), "no deployment of that name was taken over")
    return found


def _shares(draft: Draft, deployments: Sequence[Deployment]) -> list[Share]:
    """Weighted as there: by the first of WEIGHTS that any of them has. The others are limits, and left out."""
    said = {key for deployment in deployments for key in WEIGHTS if _number(deployment.given.get(key)) is not None}
    used = next((key for key in WEIGHTS if key in said and len(deployments) > 1), None)
    for deployment in deployments:
        draft.rest((*deployment.place, "litellm_params"), {k: 0 for k in WEIGHTS if k in deployment.given}, (used,))
    weights = [_number(deployment.given.get(used)) if used else 1.0 for deployment in deployments]
    pairs = zip(deployments, weights, strict=True)
    return [Share(model=deployment.model, weight=weight or 0.0) for deployment, weight in pairs]


def _mirrors(draft: Draft, deployments: Sequence[Deployment], groups: Groups) -> list[JSON]:
    """`silent_model` gets a copy of every request there, and so here."""
    found: dict[str, JSON] = {}
    for deployment in deployments:
        place = (*deployment.place, "litellm_params", "silent_model")
        for model in _behind(draft, place, deployment.given.get("silent_model"), groups)[:1]:
            found[model] = {"model": model, "sample": 1.0}
    return list(found.values())
