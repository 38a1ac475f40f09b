"""
What relays tell, kept as figures; and when a worker counts as ready.

A worker is ready while each of its relays has had an answer from the database lately: within
two polls and the time that one attempt may take, as a relay whose places are all taken has
nothing to ask before one of them is free.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from typing_extensions import override

from outbox import Observer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from outbox import Destination, Settlement
    from outbox.outcome import Outcome
    from worker.monitoring.metrics import DestinationMetrics

SHORTEST_SECONDS = 5.0
"""A worker that polls often is not given up for one slow answer."""


def patience(destination: Destination, *, poll_seconds: float) -> float:
    """
    For how many seconds a relay may be without an answer and still count as ready.

    Args:
        poll_seconds: of a destination that has none of its own.
    """
    poll = destination.poll_seconds or poll_seconds
    return max(SHORTEST_SECONDS, 2 * poll + destination.attempt_seconds)


class Watch(Observer):
    """
    On one relay.

    Args:
        patience_seconds: see `patience`.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        name: str,
        metrics: DestinationMetrics,
        *,
        patience_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._metrics = metrics
        self._patience_seconds = patience_seconds
        self._clock = clock
        self._turned_at: float | None = None
        self._stopping = False

    @property
    def trouble(self) -> str | None:
        """
        Why it is not ready, in one sentence; None if it is.
        """
        if self._stopping:
            return "It was told to stop and claims nothing more."
        if self._turned_at is None:
            return f"The relay of {self._name} has had no answer from the database yet."
        silent = self._clock() - self._turned_at
        if silent > self._patience_seconds:
            return (
                f"The relay of {self._name} has had no answer from the database for {silent:.0f} s."
            )
        return None

    @override
    def turned(self, *, seconds: float, claimed: int) -> None:
        self._turned_at = self._clock()
        self._metrics.transactions.observe(seconds)
        self._metrics.last_round_trip.set_to_current_time()
        self._metrics.claims.inc(claimed)

    @override
    def attempted(self, outcome: Outcome, *, seconds: float) -> None:
        self._metrics.requests[type(outcome).__name__.lower()].observe(seconds)

    @override
    def settled(self, settlements: Sequence[Settlement]) -> None:
        for one in settlements:
            self._metrics.attempts[one.ending or type(one.outcome).__name__.lower()].inc()

    @override
    def lost(self, claims: int) -> None:
        self._metrics.lost_claims.inc(claims)

    @override
    def redriven(self, keys: int) -> None:
        self._metrics.redriven.inc(keys)

    @override
    def stopping(self) -> None:
        self._stopping = True
