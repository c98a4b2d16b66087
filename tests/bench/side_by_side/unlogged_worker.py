"""A gateway worker whose exchanges go nowhere: what the log costs is the difference. For the benchmark alone."""

import sys

from gateway import worker
from gateway.app import build
from tests.bench.bench_handle import NoLog


class Nowhere(NoLog):
    """As a worker wants it."""

    async def run(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


if __name__ == "__main__":
    raise SystemExit(worker.main(sys.argv[1:], application=lambda s, m: build(s, shared_metrics=m, spool=Nowhere())))
