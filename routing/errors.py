"""Errors of routing: rules that cannot be used, and changes of a rollout that are refused.

RoutingError
├── RulesError   routing.yaml is wrong; the message names file, line and key
├── Refused      this event is not possible in the rollout's state
├── Conflict     somebody else changed the rollout first
├── NotFound     no such rollout or workload
└── Unavailable  the control database does not answer, or lacks its tables
"""


class RoutingError(Exception):
    """Root of routing's errors; each message is one line that a person can act on."""


class RulesError(RoutingError):
    """routing.yaml is wrong; the message names file, line and key."""


class Refused(RoutingError):
    """This event is not possible in the rollout's state."""


class Conflict(RoutingError):
    """Somebody else changed the rollout first: read it again."""


class NotFound(RoutingError):
    """No such rollout or workload."""


class Unavailable(RoutingError):
    """The control database does not answer, or lacks its tables (`understudy db upgrade` makes them)."""
