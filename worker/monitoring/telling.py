"""
What the database says, under the names of /metrics.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, get_args

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from typing_extensions import override

from outbox.gate import ALL_REASONS, GateState

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from uuid import UUID

    from prometheus_client import Metric

    from worker.monitoring.figures import Figures

WANTED = ("hide", "show")
RECOVERABLE = ("true", "false")


class FiguresCollector(Collector):
    """
    One answer of the database; without one only that there is none.
    """

    def __init__(
        self, figures: Figures | None, destinations: Sequence[str], *, organization_id: UUID
    ) -> None:
        self._figures = figures
        self._destinations = destinations
        self._organization = str(organization_id)

    @override
    def collect(self) -> Iterable[Metric]:
        yield self._family(
            "database_up",
            "Whether the database answered; without an answer all about events is missing.",
            (),
            {(): float(self._figures is not None)},
        )
        if self._figures is not None:
            yield from self._events(self._figures)
            yield from self._failures(self._figures)
            yield from self._gates(self._figures)

    def _events(self, figures: Figures) -> Iterator[Metric]:
        queues = {one["destination"]: one for one in figures.queues}
        counts: dict[tuple[str, ...], float] = {}
        ages: dict[tuple[str, ...], float] = {}
        for name in self._destinations:
            queue = queues.get(name, {})
            for state in ("waiting", "in_flight"):
                counts[name, state] = queue.get(state, 0)
            ages[(name,)] = queue.get("oldest_seconds", 0)
        yield self._family("events", "Live events.", ("destination", "state"), counts)
        yield self._family(
            "oldest_event_age_seconds", "Of the oldest live event.", ("destination",), ages
        )
        yield self._family(
            "wrongly_visible_seconds",
            "How long the portal may have shown somebody whom it must not, at the longest.",
            (),
            {(): figures.wrongly_visible_seconds},
        )

    def _failures(self, figures: Figures) -> Iterator[Metric]:
        counts: dict[tuple[str, ...], float] = dict.fromkeys(product(WANTED, RECOVERABLE), 0)
        for one in figures.failures:
            counts[one["wanted"], str(one["recoverable"]).lower()] = one["mentors"]
        yield self._family(
            "open_failures",
            "Mentors whose state was given up; those that no recovery tries again need a person.",
            ("wanted", "recoverable"),
            counts,
        )

    def _gates(self, figures: Figures) -> Iterator[Metric]:
        gates = {one["destination"]: one for one in figures.gates}
        states: dict[tuple[str, ...], float] = {}
        reasons: dict[tuple[str, ...], float] = {}
        until: dict[tuple[str, ...], float] = {}
        for name in self._destinations:
            gate = gates.get(name, {"state": "open", "reason": None, "closed_until": None})
            shut = gate["state"] != "open"
            for state in get_args(GateState):
                states[name, state] = float(gate["state"] == state)
            for reason in ALL_REASONS:
                reasons[name, reason] = float(shut and gate["reason"] == reason)
            if shut:
                until[(name,)] = float("inf" if (at := gate["closed_until"]) is None else at)
        yield self._family(
            "gate_state", "1 for the one it is in.", ("destination", "state"), states
        )
        yield self._family(
            "gate_reason",
            "1 for the one for which the gate is not open.",
            ("destination", "reason"),
            reasons,
        )
        yield self._family(
            "gate_closed_until_timestamp_seconds",
            "When the gate may be tried again; missing while it is open.",
            ("destination",),
            until,
        )

    def _family(
        self,
        name: str,
        says: str,
        labels: Sequence[str],
        samples: Mapping[tuple[str, ...], float],
    ) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"hlf_sync_{name}", says, labels=("organization_id", *labels))
        for values, number in samples.items():
            family.add_metric([self._organization, *values], number)
        return family
