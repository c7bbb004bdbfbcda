"""The tree of refusals and failures; it knows no wire.

ServingError
├── InvalidRequest       malformed, whatever our state
├── NotFound             no such model, version or pinned variant
├── Infeasible           no variant could meet this SLO even on an idle server
├── Overloaded           could when idle, cannot now; carries when to try again
├── DeadlineMissed       admitted, then expired or hopeless
├── Cancelled            the client went away
├── Unavailable          draining, or no model ready
├── Unauthenticated      no or wrong credentials
├── PermissionDenied     credentials that lack the scope
├── NotOffered           a feature that is off or does not exist here
└── RuntimeFailed        our fault: a runtime or a bug; carries an id that the log explains
"""

from __future__ import annotations


class ServingError(Exception):
    """Why a request got no answer. The text is for the client: no path, no trace, no internal name."""


class InvalidRequest(ServingError):
    """The request is wrong whatever the server's state."""


class NotFound(ServingError):
    """The model, version or pinned variant does not exist here."""


class Infeasible(ServingError):
    """No allowed variant can meet this SLO even on an idle server."""


class Overloaded(ServingError):
    """The SLO could be met when idle but not now, or the queue is full. None: trying again is no use."""

    def __init__(self, message: str, retry_after_ns: int | None) -> None:
        super().__init__(message)
        self.retry_after_ns = retry_after_ns


class DeadlineMissed(ServingError):
    """The request was admitted and then expired, or became hopeless."""


class Cancelled(ServingError):
    """The client cancelled the request."""


class Unavailable(ServingError):
    """The server is draining, or the model is not ready."""


class Unauthenticated(ServingError):
    """No credentials, or wrong ones."""


class PermissionDenied(ServingError):
    """The credentials do not cover this method."""


class NotOffered(ServingError):
    """The feature is switched off or not part of this server."""


class RuntimeFailed(ServingError):
    """A runtime failed, or we did. The client sees a fixed text and the incident's id."""

    def __init__(self, incident: str) -> None:
        super().__init__(f"the model failed to answer; incident {incident}")
        self.incident = incident
