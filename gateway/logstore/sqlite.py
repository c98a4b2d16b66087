"""The embedded log store: SQLite in write-ahead mode, one writer (the shipper), any number of readers."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final

import aiosqlite
import orjson

from gateway.errors import StoreError
from gateway.ids import id_at
from gateway.logstore import LogCounts, Query
from gateway.records import Arm, Attempt, Exchange, MirrorFate, Outcome, Pair, Usage

__all__ = ["SqliteLogStore"]

_COLUMNS: Final = (
    "id", "timestamp", "workload_id", "client_id", "session_id", "model", "arm", "outcome", "status", "path", "stream",
    "latency_ms", "ttft_ms", "input_tokens", "output_tokens", "cost_usd", "config_snapshot", "rollout", "trace_id",
    "error", "mirror", "mirror_of", "breaker", "attempts", "request", "response", "redacted",
)  # fmt: skip
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS exchanges (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE, timestamp REAL NOT NULL, workload_id TEXT NOT NULL, client_id TEXT NOT NULL,
    session_id TEXT NOT NULL, model TEXT NOT NULL, arm TEXT NOT NULL, outcome TEXT NOT NULL, status INTEGER NOT NULL,
    path TEXT NOT NULL, stream INTEGER NOT NULL, latency_ms REAL NOT NULL, ttft_ms REAL, input_tokens INTEGER,
    output_tokens INTEGER, cost_usd REAL, config_snapshot TEXT NOT NULL, rollout TEXT NOT NULL, trace_id TEXT NOT NULL,
    error TEXT NOT NULL, mirror TEXT NOT NULL, mirror_of TEXT NOT NULL, breaker TEXT NOT NULL, attempts TEXT NOT NULL,
    request TEXT, response TEXT, redacted TEXT
);
CREATE INDEX IF NOT EXISTS exchanges_workload ON exchanges (workload_id, id);
CREATE INDEX IF NOT EXISTS exchanges_rollout ON exchanges (rollout, seq) WHERE rollout != '';
"""
_ADDED: Final = ("redacted",)  # since the first version
_INSERT: Final = (
    f"INSERT INTO exchanges ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))}) "
    "ON CONFLICT (id) DO NOTHING"
)
_PAGE: Final = 500
DAY: Final = 86_400


