"""Clients' keys as commands and the API make and show them: what is wanted of a new one, and keys as JSON."""

import re
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from flywheel.exchange_lines import seconds
from gateway.auth import Key, Scope
from gateway.keys import Kept, Keys

__all__ = ["MOST", "MOST_USD", "NewKey", "Text", "kept_json", "key_json", "make"]

MOST: Final = 2_000_000_000  # of a limit: what a counter holds
MOST_USD: Final = 200_000

_IN: Final = re.compile(r"(\d{1,6})([mhdw])")
_UNITS: Final = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_LONGEST: Final = 255

JSON = dict[str, Any]


def _storable(text: str) -> str:
    if "\0" in text or text != text.encode(errors="ignore").decode():
        raise ValueError("wants Unicode text without the character 0, for the control database holds no other")
    return text


def _name(text: str) -> str:
    if len(text) > _LONGEST or not (text.isprintable() and text.isascii()):
        raise ValueError(f"wants at most {_LONGEST} printable ASCII characters, as a header carries them")
    return text


def _scopes(named: object) -> object:
    if not isinstance(named, list | tuple) or not all(isinstance(scope, str) for scope in named):
        return named
    if unknown := [scope for scope in named if scope not in list(Scope)]:
        raise ValueError(f"'{unknown[0]}' is not a valid scope; write some of {', '.join(Scope)}")
    if not named:
        raise ValueError(f"a key that may do nothing is no key; write some of {', '.join(Scope)}")
    return named


Text = Annotated[str, AfterValidator(_storable)]
Name = Annotated[str, AfterValidator(_name)]


class NewKey(BaseModel):
    """What a key is to be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    client: Name = Field(default="", description="Who its calls come from, whatever they say themselves.")
    workload: Name = Field(default="", description="What its calls belong to where they name no workload.")
    scopes: Annotated[tuple[Scope, ...], BeforeValidator(_scopes)] = Field(
        default=(Scope.DATA,), description="What it may be used for: data, feedback, admin."
    )
    models: tuple[Text, ...] = Field(default=(), description="Models that it may be routed to; all if none.")
    rpm: int | None = Field(default=None, ge=1, le=MOST, description="Requests a minute.")
    tpm: int | None = Field(default=None, ge=1, le=MOST, description="Tokens a minute, read and written.")
    daily_usd: float | None = Field(
        default=None, ge=0, le=MOST_USD, allow_inf_nan=False, description="USD a day (UTC)."
    )
    expires: str | None = Field(default=None, description="In 90d, 12h or 30m, or at an ISO time.")

    def expires_at(self, now: float) -> float | None:
        """Epoch seconds, after `now`. Raises ValueError for what is no time, or has passed."""
        if self.expires is None:
            return None
        if later := _IN.fullmatch(self.expires):
            at = now + int(later[1]) * _UNITS[later[2]]
        else:
            try:
                at = seconds(self.expires)
            except ValueError as error:
                raise ValueError(f"{error}; write 90d, 12h or 30m, or 2027-01-31T00:00:00Z") from None
        if at <= now:
            raise ValueError(f"{self.expires}: that moment has passed")
        return at


async def make(keys: Keys, new: NewKey, *, who: str, now: float) -> tuple[Key, str]:
    """The key and its secret, which is shown this once. Raises ValueError for its `expires`, and Unavailable."""
    return await keys.create(
        who=who,
        now=now,
        client=new.client,
        workload=new.workload,
        scopes=new.scopes,
        models=new.models,
        rpm=new.rpm,
        tpm=new.tpm,
        daily_usd=new.daily_usd,
        expires_at=new.expires_at(now),
    )


def key_json(key: Key) -> JSON:
    return {
        "id": key.id,
        "client": key.client,
        "workload": key.workload,
        "scopes": sorted(key.scopes),
        "models": sorted(key.models),
        "rpm": key.rpm,
        "tpm": key.tpm,
        "daily_usd": key.daily_usd,
        "expires_at": key.expires_at,
    }


def kept_json(kept: Kept, now: float) -> JSON:
    """With its state at `now` and its history; no secret is among it."""
    return key_json(kept.key) | {
        "state": kept.state(now),
        "created_at": kept.created_at,
        "created_by": kept.created_by,
        "revoked_at": kept.revoked_at,
        "revoked_by": kept.revoked_by,
    }
