"""
What is told at /metrics, under which names.

Names and units are Prometheus' own: seconds, and `_total` for what only grows. Labels come from
small closed sets: never a mentor, an event or the text of an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from outbox.outcome import Ending

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from uuid import UUID

OUTCOMES = (*get_args(Ending), "retry", "deferred")
"""How an attempt may end."""

ANSWERS = ("delivered", "skipped", "retry", "deferred", "dead")
"""What an attempt may lead to, before it is known whether a newer state has come."""

NIGHT = ("expire", "reconcile", "remind", "redrive", "drain", "reminders")
JOBS = ("nightly", *(f"nightly_{part}" for part in NIGHT), "prune")
"""What runs beside the deliveries: the night run, its parts, and forgetting old history."""

REQUEST_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
TRANSACTION_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

# When a counter was made is of no interest, and doubles what is told.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True, kw_only=True)
class DestinationMetrics:
    """
    Those of one destination, found once and not at each event.
    """

    attempts: Mapping[str, Counter]
    requests: Mapping[str, Histogram]
    transactions: Histogram
    last_round_trip: Gauge
    claims: Counter
    lost_claims: Counter
    redriven: Counter


class Metrics:
    """
    Everything that one worker tells.

    Args:
        revision: of the migration that this release needs.
    """

    def __init__(self, *, organization_id: UUID, version: str, revision: str) -> None:
        self.registry = CollectorRegistry()
        self._organization = str(organization_id)
        ProcessCollector(registry=self.registry)
        build = self._gauge("build_info", "What runs here.", "version", "revision")
        build.labels(self._organization, version, revision).set(1)
        ready = self._gauge("ready", "Whether it claims and has answers from the database.")
        self.ready = ready.labels(self._organization)
        self._last_success = self._gauge(
            "last_success_timestamp_seconds", "When a task last succeeded.", "task"
        )
        self._attempts = self._counter(
            "attempts", "Attempts that are settled.", "destination", "outcome"
        )
        self._requests = self._histogram(
            "request_duration_seconds",
            "From the beginning of an attempt to what came of it.",
            REQUEST_SECONDS,
            "destination",
            "outcome",
        )
        self._transactions = self._histogram(
            "transaction_duration_seconds",
            "Transactions that settle and claim.",
            TRANSACTION_SECONDS,
            "destination",
        )
        self._last_round_trip = self._gauge(
            "relay_last_round_trip_timestamp_seconds",
            "When the relay last had an answer from the database.",
            "destination",
        )
        self._claims = self._counter("claims", "Events that were claimed.", "destination")
        self._lost_claims = self._counter(
            "lost_claims", "Claims whose lease ended before the result was written.", "destination"
        )
        self._redriven = self._counter(
            "redriven", "States that were enqueued again after an outage.", "destination"
        )

    def of(self, destination: str) -> DestinationMetrics:
        """
        Those of one destination; from now on they are told, as 0 to begin with.
        """
        where = (self._organization, destination)
        return DestinationMetrics(
            attempts={one: self._attempts.labels(*where, one) for one in OUTCOMES},
            requests={one: self._requests.labels(*where, one) for one in ANSWERS},
            transactions=self._transactions.labels(*where),
            last_round_trip=self._last_round_trip.labels(*where),
            claims=self._claims.labels(*where),
            lost_claims=self._lost_claims.labels(*where),
            redriven=self._redriven.labels(*where),
        )

    def succeeded(self, job: str, *, at: float) -> None:
        """
        Note when a job last succeeded, in seconds since 1970; others than `JOBS` are not told.
        """
        if job in JOBS:
            self._last_success.labels(self._organization, job).set(at)

    def _gauge(self, name: str, says: str, *labels: str) -> Gauge:
        return Gauge(f"hlf_sync_{name}", says, ("organization_id", *labels), registry=self.registry)

    def _counter(self, name: str, says: str, *labels: str) -> Counter:
        return Counter(
            f"hlf_sync_{name}", says, ("organization_id", *labels), registry=self.registry
        )

    def _histogram(self, name: str, says: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(
            f"hlf_sync_{name}",
            says,
            ("organization_id", *labels),
            buckets=buckets,
            registry=self.registry,
        )
