"""
Who is to be told, and how: everything the relay has to know about a destination.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from outbox.gate import CONFIGURATION, OUTAGE, Backoff
from outbox.observer import UNOBSERVED, Observer
from outbox.store import NOTHING, LookUp

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncConnection

    from outbox.event import Event
    from outbox.outcome import Delivered, Settlement, Skipped
    from outbox.retry import RetryPolicy


def by_key(event: Event) -> dict[str, object]:
    """
    What an event is called, if the application has no other name for it.
    """
    return {"key": event.key}


DOUBT_SECONDS = 150.0
"""
How long a request whose answer never came may still take effect: an assumption, as no page
of Dataverse's promises a bound. Microsoft's own Python client waits 120 s for a write; half a
minute is for the way there.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """
    Everything the relay has to know about who is to be told.

    Args:
        organization_id: only this organisation's events are claimed.
        deliver: `(event, seconds)` sends one state within the seconds given, and returns
            or raises a `DeliveryError`. It must be idempotent.
        look_up: what deliveries need from the database, read by the statement that claims
            their events; each then has its own as `found`.
        record: writes what settling means to the application, in the same transaction.
        redrive: enqueues the current state of keys that died of something that passes, at
            most so many (None: all), in transactions of its own; returns how many.
        attempt_seconds: no attempt takes longer.
        lease_seconds: how long a claim lasts.
        doubt_seconds: how long a request whose answer never came may still take effect.
        outage, configuration: how long the gate closes for each of these reasons.
        breaker_keys: different keys failing in a row that make an outage.
        poll_seconds: between looks at the database when nothing else wakes the relay; None
            leaves it to the relay.
        names: what the application calls whom an event is about, for logs.
        observer: told what is done.

    Raises:
        ValueError: an attempt could outlive its lease.
    """

    name: str
    organization_id: UUID
    deliver: Callable[[Event, float], Awaitable[Delivered | Skipped]]
    record: Callable[[AsyncConnection, Sequence[Settlement]], Awaitable[None]]
    redrive: Callable[[int | None], Awaitable[int]]
    policy: RetryPolicy
    look_up: LookUp = NOTHING
    concurrency: int = 8
    attempt_seconds: float = 5.0
    lease_seconds: float = 60.0
    doubt_seconds: float = DOUBT_SECONDS
    outage: Backoff = OUTAGE
    configuration: Backoff = CONFIGURATION
    breaker_keys: int = 5
    poll_seconds: float | None = None
    names: Callable[[Event], Mapping[str, object]] = by_key
    observer: Observer = UNOBSERVED

    def __post_init__(self) -> None:
        # Half the lease may pass before an attempt starts, and the other half is for it.
        if self.lease_seconds <= 2 * self.attempt_seconds:
            raise ValueError(
                f"A lease of {self.lease_seconds} s is too short for attempts of "
                f"{self.attempt_seconds} s; make it more than twice as long."
            )

    def about(self, event: Event) -> dict[str, object]:
        """
        What every line of a log says about an event.
        """
        return {
            "event_id": event.id,
            "version": event.version,
            "attempt": event.attempts,
            **self.names(event),
        }
