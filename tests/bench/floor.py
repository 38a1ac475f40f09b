"""
How fast batches could go at most: our SQL for a hundred events at a time, and nothing else.

A turn is one transaction, as a relay's is: what was claimed in the turn before is settled as
delivered and confirmed, then a hundred more are claimed, with their links. There is no relay,
no request, no SQLAlchemy. What `ours:batch100` is slower than this is Python's and HTTP's.

    python -m tests.bench.floor CONNECTIONS POSTMASTER
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from tests.bench.contenders.bare_ours import CLAIMED, Lane, connected
from tests.bench.contenders.ours import Ours
from tests.bench.measure import Measure
from tests.bench.processes import cpu_seconds, python, running

if TYPE_CHECKING:
    from collections.abc import Mapping

    import psycopg

    from tests.bench.contender import Contender
    from tests.bench.measure import Figure, Ground

SQL = Ours(name="bare:sql")

RATE = "events/s"
POSTGRESQL = "PostgreSQL's CPU s per 1,000 events"
CLIENT = "client's CPU s per 1,000 events"

CONNECTIONS = (1, 2)

WARM = 0.1
"""This part of the events is not counted, nor is as much at the end."""


async def floor(ground: Ground) -> list[Figure]:
    """
    One connection, and one for each of two workers.
    """
    return [
        figure
        for connections in CONNECTIONS
        for figure in await ground.in_turns(
            f"the SQL of batches of {CLAIMED}, {connections} connection{'s' * (connections > 1)}",
            [SQL],
            partial(run_through, ground, connections),
        )
    ]


async def run_through(
    ground: Ground, connections: int, contender: Contender
) -> Mapping[str, float]:
    """
    One turn: a backlog from end to end.
    """
    events = 5_000 if ground.scale.quick else 20_000
    command = python("tests.bench.floor", connections, ground.databases.server.pid)
    async with ground.databases.fresh(contender) as url:
        await asyncio.to_thread(contender.fill, url, [str(uuid4()) for _ in range(events)])
        async with running(command, {"BENCH_DATABASE_URL": url}) as client:
            came_out: dict[str, float] = json.loads(await client.everything())
    return came_out


MEASURES = (
    Measure(
        name="floor",
        question="How fast could batches go if nothing but the database cost anything?",
        run=floor,
        turns=lambda ground: len(CONNECTIONS) * ground.scale.rounds,
    ),
)


# ---------------------------------------------------------------------------- the client


class Turns:
    """
    One lane's part of the backlog, a hundred events in a transaction.
    """

    def __init__(self, connection: psycopg.Connection[dict[str, Any]]) -> None:
        self._connection = connection
        self._lane = Lane(connection)
        self._claimed: list[dict[str, Any]] = []

    def turn(self) -> int:
        """
        How many events came to their end in it.
        """
        with self._connection.transaction():
            ended = self._lane.settle(self._claimed) if self._claimed else set()
            # Another lane's claim may just hold some that it looked at; they are next time's.
            busy = [event for event in self._claimed if event["claim_token"] not in ended]
            self._claimed = busy + self._lane.claim(onward=True)
        return len(ended)

    @property
    def is_done(self) -> bool:
        """
        Whether there was nothing more to claim, and all that was is settled.
        """
        return not self._claimed


class Counted:
    """
    What was done and used between the first events and the last ones.
    """

    def __init__(self, events: int, postmaster: int) -> None:
        self._from, self._to = round(WARM * events), round((1 - WARM) * events)
        self._postmaster = postmaster
        self._done = 0
        self._lock = threading.Lock()
        self._moments: list[tuple[int, float, float, float]] = []

    def add(self, events: int) -> None:
        """
        So many are done.
        """
        with self._lock:
            self._done += events
            edge = (self._from, self._to, sys.maxsize)[len(self._moments)]
            if self._done >= edge:
                used = cpu_seconds(self._postmaster), time.process_time()
                self._moments.append((self._done, time.monotonic(), *used))

    def came_out(self) -> dict[str, float]:
        """
        By unit.
        """
        first, last = self._moments
        events, seconds, postgresql, client = (b - a for a, b in zip(first, last, strict=True))
        return {
            RATE: events / seconds,
            POSTGRESQL: postgresql / events * 1000,
            CLIENT: client / events * 1000,
        }


def _main(connections: int, postmaster: int) -> None:
    url = os.environ["BENCH_DATABASE_URL"]
    counted = Counted(SQL.left(url), postmaster)
    with ThreadPoolExecutor(connections) as lanes:
        list(lanes.map(partial(_run, counted), range(connections)))
    assert not SQL.left(url)
    sys.stdout.write(json.dumps(counted.came_out()) + "\n")


def _run(counted: Counted, _: int) -> None:
    with connected() as connection:
        turns = Turns(connection)
        turns.turn()
        while not turns.is_done:
            counted.add(turns.turn())


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:]))
