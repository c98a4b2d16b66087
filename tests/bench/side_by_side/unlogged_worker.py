"""A gateway worker whose exchanges go nowhere: what the log costs is the difference. For the benchmark alone."""

import sys
from collections.abc import Sequence
from typing import Any

from gateway import worker
from gateway.app import build
from gateway.spool import Kind


class Nowhere:
    """A spool that keeps nothing."""

    refusing = False

    def begin(self, header: dict[str, Any], request: bytes) -> Kind | None:
        return Kind.CLOSE

    def append(self, header: dict[str, Any], request: bytes, response: Sequence[bytes] = ()) -> bool:
        return True

    def pieces(self, call: dict[str, Any], kind: Kind, body: bytes, at: int) -> None:
        """Nothing to do."""

    def record(self, header: dict[str, Any], request: bytes, response: Sequence[bytes] = ()) -> bool:
        return True

    async def run(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


if __name__ == "__main__":
    raise SystemExit(worker.main(sys.argv[1:], application=lambda s, m: build(s, shared_metrics=m, spool=Nowhere())))
