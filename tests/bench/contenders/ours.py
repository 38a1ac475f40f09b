"""
Ours: `hlf-sync worker` as its users run it, and `outbox.enqueue` in a transaction of theirs.

    python -m tests.bench.contenders.ours produce … | tick …
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import click
import psycopg
from sqlalchemy import text

from outbox import NewEvent, enqueue
from tests.bench.contenders import business
from tests.bench.contenders.ours_worker import ORGANIZATION
from tests.bench.processes import ROOT, ProcessFailedError, python
from worker import database
from worker.wakeup import Notifier

if TYPE_CHECKING:
    from collections.abc import Sequence

MODULE = "tests.bench.contenders.ours"

BATCHES_AT_ONCE = 4
"""Measured, with 100 values in each: 2 are a fifth slower, 8 no faster."""

FILL = (
    "INSERT INTO public.organizations (id, name) VALUES (%(organization)s, 'HLF')"
    " ON CONFLICT DO NOTHING",
    "INSERT INTO public.mentors (id, organization_id, full_name, dynamics_id)"
    " SELECT key, %(organization)s, 'A mentor', key"
    "   FROM unnest(%(keys)s::uuid[]) AS key",
    "INSERT INTO public.certifications (mentor_id, expires_on, status, expired_at)"
    " SELECT key, current_date - 1, 'expired', now() FROM unnest(%(keys)s::uuid[]) AS key",
    "INSERT INTO public.portal_visibility (mentor_id, organization_id, visible)"
    " SELECT key, %(organization)s, false FROM unnest(%(keys)s::uuid[]) AS key",
)
"""Mentors whose certification has run out; each is its own row in Dynamics."""

EVENTS = """
INSERT INTO outbox.events (destination, key, organization_id, version, payload, priority)
SELECT 'dynamics', key, %(organization)s, 1,
       '{"visible": false, "certification_id": null}', 0
  FROM unnest(%(keys)s::text[]) AS key
"""

TABLES = (
    "public.mentors, public.certifications, public.portal_visibility,"
    " public.portal_confirmations, public.dynamics_sync_failures, outbox.events, outbox.settled"
)


@dataclass(slots=True, kw_only=True)
class Ours:
    """
    This project.

    Args:
        batch: values in one request at most.
    """

    name: str
    batch: int = 1

    def missing(self) -> str | None:
        """
        Never: it is here.
        """
        return None

    def prepare(self, database_url: str) -> None:
        """
        Its own migrations.
        """
        done = subprocess.run(
            python("alembic", "upgrade", "head"),
            cwd=ROOT,
            env=os.environ | {"DATABASE_URL": database_url},
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise ProcessFailedError(f"The migrations failed: {done.stderr.strip()[-300:]}")

    def fill(self, database_url: str, keys: Sequence[str]) -> None:
        """
        What transitions of so many mentors would have left.
        """
        with psycopg.connect(database_url) as connection:
            parameters = {"organization": ORGANIZATION, "keys": list(keys)}
            for statement in (*FILL, EVENTS):
                connection.execute(statement, parameters)
            connection.execute(f"ANALYZE {TABLES}")

    def left(self, database_url: str) -> int:
        """
        The live events.
        """
        with psycopg.connect(database_url) as connection:
            [count] = connection.execute("SELECT count(*) FROM outbox.events").fetchone() or [0]
        return int(count)

    def worker(self, *, concurrency: int) -> list[str]:
        """
        `hlf-sync worker`.
        """
        if self.batch > 1:
            concurrency = min(concurrency, BATCHES_AT_ONCE)
        return python("tests.bench.contenders.ours_worker", concurrency, self.batch)

    def producer(self, *, clients: int, seconds: float, slice_seconds: float) -> list[str]:
        """
        `outbox.enqueue` by the engine that the application has.
        """
        return python(MODULE, "produce", clients, seconds, slice_seconds)

    def ticker(self, *, per_second: float, seconds: float) -> list[str]:
        """
        The same, and the wake-up after each commit.
        """
        return python(MODULE, "tick", per_second, seconds)


CONTENDERS = (Ours(name="ours"), Ours(name="ours:batch100", batch=100))


class Application:
    """
    Somebody's application, with the outbox in its transactions.
    """

    def __init__(self, *, connections: int) -> None:
        self._engine = database.connect(_url(), application_name="bench", pool_size=connections)
        self._notifier = Notifier(self._engine)

    async def transact(self, row: int, key: str | None) -> None:
        """
        The business transaction, with an event if there is a key.
        """
        async with self._engine.begin() as connection:
            await connection.execute(CERTIFICATION, {"n": row})
            await connection.execute(MENTOR, {"n": row})
            if key:
                await enqueue(connection, [_event(key)])

    async def wake(self) -> None:
        """
        After the commit.
        """
        self._notifier()

    async def aclose(self) -> None:
        """
        Wake for the last time, and disconnect.
        """
        await self._notifier.aclose()
        await self._engine.dispose()


CERTIFICATION = text(business.CERTIFICATION % ":n")
MENTOR = text(business.MENTOR % ":n")


def _event(key: str) -> NewEvent:
    return NewEvent(
        destination="dynamics",
        key=key,
        organization_id=UUID(ORGANIZATION),
        version=1,
        payload={"visible": False, "certification_id": None},
    )


@click.group()
def cli() -> None:
    """
    Be one of its processes.
    """


@cli.command()
@click.argument("clients", type=int)
@click.argument("seconds", type=float)
@click.argument("slice_seconds", type=float)
def produce(clients: int, seconds: float, slice_seconds: float) -> None:
    """
    Measure what enqueueing costs.
    """
    asyncio.run(_produce(clients, seconds, slice_seconds))


async def _produce(clients: int, seconds: float, slice_seconds: float) -> None:
    async with aclosing(Application(connections=clients)) as application:

        async def transact(row: int, key: str | None) -> None:
            await application.transact(row, key)
            if key:
                await application.wake()

        await business.produce([transact] * clients, seconds=seconds, slice_seconds=slice_seconds)


@cli.command()
@click.argument("per_second", type=float)
@click.argument("seconds", type=float)
def tick(per_second: float, seconds: float) -> None:
    """
    Commit events at a steady pace.
    """
    asyncio.run(_tick(per_second, seconds))


async def _tick(per_second: float, seconds: float) -> None:
    keys = [str(uuid4()) for _ in range(round(per_second * seconds))]
    async with await psycopg.AsyncConnection.connect(_url()) as connection:
        for statement in FILL:
            await connection.execute(statement, {"organization": ORGANIZATION, "keys": keys})
    async with aclosing(Application(connections=2)) as application:
        await business.tick(
            keys, transact=application.transact, wake=application.wake, per_second=per_second
        )


def _url() -> str:
    return os.environ["BENCH_DATABASE_URL"]


if __name__ == "__main__":
    cli()
