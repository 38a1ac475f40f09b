"""
How many statements a worker needs: a measure of speed that no slow machine can blur.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import event

from outbox import Relay, driver, line
from tests.conftest import until
from worker import portal
from worker.settings import Settings
from worker.wakeup import Notifier

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterator, Mapping
    from uuid import UUID

    from sqlalchemy import TextClause
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from tests.factories import World

EVENTS = 400


class Instant:
    """
    A portal that takes any value at once.
    """

    takes_mentor_id = True

    async def set_visibility(
        self, row: UUID | str, *, visible: bool, seconds: float, correlation_id: UUID
    ) -> None:
        """
        Take it.
        """


@contextmanager
def counted(engine: AsyncEngine) -> Iterator[list[str]]:
    """
    The statements that are sent meanwhile, by SQLAlchemy or past it; not BEGIN and COMMIT.
    """
    statements: list[str] = []
    execute = driver.execute

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        statements.append(statement)

    def noting(
        connection: AsyncConnection, statement: TextClause, parameters: Mapping[str, object]
    ) -> Awaitable[object]:
        if statement not in {line.BEGIN, line.COMMIT}:
            statements.append(str(statement))
        return execute(connection, statement, parameters)

    event.listen(engine.sync_engine, "before_cursor_execute", note)
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(driver, "execute", noting)
            yield statements
    finally:
        event.remove(engine.sync_engine, "before_cursor_execute", note)


def relay_of(world: World, monkeypatch: pytest.MonkeyPatch, **variables: str) -> Relay:
    """
    The relay of a worker, with everything but Dynamics.
    """
    monkeypatch.setenv("HLF_ORGANIZATION_ID", str(world.hlf))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return Relay(world.engine, portal.destination(world.engine, Instant(), Settings.load()))


async def fill(world: World) -> None:
    """
    A backlog: so many mentors whose certification has expired.
    """
    await world.execute(
        """
        WITH mentor AS (
            INSERT INTO public.mentors (organization_id, full_name)
            SELECT :hlf, 'A mentor' FROM generate_series(1, :number)
            RETURNING id
        )
        INSERT INTO public.certifications (mentor_id, expires_on)
        SELECT id, date '2026-11-23' FROM mentor
        """,
        hlf=world.hlf,
        number=EVENTS,
    )
    async for _ in world.certifications.expire_all():
        pass


async def test_an_event_in_a_full_batch_costs_a_twentieth_of_a_statement(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Claim, links, settle and confirm: four for a hundred events, and one that finds no more.
    """
    await fill(world)
    relay = relay_of(world, monkeypatch, HLF_SYNC_CONCURRENCY="1", HLF_SYNC_BATCH="100")

    with counted(world.engine) as statements:
        drained = await relay.drain()

    assert drained.tally["delivered"] == EVENTS
    assert len(statements) <= 0.05 * EVENTS, statements


async def test_single_requests_are_claimed_and_settled_together(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Less than a statement for each event, with eight requests at once.
    """
    await fill(world)
    relay = relay_of(world, monkeypatch)

    with counted(world.engine) as statements:
        drained = await relay.drain()

    assert drained.tally["delivered"] == EVENTS
    assert len(statements) <= EVENTS, statements


async def test_a_look_that_finds_nothing_is_one_statement(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    An idle worker asks once for each poll, gate included.
    """
    relay = relay_of(world, monkeypatch)
    await relay.drain()

    with counted(world.engine) as statements:
        await relay.drain()

    assert len(statements) == 1, statements


async def test_whoever_commits_much_notifies_little(world: World) -> None:
    """
    The first transition is told at once, those that come meanwhile together afterwards.
    """
    notifier = Notifier(world.engine)

    with counted(world.engine) as statements:
        notifier()
        await until(lambda: statements)
        for _ in range(50):
            notifier()
        await notifier.aclose()

    assert len(statements) == 2, statements
