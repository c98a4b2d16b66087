"""Errors of the gateway and of what it shares with the flywheel: what is wrong, where, and what to do about it.

UnderstudyError
├── ConfigError        a setting, routing file or data file that cannot be used
│   └── MissingExtra       it needs an optional part that is not installed
├── CannotCompile      the hot path cannot be compiled here; it runs all the same
├── CannotRedact       bytes that cannot be searched for personal data, and so must not be kept
├── StoreError         the log store or the control database did not do what was asked
│   └── RecordsRefused     the store took all but some exchanges, which it will never take
├── UpstreamError      the upstream gave no usable answer
│   ├── ConnectError       no connection, nothing was sent
│   │   └── ConnectTimeout     none within its deadline; an UpstreamTimeout as well
│   ├── Shed               a model has as many calls as it may have, nothing was sent
│   ├── UpstreamTimeout    a deadline passed
│   └── UpstreamCut        the connection ended inside the reply
└── RequestRefused     the gateway's own "no", with an HTTP status
"""

from collections.abc import Mapping

import orjson


class UnderstudyError(Exception):
    """Root of the project's errors: what the CLI prints as one line, without a traceback."""


class ConfigError(UnderstudyError):
    """A setting, routing file or data file that cannot be used."""


class MissingExtra(ConfigError):
    """A setting asks for a part that is installed on demand. `install` is the command that brings it."""

    def __init__(self, what: str, extra: str) -> None:
        self.install = f"pip install 'understudy[{extra}]'"
        super().__init__(f"{what} needs an optional part that is not installed: {self.install}")


class CannotCompile(UnderstudyError):
    """The hot path cannot be compiled here. Everything runs all the same, interpreted."""


class CannotRedact(UnderstudyError):
    """Bytes that cannot be searched for personal data, and so must not be kept. The message holds none of them."""


class StoreError(UnderstudyError):
    """The log store or the control database did not do what was asked."""


class RecordsRefused(StoreError):
    """Some exchanges of a batch can never be stored; all others of it are. `reasons` says why, by id.

    To send these again is useless: keep them aside. Any other StoreError says: send the batch again.
    """

    def __init__(self, where: str, reasons: Mapping[str, str]) -> None:
        self.reasons = dict(reasons)
        first = next(iter(self.reasons.items()), ("", ""))
        super().__init__(f"{where} refused {len(self.reasons)} exchanges for good; the first, {first[0]}: {first[1]}")


class UpstreamError(UnderstudyError):
    """The upstream gave no usable answer."""


class ConnectError(UpstreamError):
    """No connection to the upstream: nothing was sent."""


class UpstreamTimeout(UpstreamError):
    """A deadline passed while the upstream was to answer."""


class ConnectTimeout(ConnectError, UpstreamTimeout):
    """No connection to the upstream within the deadline: nothing was sent."""


class Shed(UpstreamError):
    """The model has as many calls as it may have at a time, and no room in its queue: nothing was sent."""


class UpstreamCut(UpstreamError):
    """The upstream's connection ended inside its reply."""


class RequestRefused(UnderstudyError):
    """The gateway's own refusal. `status` is the HTTP status, `code` a stable word, `param` the offending field.

    `retry_after` is in seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.kind = kind
        self.param = param
        self.retry_after = retry_after or (1 if status == 503 else None)

    @property
    def body(self) -> bytes:
        """The reply's body, in OpenAI's shape."""
        return error_body(str(self), kind=self.kind, code=self.code, param=self.param)

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """What the reply's head says beside the error itself."""
        if self.status == 401:
            return [(b"www-authenticate", b"Bearer")]
        return [] if self.retry_after is None else [(b"retry-after", b"%d" % self.retry_after)]


def error_body(message: str, *, kind: str, code: str | None, param: str | None = None) -> bytes:
    """An error in OpenAI's shape, as bytes."""
    return orjson.dumps({"error": {"message": message, "type": kind, "code": code, "param": param}})
