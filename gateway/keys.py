"""Client keys in the control database: made, listed, revoked, and who it is that approves with one."""

import secrets
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import JSON, BigInteger, Column, Float, Integer, Row, String, Table, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway.auth import Key, Scope, authorise, digest_of, secret_of
from routing.audit import Fact
from routing.audit_store import append
from routing.errors import NotFound
from routing.tables import metadata, reading, writing

__all__ = ["KEYS_VERSION", "Kept", "Keys", "approver", "client_keys"]

client_keys = Table(
    "client_keys",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("digest", String(64), nullable=False, unique=True),  # SHA-256 of the secret, which is kept nowhere
    Column("client", String(255), nullable=False),
    Column("workload", String(255), nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("models", JSON, nullable=False),
    Column("rpm", Integer),
    Column("tpm", BigInteger),
    Column("daily_usd", Float),
    Column("created_at", Float, nullable=False),
    Column("created_by", String(255), nullable=False),
    Column("expires_at", Float),
    Column("revoked_at", Float),
    Column("revoked_by", String(255)),
)

# A key is made and perhaps revoked, never changed or deleted otherwise: so the number of these events is a version.
KEYS_VERSION: Final = select(func.count() + func.count(client_keys.c.revoked_at)).scalar_subquery()


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A key as it is stored, with its history. Times are epoch seconds."""

    key: Key
    created_at: float
    created_by: str
    revoked_at: float | None
    revoked_by: str | None

    def state(self, now: float) -> str:
        """`active`, `expired` or `revoked`."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.key.expires_at is not None and now >= self.key.expires_at else "active"


class Keys:
    """The keys of one control database. Owns nothing: the engine is the caller's. Methods raise Unavailable."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def create(
        self,
        *,
        who: str,
        now: float,
        client: str = "",
        workload: str = "",
        scopes: Collection[Scope] = (Scope.DATA,),
        models: Collection[str] = (),
        rpm: int | None = None,
        tpm: int | None = None,
        daily_usd: float | None = None,
        expires_at: float | None = None,
    ) -> tuple[Key, str]:
        """The new key and its secret, which nobody can ever read again."""
        secret = secret_of(secrets.token_bytes(32))
        limits: dict[str, Any] = {"rpm": rpm, "tpm": tpm, "daily_usd": daily_usd, "expires_at": expires_at}
        row = {
            "digest": digest_of(secret),
            "client": client,
            "workload": workload,
            "scopes": sorted(scopes),
            "models": sorted(models),
            "created_at": now,
            "created_by": who,
            **limits,
        }
        async with writing(self._engine) as connection:
            made = await connection.execute(insert(client_keys).values(row).returning(client_keys))
            key = _kept(made.one()).key
            told = {name: value for name, value in row.items() if name not in ("digest", "created_at", "created_by")}
            await append(connection, Fact(at=now, who=who, kind="key.created", subject=key.id, body=told))
        return key, secret

    async def list(self) -> Sequence[Kept]:
        """All there ever were, oldest first."""
        async with reading(self._engine) as connection:
            return [_kept(row) for row in await connection.execute(select(client_keys).order_by(client_keys.c.id))]

    async def revoke(self, key_id: str, *, who: str, now: float) -> Kept:
        """Revoke `key-N`; one that is revoked stays as it was. Raises NotFound."""
        number = key_id.removeprefix("key-")
        query = select(client_keys).where(client_keys.c.id == (int(number) if _is_number(number) else -1))
        change = update(client_keys).where(client_keys.c.revoked_at.is_(None)).values(revoked_at=now, revoked_by=who)
        async with writing(self._engine) as connection:
            row = (await connection.execute(query)).one_or_none()
            if row is None:
                raise NotFound(f"no key {key_id}; `understudy keys list` shows them")
            if (await connection.execute(change.where(client_keys.c.id == row.id))).rowcount:
                fact = Fact(at=now, who=who, kind="key.revoked", subject=f"key-{row.id}", body={"client": row.client})
                await append(connection, fact)
            return _kept((await connection.execute(query)).one())

    async def version(self) -> int:
        """Grows with every key that is made or revoked: one small query, to poll."""
        async with reading(self._engine) as connection:
            return int((await connection.execute(select(KEYS_VERSION))).scalar_one())

    async def unrevoked(self) -> Sequence[Key]:
        """Those that have not been revoked; some may have expired."""
        query = select(client_keys).where(client_keys.c.revoked_at.is_(None)).order_by(client_keys.c.id)
        async with reading(self._engine) as connection:
            return [_kept(row).key for row in await connection.execute(query)]

    async def find(self, secret: str) -> Key | None:
        """The key of a secret, if it is not revoked."""
        query = select(client_keys).where(client_keys.c.digest == digest_of(secret), client_keys.c.revoked_at.is_(None))
        async with reading(self._engine) as connection:
            row = (await connection.execute(query)).one_or_none()
        return _kept(row).key if row is not None else None


async def approver(engine: AsyncEngine, secret: str, *, clock: Callable[[], float] = time.time) -> str | None:
    """Who approves with this secret: the client of a key with the scope admin, else None. Raises Unavailable.

    Two keys of one client are one approver; a key without a client is one by itself.
    Asks the database each time: an approval by a key that was revoked a moment ago is none.
    """
    key = await Keys(engine).find(secret)
    if key is None or authorise(key, Scope.ADMIN, clock()) is not None:
        return None
    return key.owner


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 19


def _kept(row: Row[Any]) -> Kept:
    key = Key(
        number=row.id,
        digest=row.digest,
        client=row.client,
        workload=row.workload,
        scopes=frozenset(scope for scope in Scope if scope in row.scopes),
        models=frozenset(row.models),
        rpm=row.rpm,
        tpm=row.tpm,
        daily_usd=row.daily_usd,
        expires_at=row.expires_at,
    )
    return Kept(
        key=key,
        created_at=row.created_at,
        created_by=row.created_by,
        revoked_at=row.revoked_at,
        revoked_by=row.revoked_by,
    )
