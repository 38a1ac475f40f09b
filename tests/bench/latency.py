"""
From the business's COMMIT to the PATCH at the far side, with a worker that waits for work.
"""

from __future__ import annotations

import asyncio
import json
import time
from math import ceil
from typing import TYPE_CHECKING

from tests.bench.goals import Bound, Goal
from tests.bench.measure import Figure, Ground, Measure
from tests.bench.processes import ProcessFailedError, running

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tests.bench.contender import Contender

P50 = "ms, p50"
P99 = "ms, p99"

PER_SECOND = 20.0
CONCURRENCY = 10
WHAT = f"commit to arrival, {PER_SECOND:g} events/s"

WARM_SECONDS = 1.0
"""After the first arrival; what is committed before that does not count."""

START_SECONDS = 1.5
"""A worker's, added to the time of events."""

LAST_SECONDS = 5.0
"""For the last event to arrive."""

# Batches are of no use here, and whoever has them waits for nothing either.
TAKE_PART = (
    "ours",
    "bare:claim100",
    "bare:claim100:aiohttp",
    "bare:ours",
    "procrastinate",
    "pgqueuer",
    "pgqueuer:aiohttp",
    "faststream-outbox",
    "graphile-worker",
    "pg-boss",
)


async def latency(ground: Ground) -> list[Figure]:
    """
    One setting.
    """
    return await ground.in_turns(
        WHAT, ground.among(TAKE_PART), lambda contender: tick(ground, contender)
    )


async def tick(ground: Ground, contender: Contender) -> Mapping[str, float]:
    """
    One turn.
    """
    seconds = START_SECONDS + WARM_SECONDS + ground.scale.latency_seconds
    async with ground.databases.fresh(contender) as url:
        ground.far_side.reset(keep=True)
        environment = {"BENCH_DATABASE_URL": url, "BENCH_API_URL": ground.far_side.url}
        worker = contender.worker(concurrency=CONCURRENCY)
        ticker = contender.ticker(per_second=PER_SECOND, seconds=seconds)
        async with (
            running(worker, environment, quiet=True) as working,
            running(ticker, environment) as ticking,
        ):
            committed = json.loads(await ticking.everything())
            arrived = await _arrivals(ground, {key for _, key in committed})
            working.must_run()
    taken = sorted(milliseconds(committed, arrived))
    return {P50: percentile(taken, 0.50), P99: percentile(taken, 0.99)}


async def _arrivals(ground: Ground, keys: set[str]) -> list[tuple[int, str]]:
    """
    When each key came.

    Raises:
        ProcessFailedError: one did not.
    """
    ends_at = time.monotonic() + LAST_SECONDS
    while True:
        arrived = ground.far_side.arrivals()
        missing = keys - {key for _, key in arrived}
        if not missing:
            return arrived
        if time.monotonic() > ends_at:
            raise ProcessFailedError(f"{len(missing)} of {len(keys)} events did not arrive.")
        await asyncio.sleep(0.1)


def milliseconds(
    committed: Sequence[tuple[int, str]], arrived: Sequence[tuple[int, str]]
) -> list[float]:
    """
    From COMMIT to the first arrival, of each event that was committed to a warm worker.
    """
    first: dict[str, int] = {}
    for when, key in arrived:
        first.setdefault(key, when)
    warm = min(first.values()) + WARM_SECONDS * 1e9
    return [(first[key] - when) / 1e6 for when, key in committed if when >= warm]


def percentile(ordered: Sequence[float], share: float) -> float:
    """
    The smallest value that so large a share does not exceed.
    """
    return ordered[max(0, ceil(share * len(ordered)) - 1)]


def _goal(unit: str, value: float) -> Goal:
    bounds = [
        Bound(factor=1, called=f"{value:g}", value=value),
        Bound(factor=0.8, whom=("pgqueuer",), called="pgqueuer"),
    ]
    return Goal(what=WHAT, unit=unit, most=True, bounds=bounds)


MEASURES = (
    Measure(
        name="latency",
        question="How soon after the COMMIT does the portal hear of it?",
        run=latency,
        goals=(_goal(P50, 2.6), _goal(P99, 5)),
        turns=lambda ground: ground.scale.rounds * len(ground.among(TAKE_PART)),
    ),
)
