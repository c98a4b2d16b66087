"""Named places in a stream, and the lease that makes one controller active, in the control database."""

from sqlalchemy import delete, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

from flywheel.tables import cursors, leases
from routing.tables import reading, writing

__all__ = ["Cursors", "Lease"]


class Cursors:
    """How far a reader has come, by name. Every method raises Unavailable where the database does not answer."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def get(self, name: str) -> str | None:
        async with reading(self._engine) as connection:
            query = select(cursors.c.value).where(cursors.c.name == name)
            return (await connection.execute(query)).scalar()

    async def put(self, name: str, value: str) -> None:
        async with writing(self._engine) as connection:
            moved = await connection.execute(update(cursors).where(cursors.c.name == name).values(value=value))
            if moved.rowcount == 0:
                await connection.execute(insert(cursors).values(name=name, value=value))


class Lease:
    """One of several processes holds it, for `seconds` after each time it asked; an expired one may be taken over."""

    def __init__(self, engine: AsyncEngine, *, name: str, holder: str, seconds: float) -> None:
        self._engine = engine
        self._name = name
        self._holder = holder
        self._seconds = seconds

    async def hold(self, now: float) -> bool:
        """Take or renew it; False where another holds it."""
        mine_or_over = or_(leases.c.holder == self._holder, leases.c.expires_at < now)
        values = {"holder": self._holder, "expires_at": now + self._seconds}
        try:
            async with writing(self._engine) as connection:
                change = update(leases).where(leases.c.name == self._name, mine_or_over).values(**values)
                if (await connection.execute(change)).rowcount == 1:
                    return True
                held = select(leases.c.name).where(leases.c.name == self._name)
                if (await connection.execute(held)).scalar() is not None:
                    return False
                await connection.execute(insert(leases).values(name=self._name, **values))
                return True
        except IntegrityError:  # another took it at this very moment
            return False

    async def release(self) -> None:
        """Give it back, so that another need not wait until it expires."""
        mine = (leases.c.name == self._name) & (leases.c.holder == self._holder)
        async with writing(self._engine) as connection:
            await connection.execute(delete(leases).where(mine))
