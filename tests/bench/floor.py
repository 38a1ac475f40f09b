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
from uuid import UUID, uuid4

import psycopg
from psycopg.rows import dict_row

from outbox import store
from outbox.driver import as_sent
from tests.bench.contenders.ours import Ours
from tests.bench.contenders.ours_worker import ORGANIZATION
from tests.bench.measure import Measure
from tests.bench.processes import cpu_seconds, python, running
from worker.certifications import confirmations
from worker.database import PREPARE_AFTER
from worker.portal import LINK

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tests.bench.contender import Contender
    from tests.bench.measure import Figure, Ground

SQL = Ours(name="bare:sql")

RATE = "events/s"
POSTGRESQL = "PostgreSQL's CPU s per 1,000 events"
CLIENT = "client's CPU s per 1,000 events"

BATCH = 100

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
            f"the SQL of batches of {BATCH}, {connections} connection{'s' * (connections > 1)}",
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


CLAIM, SETTLE, CONFIRM = map(
    as_sent, (store.claim_statement(LINK.sql), store.SETTLE, confirmations.CONFIRM)
)


class Lane:
    """
    One connection's part of the backlog.
    """

    def __init__(self, connection: psycopg.Connection[dict[str, Any]]) -> None:
        self._connection = connection
        self._worker_id = uuid4()
        self._after = store.START
        self._claimed: list[dict[str, Any]] = []

    def turn(self) -> int:
        """
        How many events came to their end in it.
        """
        with self._connection.transaction():
            ended = self._settle(self._claimed) if self._claimed else set()
            # Another lane's claim may just hold some that it looked at; they are next time's.
            busy = [event for event in self._claimed if event["claim_token"] not in ended]
            self._claimed = busy + self._claim()
        return len(ended)

    @property
    def is_done(self) -> bool:
        """
        Whether there was nothing more to claim, and all that was is settled.
        """
        return not self._claimed

    def _settle(self, events: Sequence[Mapping[str, Any]]) -> set[UUID]:
        document = json.dumps(list(map(_settled, events)), default=str)
        rows = self._connection.execute(SETTLE, {"attempts": document}).fetchall()
        ended = {row["token"] for row in rows}
        delivered = [_delivered(event) for event in events if event["claim_token"] in ended]
        self._connection.execute(CONFIRM, {"delivered": json.dumps(delivered)})
        return ended

    def _claim(self) -> list[dict[str, Any]]:
        parameters = {
            "destination": "dynamics",
            "organization_id": ORGANIZATION,
            "worker_id": self._worker_id,
            "limit": BATCH,
            "lease_seconds": 60,
            "slack_seconds": 1,
            "doubt_seconds": 150,
            **{f"after_{name}": value for name, value in self._after._asdict().items()},
        }
        rows = self._connection.execute(CLAIM, parameters).fetchall()
        claimed = [row for row in rows if row["id"] is not None]
        if claimed:
            self._after = max(
                store.Position(row["priority"], row["due_at"], row["id"]) for row in claimed
            )
        return claimed


def _settled(event: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": event["id"],
        "token": event["claim_token"],
        "version": event["version"],
        "payload": event["payload"],
        "created_at": event["created_at"],
        "attempts": event["attempts"],
        "outcome": "delivered",
        "after_seconds": 0.0,
        "code": None,
    }


def _delivered(event: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "mentor_id": event["key"],
        "organization_id": ORGANIZATION,
        "visible": event["payload"]["visible"],
        "version": event["version"],
    }


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
        list(lanes.map(partial(_run, counted), [url] * connections))
    assert not SQL.left(url)
    sys.stdout.write(json.dumps(counted.came_out()) + "\n")


def _run(counted: Counted, url: str) -> None:
    with psycopg.connect(
        url, autocommit=True, prepare_threshold=PREPARE_AFTER, row_factory=dict_row
    ) as connection:
        lane = Lane(connection)
        lane.turn()
        while not lane.is_done:
            counted.add(lane.turn())


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:]))
