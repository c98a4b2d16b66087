"""`pytest -p tests.compiled ...`: what a test runs in its own process is compiled too, as it is in a gateway's."""

from gateway.compiled import activate

if not activate():
    raise RuntimeError("these sources are not compiled: make compiled")
