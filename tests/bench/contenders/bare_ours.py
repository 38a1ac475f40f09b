"""
What our promises cost at least: our tables and our SQL, in the smallest worker there can be.

It claims with a lease, looks at gate, doubts and links, settles with history and confirmation, by
psycopg alone. Nothing is retried or noticed. What ours is slower than this when events are few is
SQLAlchemy's, the relay's, the notifier's and the client's; what this is slower than
`bare:claim100:aiohttp` is the promises'. For a backlog see `tests.bench.floor`.

    python -m tests.bench.contenders.bare_ours work … | tick …
"""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import click
import psycopg
from psycopg.rows import dict_row
from typing_extensions import override

from outbox import store
from outbox.driver import as_sent
from tests.bench.contenders import business
from tests.bench.contenders.bare import senders, until_terminated
from tests.bench.contenders.ours import FILL, Ours
from tests.bench.contenders.ours_worker import ORGANIZATION
from tests.bench.processes import python
from worker.certifications import confirmations
from worker.database import PREPARE_AFTER
from worker.portal import LINK
from worker.wakeup import CHANNEL, LISTEN

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MODULE = "tests.bench.contenders.bare_ours"

CLAIM, SETTLE, CONFIRM, ENQUEUE = map(
    as_sent,
    (store.claim_statement(LINK.sql), store.SETTLE, confirmations.CONFIRM, store.ENQUEUE_NEW),
)

CLAIMED = 100


@dataclass(slots=True, kw_only=True)
class BareOurs(Ours):
    """
    Ours, without all but its SQL.
    """

    @override
    def worker(self, *, concurrency: int) -> list[str]:
        return python(MODULE, "work", concurrency)

    @override
    def ticker(self, *, per_second: float, seconds: float) -> list[str]:
        return python(MODULE, "tick", per_second, seconds)


CONTENDERS = (BareOurs(name="bare:ours"),)


class Lane:
    """
    One connection, and how far it is in the backlog.
    """

    def __init__(self, connection: psycopg.Connection[dict[str, Any]]) -> None:
        self._connection = connection
        self._worker_id = uuid4()
        self._after = store.START

    def claim(self, *, onward: bool = False) -> list[dict[str, Any]]:
        """
        A hundred events at most, with their links.

        Args:
            onward: of those after the last one.
        """
        parameters = {
            "destination": "dynamics",
            "organization_id": ORGANIZATION,
            "worker_id": self._worker_id,
            "limit": CLAIMED,
            "lease_seconds": 60,
            "slack_seconds": 1,
            "doubt_seconds": 150,
            **{f"after_{name}": value for name, value in self._after._asdict().items()},
        }
        rows = self._connection.execute(CLAIM, parameters).fetchall()
        claimed = [row for row in rows if row["id"] is not None]
        if claimed and onward:
            self._after = max(
                store.Position(row["priority"], row["due_at"], row["id"]) for row in claimed
            )
        return claimed

    def settle(self, events: Sequence[Mapping[str, Any]]) -> set[UUID]:
        """
        As delivered and confirmed; returns the tokens of those for which that was written.
        """
        document = json.dumps(list(map(_settled, events)), default=str)
        rows = self._connection.execute(SETTLE, {"attempts": document}).fetchall()
        ended = {row["token"] for row in rows}
        delivered = [_delivered(event) for event in events if event["claim_token"] in ended]
        self._connection.execute(CONFIRM, {"delivered": json.dumps(delivered)})
        return ended


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


def connected() -> psycopg.Connection[dict[str, Any]]:
    """
    A connection for a lane, set up like a relay's.
    """
    connection = psycopg.connect(
        os.environ["BENCH_DATABASE_URL"],
        autocommit=True,
        prepare_threshold=PREPARE_AFTER,
        row_factory=dict_row,
    )
    connection.execute("SET enable_seqscan = off")
    return connection


@click.group()
def cli() -> None:
    """
    Be one of its processes.
    """


@cli.command()
@click.argument("concurrency", type=int)
def work(concurrency: int) -> None:
    """
    Claim, send, settle; sleep until somebody notifies.
    """
    asyncio.run(until_terminated(_work(concurrency)))


async def _work(concurrency: int) -> None:
    awake = asyncio.Event()
    with connected() as connection:
        lane = Lane(connection)
        async with (
            await _connect() as listening,
            senders(concurrency, "aiohttp") as every,
            asyncio.TaskGroup() as group,
        ):
            group.create_task(_listen(listening, awake))
            while True:
                # It waits for the server with all else, as nothing else is to be done.
                while events := lane.claim():
                    for begin in range(0, len(events), concurrency):
                        some = zip(every, events[begin : begin + concurrency], strict=False)
                        await asyncio.gather(*(send(event["key"]) for send, event in some))
                    with connection.transaction():
                        lane.settle(events)
                with suppress(TimeoutError):
                    async with asyncio.timeout(1):
                        await awake.wait()
                awake.clear()


async def _listen(connection: psycopg.AsyncConnection, awake: asyncio.Event) -> None:
    await connection.execute(LISTEN)
    async for _ in connection.notifies():
        awake.set()


@cli.command()
@click.argument("per_second", type=float)
@click.argument("seconds", type=float)
def tick(per_second: float, seconds: float) -> None:
    """
    Commit events at a steady pace, and notify from another connection.
    """
    asyncio.run(_tick(per_second, seconds))


async def _tick(per_second: float, seconds: float) -> None:
    keys = [str(uuid4()) for _ in range(round(per_second * seconds))]
    async with await _connect() as connection, await _connect() as notifying:
        for statement in FILL:
            await connection.execute(statement, {"organization": ORGANIZATION, "keys": keys})

        async def transact(row: int, key: str | None) -> None:
            async with connection.transaction():
                await connection.execute(business.CERTIFICATION, [row])
                await connection.execute(business.MENTOR, [row])
                if key:
                    await connection.execute(ENQUEUE, _new(key))

        async def wake() -> None:
            await notifying.execute("SELECT pg_notify(%s, '')", [CHANNEL])

        await business.tick(keys, transact=transact, wake=wake, per_second=per_second)


def _new(key: str) -> dict[str, object]:
    return {
        "destination": "dynamics",
        "key": key,
        "organization_id": ORGANIZATION,
        "version": 1,
        "payload": '{"visible": false, "certification_id": null}',
        "priority": 0,
        "traceparent": None,
    }


async def _connect() -> psycopg.AsyncConnection:
    return await psycopg.AsyncConnection.connect(os.environ["BENCH_DATABASE_URL"], autocommit=True)


if __name__ == "__main__":
    cli()
