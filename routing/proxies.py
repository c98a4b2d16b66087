"""By which HTTP proxy an upstream is reached: what HTTPS_PROXY and NO_PROXY of the environment say. Pure."""

import ipaddress
from collections.abc import Mapping
from typing import Final
from urllib.parse import SplitResult, urlsplit

from routing.targets import Model

__all__ = ["NO_PROXY", "peer_of", "port_of", "proxy_of"]

NO_PROXY: Final = "none"  # what routing.yaml writes for "by none, whatever the environment says"


def peer_of(model: Model) -> tuple[str, int] | None:
    """Host and port that a call to the model connects to first: its proxy's, or its own. None where litellm knows."""
    parts = urlsplit(model.proxy or model.base_url)
    if not parts.hostname:
        return None
    return parts.hostname, port_of(parts)


def port_of(parts: SplitResult) -> int:
    """The port of a URL, or its scheme's."""
    return parts.port or (443 if parts.scheme == "https" else 80)


def proxy_of(base_url: str, env: Mapping[str, str]) -> str | None:
    """The proxy for an https upstream, or None.

    `https_proxy` comes before `HTTPS_PROXY`. `no_proxy` lists hosts, domains with what is below them, addresses,
    networks (10.0.0.0/8) and host:port, by commas; `*` is everything. This machine is never reached by a proxy. Plain
    http goes directly: it is the way inside a network.
    """
    parts = urlsplit(base_url)
    said = dict(env.items())
    proxy = said.get("https_proxy") or said.get("HTTPS_PROXY")
    if parts.scheme != "https" or not proxy:
        return None
    host, port = parts.hostname or "", port_of(parts)
    exempt = [entry.strip().lower() for entry in (said.get("no_proxy") or said.get("NO_PROXY") or "").split(",")]
    if _is_here(host) or any(_covers(entry, host, port) for entry in exempt if entry):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _is_here(host: str) -> bool:
    address = _address(host)
    return host == "localhost" if address is None else address.is_loopback


def _covers(entry: str, host: str, port: int) -> bool:
    if entry == "*":
        return True
    address = _address(host)
    if address is not None and "/" in entry:
        try:
            return address in ipaddress.ip_network(entry, strict=False)
        except ValueError:
            return False
    if _address(entry) is None and entry.endswith(f":{port}"):
        entry = entry.removesuffix(f":{port}")
    name = entry.strip("[]").removeprefix("*").removeprefix(".")
    return host == name or (address is None and host.endswith(f".{name}"))


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
