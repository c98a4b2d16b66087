"""Erases a client everywhere: spool and quarantine, log store, sinks; and writes down that it did."""

import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from flywheel.audit import Audit, digest_of
from flywheel.cli.logs_stats import segment_sizes
from flywheel.cli.output import Progress, user
from flywheel.cli.stores import with_engine, with_log_store
from gateway.config import Settings
from gateway.errors import ConfigError, StoreError
from gateway.logstore import LogStore
from gateway.presidio import redactor_of
from gateway.sinks import FileSink, open_sink
from gateway.supervise import gateway_process
from gateway.tombstones import Tombstones
from routing.audit import Fact

__all__ = ["Erased", "forget", "names_of"]


@dataclass(slots=True, kw_only=True)
class Erased:
    """How much went from where. `waiting` are bytes in the spool, where the client is left out as they are shipped.

    `audited`: the audit log has its entry; otherwise that waits for the control database.
    """

    exchanges: int = 0
    sinks: int = 0
    quarantined: int = 0
    waiting: int = 0
    complete: bool = False
    audited: bool = False


def names_of(settings: Settings, client: str) -> list[str]:
    """The id, and the pseudonym that stands in its place where exchanges are masked. Raises ConfigError."""
    if not client or not client.isprintable():
        raise ConfigError("--client: wants the id of one client, as `understudy logs tail` shows it")
    return list(dict.fromkeys((client, redactor_of(settings.privacy).tag(client))))


def forget(settings: Settings, config: Path | None, names: list[str], *, ship: bool, progress: Progress) -> Erased:
    """Erase what is logged until now under any of the names. Raises StoreError, when the rest was noted: ask again.

    With `ship` the spool is emptied first, which needs that no shipper runs.
    """
    erased, now = Erased(), time.time()
    try:
        progress.at("spool")
        erased.quarantined = Tombstones(settings.spool_dir).add(names, now)
        if ship and segment_sizes(settings):
            _ship(config)
        _from_stores(settings, names, erased, progress)
        erased.complete = True
    finally:
        progress.clear()
        erased.waiting = sum(segment_sizes(settings))
        erased.audited = _record(settings, names, erased, now)
    return erased


def _record(settings: Settings, names: list[str], erased: Erased, now: float) -> bool:
    """The entry names nobody: it has a digest of each name, the first of which is that of the id that was asked for."""
    digests = [digest_of(name, settings.privacy.salt) for name in names]
    body = {key: value for key, value in asdict(erased).items() if key != "audited"} | {"client": digests}
    fact = Fact(at=now, who=user(), kind="log.forgotten", subject=digests[0], body=body)
    return with_engine(settings, lambda engine: Audit(engine, settings.data_dir).record(fact))


def _ship(config: Path | None) -> None:
    options = ["--once", *(["--config", str(config.absolute())] if config else [])]
    done = subprocess.run(gateway_process("gateway.ship", *options), capture_output=True, text=True, check=False)
    if done.returncode:
        raise StoreError("the spool could not be shipped; see `understudy logs ship --once`, then forget again")


def _from_stores(settings: Settings, names: list[str], erased: Erased, progress: Progress) -> None:
    """The sinks have their turn also when the log store failed."""
    sinks = [open_sink(url) for url in settings.log_sinks]

    async def erase(store: LogStore) -> None:
        failures: list[StoreError] = []
        targets: list[tuple[str, LogStore | FileSink]] = [("log store", store)]
        targets += [(f"sink {number}", sink) for number, sink in enumerate(sinks, 1)]
        for name in names:
            for place, target in targets:
                progress.at(f"{place}: {erased.exchanges + erased.sinks:,} erased")
                try:
                    gone = await target.forget(name)
                except StoreError as error:
                    failures.append(error)
                    continue
                if target is store:
                    erased.exchanges += gone
                else:
                    erased.sinks += gone
        if failures:
            raise failures[0]

    with_log_store(settings, erase)
