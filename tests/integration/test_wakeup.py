"""
The wake-up: heard at once, survives its connection, and is never worth an error.
"""

from __future__ import annotations

import asyncio
import gc
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg import sql
from structlog.testing import capture_logs

from tests.conftest import until
from tests.factories import NEXT_YEAR
from worker import database, wakeup
from worker.certifications import visibility
from worker.wakeup import (
    CHANNEL,
    LONGEST_QUIET_SECONDS,
    MANY,
    QUIET_SECONDS,
    listen,
    notify,
    quiet_after,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.ext.asyncio import AsyncEngine

    from tests.factories import World

NOWHERE = "postgresql://127.0.0.1:9/x"


class Ear:
    """
    A listener, and what it did.

    Attributes:
        wakes: how often it woke its worker.
        connections: every connection it was given.
        refusals: raised instead of connecting, one after the other.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.wakes = 0
        self.connections: list[psycopg.AsyncConnection[Any]] = []
        self.refusals: list[Exception] = []

    async def connect(self) -> psycopg.AsyncConnection[Any]:
        """
        A direct connection.
        """
        if self.refusals:
            raise self.refusals.pop()
        connection = await psycopg.AsyncConnection.connect(self.url, autocommit=True)
        self.connections.append(connection)
        return connection

    def wake(self) -> None:
        """
        What a worker would do now is look.
        """
        self.wakes += 1

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[asyncio.Task[None]]:
        """
        Listen meanwhile; the first wake is over when this begins.
        """
        task = asyncio.create_task(listen(self.connect, self.wake))
        try:
            await until(lambda: self.wakes)
            yield task
        finally:
            task.cancel()
            await asyncio.wait({task})


@pytest.fixture
def ear(database_url: str) -> Ear:
    """
    A listener on the tests' database.
    """
    return Ear(database_url)


async def test_a_notification_wakes_at_once(engine: AsyncEngine, ear: Ear) -> None:
    """
    Each one, long before any poll or sign of life.
    """
    async with ear.listening():
        await notify(engine)
        await until(lambda: ear.wakes == 2, seconds=5)
        await notify(engine)
        await until(lambda: ear.wakes == 3, seconds=5)


def test_a_process_that_commits_without_end_notifies_less_and_less() -> None:
    """
    Down to one in so long a time as nobody notices.
    """
    quiet = [QUIET_SECONDS]
    for _ in range(5):
        quiet.append(quiet_after(MANY, before=quiet[-1]))

    assert quiet[1] == 2 * QUIET_SECONDS
    assert quiet == sorted(quiet)
    assert quiet[-1] == LONGEST_QUIET_SECONDS


def test_a_steady_few_are_told_at_once_whatever_came_before() -> None:
    """
    A process that stood still for a moment commits two at once, and goes on as before.
    """
    assert quiet_after(2, before=LONGEST_QUIET_SECONDS) == QUIET_SECONDS


async def test_a_transition_wakes_the_worker_after_its_commit(world: World, ear: Ear) -> None:
    """
    Whoever is woken can already see the event.
    """
    mentor = await world.mentor()
    async with ear.listening():
        await world.certifications.expire(mentor.certification_id)
        await until(lambda: ear.wakes == 2, seconds=5)
    assert await world.value("SELECT count(*) FROM outbox.events") == 1


async def test_a_transition_that_is_rolled_back_wakes_nobody(
    world: World, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    What is heard after it is the next notification, and nothing before.
    """
    mentor = await world.mentor()

    async def fail(*_: object, **__: object) -> int:
        raise LookupError

    monkeypatch.setattr(visibility, "announce", fail)
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        await connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(CHANNEL)))
        with pytest.raises(LookupError):
            await world.certifications.renew(mentor.certification_id, NEXT_YEAR)
        await world.execute("SELECT pg_notify(:channel, 'marker')", channel=CHANNEL)
        heard = [one.payload async for one in connection.notifies(timeout=10, stop_after=1)]

    assert heard == ["marker"]
    assert await world.rows("SELECT 1 FROM outbox.events") == []


async def test_a_connection_that_is_cut_is_replaced_and_wakes(
    engine: AsyncEngine, world: World, ear: Ear
) -> None:
    """
    Something may have come meanwhile, so the new connection begins with a look.
    """
    async with ear.listening():
        with capture_logs() as logs:
            await world.execute(
                "SELECT pg_terminate_backend(:pid)", pid=ear.connections[0].info.backend_pid
            )
            await until(lambda: ear.wakes == 2)
        assert [entry["event"] for entry in logs] == ["wakeup.connection_lost"]
        await notify(engine)
        await until(lambda: ear.wakes == 3, seconds=5)
    assert len(ear.connections) == 2
    assert all(connection.closed for connection in ear.connections)


