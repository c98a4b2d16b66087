"""A routing.yaml in the making, out of another gateway's file: what is taken over, and what has no equivalent. Pure."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import yaml

from routing.errors import RulesError
from routing.references import References
from routing.rules import parse
from routing.targets import Upstream

__all__ = ["PROVIDERS", "Draft", "Imported", "Note", "Place", "Provider", "Share"]

JSON = dict[str, Any]
Place = tuple[str | int, ...]
Kind = Literal["left out", "changed"]

WHOLE: Final = 100.0
LEAST: Final = 0.0001  # per cent
NO_EQUIVALENT: Final = "has no equivalent"
_NO_KEY: Final = ("", "none", "empty")


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """A service that speaks OpenAI's API. `variable` is where its key is looked for when the file names none."""

    upstream: Upstream = "openai"
    base_url: str = ""
    variable: str = ""


PROVIDERS: Final[Mapping[str, Provider]] = {
    "openai": Provider(base_url="https://api.openai.com/v1", variable="OPENAI_API_KEY"),
    "vllm": Provider(upstream="vllm"),
    "nim": Provider(upstream="nim", base_url="https://integrate.api.nvidia.com/v1", variable="NVIDIA_NIM_API_KEY"),
    "sglang": Provider(variable="SGLANG_API_KEY"),
    "other": Provider(),
    "deepseek": Provider(base_url="https://api.deepseek.com/v1", variable="DEEPSEEK_API_KEY"),
    "fireworks": Provider(base_url="https://api.fireworks.ai/inference/v1", variable="FIREWORKS_API_KEY"),
    "groq": Provider(base_url="https://api.groq.com/openai/v1", variable="GROQ_API_KEY"),
    "hyperbolic": Provider(base_url="https://api.hyperbolic.xyz/v1", variable="HYPERBOLIC_API_KEY"),
    "mistral": Provider(base_url="https://api.mistral.ai/v1", variable="MISTRAL_API_KEY"),
    "openrouter": Provider(base_url="https://openrouter.ai/api/v1", variable="OPENROUTER_API_KEY"),
    "together": Provider(base_url="https://api.together.xyz/v1", variable="TOGETHER_API_KEY"),
    "xai": Provider(base_url="https://api.x.ai/v1", variable="XAI_API_KEY"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Something of their file that the new one does not say, or says otherwise. No secret is ever in it."""

    kind: Kind
    place: str  # the key in their file, dotted
    line: int
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """A routing.yaml, what became of the rest, and the environment variables that it needs."""

    text: str
    notes: tuple[Note, ...]
    variables: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One arm of a split: the model that serves it, its weight among the others, and what stands behind it."""

    model: str
    weight: float
    behind: tuple[str, ...] = ()


class Draft:
    """Gathers models, workloads and notes. `line` tells a place's line in their file, whose name is `source`."""

    def __init__(self, source: str, line: Callable[[Place], int]) -> None:
        self.models: dict[str, JSON] = {}
        self.workloads: dict[str, JSON] = {}
        self._source = source
        self._line = line
        self._notes: list[Note] = []

    def left_out(self, place: Place, what: str = NO_EQUIVALENT) -> None:
        self._note("left out", place, what)

    def changed(self, place: Place, what: str) -> None:
        self._note("changed", place, what)

    def _note(self, kind: Kind, place: Place, what: str) -> None:
        dotted = ".".join(str(part) for part in place)
        self._notes.append(Note(kind=kind, place=dotted, line=self._line(place), what=what))

    def rest(self, place: Place, section: Mapping[str, Any], taken: Collection[str | None]) -> None:
        """Whatever of `section` nobody has taken is left out, key by key; of a whole section, by its keys."""
        for key, value in section.items():
            if key in taken:
                continue
            if not place and isinstance(value, Mapping):
                self.rest((key,), value, ())
            else:
                self.left_out((*place, str(key)))

    def mapping(self, place: Place, value: Any) -> Mapping[str, Any]:
        """`value` where it is a mapping, else nothing, which is noted."""
        if isinstance(value, Mapping):
            return value
        if value is not None:
            self.left_out(place, "is no mapping")
        return {}

    def free(self, wanted: str) -> str:
        """A name for a model: `wanted`, or what comes closest."""
        return free_name(wanted.replace(":", "-"), self.models)

    def workload(self, wanted: str, match: Sequence[str], served: JSON) -> None:
        """Add a workload that takes the requests for one of the models `match`."""
        name = free_name(wanted, {*self.workloads, "default"})
        self.workloads[name] = {"match": {"model": list(match)}, **served}

    def address(self, place: Place, given: str, provider: Provider, owner: str) -> str | None:
        """A model's base_url; None, which is noted, where there is none to be had. A login in it is not copied."""
        url = given or provider.base_url
        if url.startswith("env:"):
            return url
        if not url.startswith(("http://", "https://")):
            self.left_out(place, "wants an address with http:// or https://" if url else "names no address")
            return None
        parts = urlsplit(url)
        if parts.username or parts.password or parts.query:
            reference = f"env:{variable_name(owner)}_BASE_URL"
            self.changed(place, f"the address holds a secret, which is not copied: put it into {reference[4:]}")
            return reference
        return url

    def key(self, place: Place, given: str | None, provider: Provider, owner: str) -> str | None:
        """A model's api_key: a reference as it stands, the provider's own where none is given, never a key."""
        if given is None:
            return f"env:{provider.variable}" if provider.variable else None
        if given.startswith("env:"):
            return given
        if given.lower() in _NO_KEY:
            return None
        reference = f"env:{variable_name(owner)}_API_KEY"
        self.changed(place, f"a key stands here, which is not copied: put it into {reference[4:]}")
        return reference

    def split(self, shares: Sequence[Share], behind: Sequence[str] = ()) -> JSON:
        """What `shares` become in a workload: their models with their weights; all stand behind one another."""
        whole = sum(share.weight for share in shares) or WHOLE
        weights: dict[str, float] = {}
        for share in shares:
            weights[share.model] = weights.get(share.model, 0.0) + share.weight / whole * WHOLE
        served = {model: round(weight, 4) for model, weight in weights.items() if weight >= LEAST} or {
            shares[0].model: WHOLE
        }
        heaviest = max(served, key=lambda model: served[model])
        served[heaviest] = round(served[heaviest] + WHOLE - sum(served.values()), 4)
        ranked = sorted(shares, key=lambda share: -share.weight)
        others = [name for share in ranked for name in (share.model, *share.behind)]
        alone = heaviest if len(served) == 1 else ""
        fallbacks = [name for name in dict.fromkeys((*others, *behind)) if name != alone]
        serve = heaviest if alone else [{"model": model, "weight": weight} for model, weight in served.items()]
        return {"serve": serve} | ({"fallbacks": fallbacks} if fallbacks else {})

    def done(self, place: Place) -> Imported:
        """The file, checked; `place` is where their models stand. Raises RulesError where none could be taken over."""
        if not self.models or not self.workloads:
            reasons = [note for note in self._notes if note.what != NO_EQUIVALENT]
            why = "; ".join(f"{note.place}: {note.what}" for note in reasons[:3])
            raise RulesError(f"{self._source}:1: no model here can be taken over{': ' + why if why else ''}")
        served = next(iter(self.workloads.values()))
        self.changed(
            place, f"a request for another name was refused; here it goes to default, as {next(iter(self.workloads))}"
        )
        data: JSON = {
            "version": 1,
            "models": self.models,
            "workloads": self.workloads,
            "default": {key: served[key] for key in ("serve", "fallbacks") if key in served},
        }
        text = yaml.dump(data, Dumper=_Plain, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)
        parse(text, f"what was made of {self._source}", References())
        notes = sorted(self._notes, key=lambda note: note.line)
        return Imported(text=text, notes=tuple(notes), variables=self._variables())

    def _variables(self) -> tuple[str, ...]:
        said = [str(model.get(key, "")) for model in self.models.values() for key in ("base_url", "api_key")]
        said += [str(value) for model in self.models.values() for value in model.get("options", {}).values()]
        return tuple(sorted({text.removeprefix("env:") for text in said if text.startswith("env:")}))


class _Plain(yaml.SafeDumper):
    """Writes what is said twice twice, and whole numbers as such: anchors and 30.0 are for machines."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def number(self, data: float) -> yaml.ScalarNode:
        return self.represent_int(int(data)) if data.is_integer() else self.represent_float(data)


_Plain.add_representer(float, _Plain.number)


def free_name(wanted: str, taken: Collection[str]) -> str:
    """`wanted`, or `wanted-2` and so on where it is taken."""
    name, number = wanted, 2
    while name in taken:
        name, number = f"{wanted}-{number}", number + 1
    return name


def variable_name(owner: str) -> str:
    """An environment variable's name out of a model's: `my-chat/8b` -> `MY_CHAT_8B`."""
    name = re.sub(r"[^A-Z0-9]+", "_", owner.upper()).strip("_")
    return f"M_{name}" if not name or name[0].isdigit() else name
