"""
The database keeps organisations apart, whatever our own statements say.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, ProgrammingError

from outbox.gate import close_by_hand, look
from tests.factories import NEXT_YEAR, TODAY
from worker import database
from worker.certifications.transitions import CertificationManagementService
from worker.certifications.visibility import DESTINATION
from worker.coordinator import alerts, callers, retry
from worker.coordinator.callers import Caller
from worker.errors import NotAllowedError, UnknownCertificationError, UnknownFailureError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from tests.factories import Mentor, World

HLF_TABLES = (
    "public.organizations",
    "public.mentors",
    "public.certifications",
    "public.mentor_pauses",
    "public.portal_visibility",
    "public.portal_confirmations",
    "public.dynamics_sync_failures",
    "outbox.events",
    "outbox.settled",
    "outbox.gates",
    "outbox.audit",
)


def coordinator(organization_id: UUID) -> Caller:
    """
    Somebody who may act for an organisation.
    """
    return Caller(
        subject="somebody", name="Somebody", organization_id=organization_id, role="coordinator"
    )


@pytest.fixture
def looking(engine: AsyncEngine) -> AsyncEngine:
    """
    What pages and API read with.
    """
    return callers.bound(engine)


@pytest.fixture
def acting(engine: AsyncEngine) -> AsyncEngine:
    """
    What actions write with.
    """
    return callers.bound(engine, writing=True)


async def in_trouble(world: World) -> tuple[Mentor, UUID]:
    """
    A mentor of HLF's with a row in every table, whose expiry did not get through.
    """
    mentor = await world.mentor()
    await world.certifications.expire(mentor.certification_id, today=TODAY)
    failure_id = uuid4()
    await world.execute(
        "INSERT INTO public.dynamics_sync_failures (id, organization_id, mentor_id, visible,"
        " version, error_code, error_message, retry_count, recoverable)"
        " VALUES (:id, :hlf, :mentor, false, 1, 'record_not_found', 'No row.', 0, false)",
        id=failure_id,
        hlf=world.hlf,
        mentor=mentor.id,
    )
    await world.execute(
        "INSERT INTO public.portal_confirmations (mentor_id, organization_id, visible, version)"
        " VALUES (:mentor, :hlf, true, 1)",
        hlf=world.hlf,
        mentor=mentor.id,
    )
    await world.execute(
        "INSERT INTO outbox.settled (event_id, destination, key, organization_id, version,"
        " payload, outcome, attempts, created_at)"
        " VALUES (1, 'dynamics', :mentor, :hlf, 1, '{}', 'dead', 1, now())",
        hlf=world.hlf,
        mentor=str(mentor.id),
    )
    await world.execute(
        "INSERT INTO outbox.audit (organization_id, subject, name, action, outcome)"
        " VALUES (:hlf, 'one', 'One', 'retry', 'started')",
        hlf=world.hlf,
    )
    async with world.engine.begin() as connection:
        await close_by_hand(
            connection,
            destination=DESTINATION,
            organization_id=world.hlf,
            message="Paused.",
            closed_by="one",
        )
    return mentor, failure_id


async def everything(world: World) -> dict[str, list[str]]:
    """
    Every row that is HLF's, as text.
    """
    return {
        table: [
            row[0]
            for row in await world.rows(f"SELECT CAST(t AS text) FROM {table} AS t ORDER BY 1")  # noqa: S608
        ]
        for table in HLF_TABLES
    }


@pytest.mark.parametrize("table", HLF_TABLES)
async def test_the_rows_of_another_organisation_are_not_there(
    world: World, looking: AsyncEngine, table: str
) -> None:
    """
    Without any condition of ours.
    """
    await in_trouble(world)
    count = text(f"SELECT count(*) FROM {table}")  # noqa: S608

    with callers.asking(coordinator(world.hlf)):
        async with database.reading(looking) as connection:
            assert await connection.scalar(count) == 1
    with callers.asking(coordinator(uuid4())):
        async with database.reading(looking) as connection:
            assert await connection.scalar(count) == 0


async def test_asking_with_another_organisations_ids_shows_and_changes_nothing(
    world: World, looking: AsyncEngine, acting: AsyncEngine
) -> None:
    """
    Also with its own id as parameter, as if each of our own conditions were gone.
    """
    mentor, failure_id = await in_trouble(world)
    before = await everything(world)
    as_hlf = CertificationManagementService(
        acting, organization_id=world.hlf, timezone="Europe/Oslo"
    )

    with callers.asking(coordinator(world.other)):
        async with database.reading(looking) as connection:
            now = await alerts.status(connection, organization_id=world.hlf)
            assert (now.waiting, now.failed, now.in_order) == (0, 0, 0)
            assert now.gate.state == "open"
            assert await alerts.failures(connection, organization_id=world.hlf) == []
            assert await alerts.open_failures(connection, organization_id=world.hlf) == 0
            gate = await look(connection, destination=DESTINATION, organization_id=world.hlf)
            assert gate.state == "open"
        with pytest.raises(UnknownFailureError):
            await retry.retry(acting, [failure_id], organization_id=world.hlf, actor="B")
        done = await retry.retry_all(acting, organization_id=world.hlf, actor="B")
        assert done == retry.Retried(started=0, under_way=0, resolved=0, gone=0)
        assert [page async for page in retry.resync(acting, organization_id=world.hlf)] == []
        with pytest.raises(UnknownCertificationError):
            await as_hlf.renew(mentor.certification_id, NEXT_YEAR, today=TODAY)
        await as_hlf.aclose()

    assert await everything(world) == before


async def test_a_coordinator_renews_and_retries_as_before(
    world: World, acting: AsyncEngine
) -> None:
    """
    What is their own is all there.
    """
    mentor, failure_id = await in_trouble(world)
    await world.execute("DELETE FROM outbox.events")
    service = CertificationManagementService(
        acting, organization_id=world.hlf, timezone="Europe/Oslo"
    )

    with callers.asking(coordinator(world.hlf)):
        done = await retry.retry(acting, [failure_id], organization_id=world.hlf, actor="A")
        assert done.started == 1
        renewed = await service.renew(mentor.certification_id, NEXT_YEAR, today=TODAY)
        await service.aclose()

    assert renewed.visible
    assert renewed.version == 3
    assert await world.value("SELECT resumed_at IS NOT NULL FROM public.mentor_pauses")
    assert await world.value("SELECT version FROM outbox.events") == 3


WRITES = [
    "UPDATE public.certifications SET status = 'valid', expired_at = NULL",
    "UPDATE public.mentor_pauses SET resumed_at = clock_timestamp()",
    "UPDATE public.portal_visibility SET version = version + 1",
    "UPDATE public.dynamics_sync_failures SET resolved_at = now(), resolution = 'manual'",
    "UPDATE outbox.events SET version = version + 1",
]
"""What actions may write; RETURNING is added."""


@pytest.mark.parametrize("write", WRITES)
async def test_a_viewer_changes_nothing(world: World, acting: AsyncEngine, write: str) -> None:
    """
    Not even in a transaction of ours.
    """
    await in_trouble(world)
    with callers.asking(replace(coordinator(world.hlf), role="viewer")):
        async with database.transaction(acting) as connection:
            assert (await connection.execute(text(write))).rowcount == 0
    with callers.asking(coordinator(world.other)):
        async with database.transaction(acting) as connection:
            assert (await connection.execute(text(write))).rowcount == 0
    with callers.asking(coordinator(world.hlf)):
        async with database.transaction(acting) as connection:
            assert (await connection.execute(text(write))).rowcount == 1


@pytest.mark.parametrize("write", WRITES)
async def test_the_api_of_the_database_reads_and_does_not_write(world: World, write: str) -> None:
    """
    A request through it is the same role with the same claims, without the mark.
    """
    await in_trouble(world)
    async with world.engine.begin() as connection:
        await connection.execute(
            text(
                "SELECT set_config('role', 'authenticated', true),"
                " set_config('request.jwt.claims', :claims, true)"
            ),
            {"claims": coordinator(world.hlf).claims()},
        )
        assert await connection.scalar(text("SELECT count(*) FROM public.mentors")) == 1
        assert (await connection.execute(text(write))).rowcount == 0


@pytest.mark.parametrize(
    "claims",
    [
        "",
        "{}",
        '{"sub": "x", "app_metadata": null}',
        '{"sub": "x", "app_metadata": {"organization_id": "ID"}}',
        '{"sub": "x", "app_metadata": {"organization_id": "ID", "hlf_role": "member"}}',
        '{"sub": "x", "user_metadata": {"organization_id": "ID", "hlf_role": "viewer"}}',
    ],
)
async def test_claims_without_a_role_of_ours_see_nothing(world: World, claims: str) -> None:
    """
    An app's users have claims too, and are no coordinators.
    """
    await in_trouble(world)
    async with world.engine.begin() as connection:
        await connection.execute(
            text(
                "SELECT set_config('role', 'authenticated', true),"
                " set_config('request.jwt.claims', :claims, true)"
            ),
            {"claims": claims.replace("ID", str(world.hlf))},
        )
        assert await connection.scalar(text("SELECT count(*) FROM public.mentors")) == 0
        assert await connection.scalar(text("SELECT count(*) FROM outbox.events")) == 0


async def test_reading_is_read_only(world: World, looking: AsyncEngine) -> None:
    """
    What shows pages cannot change a thing.
    """
    await in_trouble(world)
    with callers.asking(coordinator(world.hlf)), pytest.raises(DBAPIError, match="read-only"):
        async with database.reading(looking) as connection:
            await connection.execute(text(WRITES[0]))


async def test_what_is_only_ours_stays_closed(world: World, acting: AsyncEngine) -> None:
    """
    Sessions are nobody's; the history of actions is added to and never changed.
    """
    await in_trouble(world)
    for statement in (
        "SELECT count(*) FROM outbox.web_sessions",
        "UPDATE outbox.audit SET name = ''",
        "DELETE FROM outbox.audit",
        "DELETE FROM public.dynamics_sync_failures",
        "DELETE FROM outbox.events",
        "UPDATE public.portal_confirmations SET version = 9",
        "UPDATE public.mentors SET full_name = ''",
        "UPDATE public.certifications SET mentor_id = gen_random_uuid()",
        "SELECT count(*) FROM outbox.commits",
    ):
        with (
            callers.asking(coordinator(world.hlf)),
            pytest.raises(ProgrammingError, match="permission denied"),
        ):
            async with database.transaction(acting) as connection:
                await connection.execute(text(statement))


async def test_nobody_writes_history_in_another_name(world: World, acting: AsyncEngine) -> None:
    """
    The claims are who did it.
    """
    add = text(
        "INSERT INTO outbox.audit (organization_id, subject, name, action, outcome)"
        " VALUES (:organization_id, :subject, 'X', 'retry', 'started')"
    )
    for organization_id, subject in ((world.other, "somebody"), (world.hlf, "somebody else")):
        with (
            callers.asking(coordinator(world.hlf)),
            pytest.raises(ProgrammingError, match="row-level security"),
        ):
            async with database.transaction(acting) as connection:
                await connection.execute(
                    add, {"organization_id": organization_id, "subject": subject}
                )


async def test_where_nobody_asks_nothing_is_answered(
    engine: AsyncEngine, looking: AsyncEngine, acting: AsyncEngine
) -> None:
    """
    A forgotten caller is an error, never everybody's rows; the engine below is as it was.
    """
    for own in (looking, acting):
        with pytest.raises(callers.NoCallerError):
            async with own.connect() as connection:
                await connection.execute(text("SELECT 1"))
    async with database.reading(engine) as connection:
        assert await connection.scalar(text("SELECT current_user")) != "authenticated"


async def test_without_a_transaction_nothing_is_answered(
    world: World, looking: AsyncEngine
) -> None:
    """
    Claims hold for one: a statement that stood alone would be nobody's.
    """
    with callers.asking(coordinator(world.hlf)):
        async with looking.connect() as connection:
            alone = await connection.execution_options(isolation_level="AUTOCOMMIT")
            with pytest.raises(callers.NoCallerError):
                await alone.execute(text("SELECT 1"))


async def test_a_connection_remembers_nobody(
    world: World, engine: AsyncEngine, looking: AsyncEngine
) -> None:
    """
    Whoever gets it next is not taken for the last one.
    """
    one = database.connect(
        engine.url.render_as_string(hide_password=False), application_name="one", pool_size=1
    )
    own = callers.bound(one)
    with callers.asking(coordinator(world.hlf)):
        async with database.reading(own) as connection:
            assert await connection.scalar(text("SELECT current_user")) == "authenticated"
    async with one.connect() as connection:
        assert await connection.scalar(text("SELECT current_user")) != "authenticated"
        assert not await connection.scalar(
            text("SELECT current_setting('request.jwt.claims', true)")
        )
    await one.dispose()


def test_a_viewer_may_not_act() -> None:
    """
    It is said before the database has to.
    """
    with (
        callers.asking(replace(coordinator(uuid4()), role="viewer")),
        pytest.raises(NotAllowedError),
    ):
        callers.require_coordinator()