class SqliteLogStore:
    """See gateway.logstore.LogStore. Raises StoreError when the file cannot be read or written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: aiosqlite.Connection | None = None
        self._opening = asyncio.Lock()

    async def append(self, exchanges: Sequence[Exchange]) -> None:
        rows = [_row(exchange) for exchange in exchanges]
        try:
            connection = await self._open()
            await connection.executemany(_INSERT, rows)
            await connection.commit()
        except sqlite3.Error as error:
            if self._connection is not None:
                await self._connection.rollback()
            raise StoreError(f"{self._path}: {error}") from error

    async def scan(self, query: Query) -> AsyncIterator[Exchange]:
        """Keyset pages by id: constant memory, and never a long read transaction."""
        left, last = query.limit, query.after
        while left is None or left > 0:
            page = _PAGE if left is None else min(_PAGE, left)
            rows = await self._select(*_sql(query, last, page))
            for row in rows:
                yield _exchange(row)
            if len(rows) < page:
                return
            last = rows[-1]["id"]
            left = None if left is None else left - len(rows)

    async def get(self, exchange_id: str) -> Exchange | None:
        rows = await self._select("SELECT * FROM exchanges WHERE id = ?", [exchange_id])
        return _exchange(rows[0]) if rows else None

    async def pairs(self, rollout: str, after: str | None, limit: int) -> list[Pair]:
        mirrors = await self._select(
            "SELECT * FROM exchanges WHERE rollout = ? AND arm = 'mirror' "
            "AND seq > coalesce((SELECT seq FROM exchanges WHERE id = ?), 0) ORDER BY seq LIMIT ?",
            [rollout, after, limit],
        )
        marks = ", ".join("?" * len(mirrors))
        originals = await self._select(
            f"SELECT * FROM exchanges WHERE id IN ({marks})", [m["mirror_of"] for m in mirrors]
        )
        live = {row["id"]: _exchange(row) for row in originals}
        return [Pair(live=live[m["mirror_of"]], mirrored=_exchange(m)) for m in mirrors if m["mirror_of"] in live]

    async def counts(self, workload: str | None = None) -> LogCounts:
        where, values = ("WHERE workload_id = ?", [workload]) if workload is not None else ("", [])
        rows = await self._select(
            f"SELECT arm = 'mirror' AS mirrored, outcome, count(*) AS n FROM exchanges {where} GROUP BY 1, 2", values
        )
        by_outcome: dict[str, int] = {}
        for row in rows:
            if not row["mirrored"]:
                by_outcome[row["outcome"]] = by_outcome.get(row["outcome"], 0) + row["n"]
        mirrors = sum(row["n"] for row in rows if row["mirrored"])
        return LogCounts(live=sum(by_outcome.values()), mirrors=mirrors, by_outcome=by_outcome)

    async def expire(self, before: float) -> int:
        """See LogStore. The file keeps its size; what was freed is used again."""
        midnight = id_at(int(before // DAY * DAY * 1000), bytes(10))
        try:
            connection = await self._open()
            cursor = await connection.execute(
                "SELECT count(DISTINCT substr(datetime(timestamp, 'unixepoch'), 1, 10)) FROM exchanges WHERE id < ?",
                [midnight],
            )
            ((days,),) = await cursor.fetchall()
            await connection.execute("DELETE FROM exchanges WHERE id < ?", [midnight])
            await connection.commit()
        except sqlite3.Error as error:
            raise StoreError(f"{self._path}: {error}") from error
        return int(days)

    async def close(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            await connection.close()

    async def _open(self) -> aiosqlite.Connection:
        async with self._opening:
            if self._connection is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                connection = await aiosqlite.connect(self._path, timeout=10)
                connection.row_factory = sqlite3.Row
                try:
                    await connection.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;" + _SCHEMA)
                    await _add_columns(connection)
                except sqlite3.Error:
                    await connection.close()
                    raise
                self._connection = connection
        return self._connection

    async def _select(self, sql: str, values: Sequence[Any]) -> list[sqlite3.Row]:
        try:
            connection = await self._open()
            return list(await connection.execute_fetchall(sql, values))
        except sqlite3.Error as error:
            raise StoreError(f"{self._path}: {error}") from error


async def _add_columns(connection: aiosqlite.Connection) -> None:
    """Give a file of an earlier version the columns that came since."""
    have = {row["name"] for row in await connection.execute_fetchall("PRAGMA table_info(exchanges)")}
    for name in _ADDED:
        if name not in have:
            try:
                await connection.execute(f"ALTER TABLE exchanges ADD COLUMN {name} TEXT")
            except sqlite3.OperationalError as error:
                if "duplicate column" not in str(error):  # another process was quicker
                    raise


def _sql(query: Query, last: str | None, page: int) -> tuple[str, list[Any]]:
    clauses: list[str] = []
    values: list[Any] = []
    for column, value in (
        ("workload_id", query.workload),
        ("client_id", query.client),
        ("model", query.model),
        ("outcome", query.outcome),
        ("rollout", query.rollout),
    ):
        if value is not None:
            clauses.append(f"{column} = ?")
            values.append(str(value))
    for clause, bound in (
        ("timestamp >= ?", query.since),
        ("timestamp < ?", query.until),
        ("id < ?" if query.newest_first else "id > ?", last),
    ):
        if bound is not None:
            clauses.append(clause)
            values.append(bound)
    if query.kind != "any":
        clauses.append("arm = 'mirror'" if query.kind == "mirror" else "arm != 'mirror'")
    where = f"WHERE {' AND '.join(clauses)}" if clauses else ""
    return f"SELECT * FROM exchanges {where} ORDER BY id {'DESC' if query.newest_first else 'ASC'} LIMIT ?", [
        *values,
        page,
    ]


def _row(exchange: Exchange) -> tuple[Any, ...]:
    usage = exchange.usage
    values: dict[str, Any] = {
        "input_tokens": usage.input_tokens if usage else None,
        "output_tokens": usage.output_tokens if usage else None,
        "attempts": orjson.dumps(exchange.attempts).decode(),
        "request": _json(exchange.request),
        "response": _json(exchange.response),
        "redacted": _json(exchange.redacted),
    }
    return tuple(values[name] if name in values else _plain(getattr(exchange, name)) for name in _COLUMNS)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, str) else value


def _json(value: Any) -> str | None:
    return None if value is None else orjson.dumps(value).decode()


def _exchange(row: sqlite3.Row) -> Exchange:
    values = {name: row[name] for name in _COLUMNS if name not in ("input_tokens", "output_tokens")}
    counted = row["input_tokens"] is not None
    values |= {
        "arm": Arm(row["arm"]),
        "outcome": Outcome(row["outcome"]),
        "mirror": MirrorFate(row["mirror"]),
        "stream": bool(row["stream"]),
        "usage": Usage(input_tokens=row["input_tokens"], output_tokens=row["output_tokens"]) if counted else None,
        "attempts": tuple(Attempt(**attempt) for attempt in orjson.loads(row["attempts"])),
        "request": row["request"] and orjson.loads(row["request"]),
        "response": row["response"] and orjson.loads(row["response"]),
        "redacted": row["redacted"] and orjson.loads(row["redacted"]),
    }
    return Exchange(**values)
