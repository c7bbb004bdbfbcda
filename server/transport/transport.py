"""The bulk boundary between the wire and the engine: calls in, replies out, many at a time, bytes only.

Rules: a transport never parses a message and never decides; the engine never learns which transport it has.
A *call* is one request message. A unary rpc is one call. In a bidirectional stream every message is its own call
and `stream` names the rpc they share; the transport ends the rpc with OK once the client has half-closed and
every call of the stream has had its final reply. In a server-streaming rpc the one call gets many replies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

Kind = Literal["unary", "server_stream", "bidi"]
"""How many messages an rpc has each way."""


@dataclass(frozen=True, slots=True)
class Status:
    """A gRPC status: its number, a text for the client, and a serialised `google.rpc.Status` or nothing."""

    code: int
    message: str
    details: bytes = b""


@dataclass(slots=True, eq=False)
class Call:
    """One request message. `method` is the full path; instants are `time.monotonic_ns`."""

    method: str
    message: bytes
    arrival_ns: int
    deadline_ns: int | None
    metadata: tuple[tuple[str, str | bytes], ...]
    peer: str
    stream: object | None = None
    cancelled: bool = field(default=False)
    """Set by the transport when the client has gone; a reply to such a call is dropped silently."""


@dataclass(slots=True)
class Reply:
    """What goes back for a call. A `status` other than None ends the rpc, the whole stream included."""

    call: Call
    message: bytes | None = None
    status: Status | None = None
    trailing: tuple[tuple[str, str], ...] = ()
    final: bool = True


class Taken(NamedTuple):
    """What arrived since the last `take`."""

    calls: list[Call]
    cancelled: list[Call]


class Transport(Protocol):
    """Moves bytes. `take` and `reply` may be called from any thread; only one thread takes at a time."""

    def start(self) -> int:
        """Bind and accept; returns the bound port. Raises OSError if the address cannot be bound."""
        ...

    def take(self, timeout_ns: int | None) -> Taken:
        """All waiting calls and cancellations at once; waits for the first, for `wake`, or for the timeout."""
        ...

    def wake(self) -> None:
        """Make a thread that is waiting in `take`, or the next one to wait, return at once."""
        ...

    def reply(self, replies: Sequence[Reply]) -> None:
        """Send many replies; never blocks on a slow client."""
        ...

    def stop(self, grace_ns: int) -> None:
        """Stop accepting, let open rpcs finish for at most `grace_ns`, then close."""
        ...
