"""A gateway worker whose exchanges go nowhere: what the log costs is the difference. For the benchmark alone."""

import sys

from gateway.compiled import activate


def main(argv: list[str]) -> int:
    """As gateway.worker's, and compiled as that is, which must be said before anything else is imported."""
    activate()
    from gateway import worker
    from gateway.app import build
    from tests.bench.bench_handle import NoLog

    class Nowhere(NoLog):
        """As a worker wants it."""

        async def run(self) -> None:
            """Nothing to do."""

        def close(self) -> None:
            """Nothing to do."""

    return worker.main(argv, application=lambda s, m: build(s, shared_metrics=m, spool=Nowhere()))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
