"""
What enqueueing costs the business: transactions per second with an event ÷ without.

Both are measured by one process in alternating slices, so that a noisy moment hits both.
"""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING

from tests.bench.contenders import PEERS
from tests.bench.goals import Bound, Goal
from tests.bench.measure import Figure, Ground, Measure
from tests.bench.processes import running

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.bench.contender import Contender

RATIO = "with ÷ without"
ADDED = "ms added"
RATE = "transactions/s without"

SLICES = 12
"""Half of them with an event."""

# Variants of a peer that differ in their worker alone enqueue alike.
TAKE_PART = (
    "ours",
    "bare:claim100",
    "procrastinate",
    "pgqueuer",
    "faststream-outbox",
    "graphile-worker",
    "pg-boss",
)


def setting(clients: int) -> str:
    """
    For people.
    """
    return f"business transaction, {clients} client{'s' * (clients > 1)}"


async def enqueue(ground: Ground) -> list[Figure]:
    """
    Each number of clients.
    """
    return [
        figure
        for clients in ground.scale.clients
        for figure in await ground.in_turns(
            setting(clients),
            ground.among(TAKE_PART),
            partial(produce, ground, clients),
        )
    ]


async def produce(ground: Ground, clients: int, contender: Contender) -> Mapping[str, float]:
    """
    One turn.
    """
    seconds = ground.scale.enqueue_seconds
    command = contender.producer(clients=clients, seconds=seconds, slice_seconds=seconds / SLICES)
    async with ground.databases.fresh(contender) as url:
        environment = {"BENCH_DATABASE_URL": url, "BENCH_API_URL": ground.far_side.url}
        async with running(command, environment) as producer:
            came_out = json.loads(await producer.everything())
    return {
        RATIO: came_out["with"] / came_out["without"],
        ADDED: came_out["milliseconds_with"] - came_out["milliseconds_without"],
        RATE: came_out["without"],
    }


def _goals() -> Iterator[Goal]:
    for clients in (1, 4, 16):
        what = setting(clients)
        yield Goal(what=what, unit=RATIO, bounds=[Bound(factor=0.75, called="1")])
        yield Goal(what=what, unit=RATIO, bounds=[Bound(factor=1, whom=PEERS, called="best peer")])


MEASURES = (
    Measure(
        name="enqueue",
        question="What does an event cost the business transaction that it is part of?",
        run=enqueue,
        goals=tuple(_goals()),
        turns=lambda ground: (
            len(ground.scale.clients) * ground.scale.rounds * len(ground.among(TAKE_PART))
        ),
    ),
)
