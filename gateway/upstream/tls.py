"""TLS to upstreams: always verified, by the system's certificates or by a file of one's own."""

import ssl
from pathlib import Path

__all__ = ["Contexts", "refusal"]


class Contexts:
    """One for each file of certificates, made when it is first needed (20 ms), and anew when the file has changed.

    "" is the system's, or what the variables SSL_CERT_FILE and SSL_CERT_DIR name.
    """

    def __init__(self) -> None:
        self._made: dict[str, tuple[int, ssl.SSLContext]] = {}

    def of(self, ca_file: str) -> ssl.SSLContext:
        """Raises OSError where the file cannot be read, or holds no certificates."""
        changed = Path(ca_file).stat().st_mtime_ns if ca_file else 0
        made = self._made.get(ca_file)
        if made is None or made[0] != changed:
            context = ssl.create_default_context(cafile=ca_file or None)
            context.set_alpn_protocols(["http/1.1"])
            made = self._made[ca_file] = (changed, context)
        return made[1]


def refusal(error: OSError) -> str:
    """Why there is no connection, in words that name what to do where it is a matter of trust."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}; ca_file names another authority's file"
    return error.strerror or str(error)
