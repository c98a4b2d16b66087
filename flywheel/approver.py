"""Who stands behind an approval by a command; the API knows it from the key that each call shows."""

from sqlalchemy.ext.asyncio import AsyncEngine

from gateway.config import Settings, environment
from gateway.errors import ConfigError
from gateway.keys import approver

__all__ = ["KEY", "authenticated"]

KEY = "UNDERSTUDY_KEY"  # the environment variable that holds the caller's own key: arguments show in process lists


async def authenticated(settings: Settings, engine: AsyncEngine) -> str:
    """The owner of the key that the caller showed; "" where neither gateway nor API want keys, or nobody showed one.

    Raises ConfigError for a key that may not approve, and Unavailable.
    """
    secret = environment().get(KEY, "")
    if not (settings.gateway.authenticates or settings.api_authenticates) or not secret:
        return ""
    who = await approver(engine, secret)
    if who is None:
        raise ConfigError(f"the key in {KEY} is unknown, expired, revoked, or without the scope admin")
    return who