async def test_a_database_that_is_away_is_asked_again(ear: Ear) -> None:
    """
    Whatever way the connection fails.
    """
    ear.refusals = [TimeoutError(), OSError(), psycopg.OperationalError("no")]
    async with ear.listening():
        assert not ear.refusals
    assert (ear.wakes, len(ear.connections)) == (1, 1)


async def test_a_silent_connection_is_asked_for_signs_of_life(
    engine: AsyncEngine, ear: Ear, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Again and again without leaving a prepared statement behind, and it goes on hearing.
    """
    monkeypatch.setattr(wakeup, "SIGN_OF_LIFE_SECONDS", 0.02)
    asked: list[object] = []

    async def connect() -> psycopg.AsyncConnection[Any]:
        connection = await Ear.connect(ear)
        execute = connection.execute

        async def spied(query: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (passed on)
            asked.append(query)
            return await execute(query, *args, **kwargs)

        monkeypatch.setattr(connection, "execute", spied)
        return connection

    monkeypatch.setattr(ear, "connect", connect)
    async with ear.listening():
        # More often than psycopg repeats a statement before it prepares it.
        await until(lambda: asked.count("SELECT 1") > 8)
        wakes = ear.wakes
        await notify(engine)
        await until(lambda: ear.wakes > wakes, seconds=5)
    [connection] = ear.connections
    assert not connection._prepared._names


async def test_a_dead_peer_is_noticed(ear: Ear, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A connection that answers no sign of life is given up and replaced.
    """
    monkeypatch.setattr(wakeup, "SIGN_OF_LIFE_SECONDS", 0.05)
    first: list[psycopg.AsyncConnection[Any]] = []

    async def connect() -> psycopg.AsyncConnection[Any]:
        connection = await Ear.connect(ear)
        if not first:
            first.append(connection)
            execute = connection.execute

            async def deaf(query: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (passed on)
                if query == "SELECT 1":
                    await asyncio.Event().wait()
                return await execute(query, *args, **kwargs)

            monkeypatch.setattr(connection, "execute", deaf)
        return connection

    monkeypatch.setattr(ear, "connect", connect)
    async with ear.listening():
        await until(lambda: ear.wakes >= 2)
    assert first[0].closed


@pytest.mark.parametrize("when", ["hearing", "connecting", "pausing"])
async def test_a_cancelled_listener_leaves_nothing_behind(
    world: World, ear: Ear, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """
    Wherever it is: no open connection, no warning, and the cancellation gets through.
    """
    arrived = asyncio.Event()

    async def hang(*_: object) -> psycopg.AsyncConnection[Any]:
        arrived.set()
        await asyncio.Event().wait()
        raise AssertionError

    if when == "connecting":
        monkeypatch.setattr(ear, "connect", hang)
    if when == "pausing":
        ear.refusals = [OSError()]
        monkeypatch.setattr(asyncio, "sleep", hang)
    task = asyncio.create_task(listen(ear.connect, ear.wake))
    await (until(lambda: ear.wakes) if when == "hearing" else arrived.wait())
    monkeypatch.undo()

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gc.collect()  # a connection that was left open would warn here, and warnings are errors

    pids = [connection.info.backend_pid for connection in ear.connections if not connection.closed]
    assert pids == []

    async def gone() -> bool:
        return not await world.value(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND query LIKE 'LISTEN%'"
        )

    await until(gone)


async def test_a_notification_that_cannot_be_sent_is_no_error() -> None:
    """
    The workers poll: an unreachable database is worth one line in the log.
    """
    engine = database.connect(NOWHERE, application_name="test")
    with capture_logs() as logs:
        await notify(engine)
    await engine.dispose()
    assert [entry["event"] for entry in logs] == ["wakeup.notify_failed"]


async def test_a_notification_does_not_wait_for_a_database_that_says_nothing() -> None:
    """
    A host that takes the connection and stays silent costs two seconds, not a request.
    """
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://127.0.0.1:{silent.getsockname()[1]}/x"
        engine = database.connect(url, application_name="test")
        with capture_logs() as logs:
            async with asyncio.timeout(4):
                await notify(engine)
        await engine.dispose()
    assert [entry["event"] for entry in logs] == ["wakeup.notify_failed"]
