"""A client's key: what the gateway knows of it, and keeps on disk. Pure."""

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Key", "Scope"]


class Scope(StrEnum):
    """What a key may be used for."""

    DATA = "data"  # calls of /v1
    FEEDBACK = "feedback"  # /v1/feedback
    ADMIN = "admin"  # /api, and the approval of a rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A client's key without its secret. Times are epoch seconds.

    `client` is who its calls come from, whatever they say; "" lets them say. `workload` is theirs where they name none.
    `models` are the names in routing.yaml that its calls may be routed to; none is all. `rpm` and `tpm` are requests
    and tokens a minute, `daily_usd` is by the day (UTC).
    """

    number: int
    digest: str  # SHA-256 of the secret, hexadecimal
    client: str = ""
    workload: str = ""
    scopes: frozenset[Scope] = frozenset((Scope.DATA,))
    models: frozenset[str] = frozenset()
    rpm: int | None = None
    tpm: int | None = None
    daily_usd: float | None = None
    expires_at: float | None = None

    @property
    def id(self) -> str:
        """Its public name: `key-7`."""
        return f"key-{self.number}"

    @property
    def owner(self) -> str:
        """Who stands behind it: its client, so that several keys may be one person's; else the key itself."""
        return self.client or self.id

    @property
    def limited(self) -> bool:
        """Whether it has any limit."""
        return self.rpm is not None or self.metered

    @property
    def metered(self) -> bool:
        """Whether what its replies cost has to be counted."""
        return self.tpm is not None or self.daily_usd is not None
