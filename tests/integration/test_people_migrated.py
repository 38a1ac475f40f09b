"""
What people see depends on who migrated and whose tables they are.
"""

from __future__ import annotations

import secrets
from contextlib import contextmanager
from typing import TYPE_CHECKING
from uuid import UUID

import psycopg
import pytest
from alembic import command
from alembic.util import CommandError
from psycopg import sql
from sqlalchemy import text
from sqlalchemy.engine import make_url

from tests.conftest import alembic_config, environment, new_database
from tests.integration.test_callers import coordinator
from tests.integration.test_migrations import SECURED_BY_THEM, THEIRS
from worker import database
from worker.certifications import CertificationManagementService
from worker.coordinator import callers
from worker.errors import SchemaError

if TYPE_CHECKING:
    from collections.abc import Iterator

HLF = UUID("00000000-0000-0000-0000-000000000001")

MENTORS = text("SELECT count(*) FROM public.mentors")

EVENTS = text("SELECT count(*) FROM outbox.events")

RUN_OUT = text("""
INSERT INTO public.certifications (mentor_id, expires_on)
SELECT id, date '2001-01-01' FROM public.mentors
""")


@contextmanager
def owned_by(server_url: str, options: str) -> Iterator[str]:
    """
    A database of an ordinary user with these options, who is no administrator.
    """
    user = f"hlf_owner_{secrets.token_hex(4)}"
    identity = sql.Identifier(user)
    with psycopg.connect(server_url, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'owner' " + options).format(identity))
        try:
            with new_database(server_url) as url:
                name = str(make_url(url).database)
                admin.execute(
                    sql.SQL("ALTER DATABASE {} OWNER TO {}").format(sql.Identifier(name), identity)
                )
                with psycopg.connect(url, autocommit=True) as inside:
                    inside.execute(sql.SQL("ALTER SCHEMA public OWNER TO {}").format(identity))
                own = make_url(url).set(username=user, password="owner")
                yield own.render_as_string(hide_password=False)
        finally:
            admin.execute(sql.SQL("DROP ROLE {}").format(identity))


FILL = f"""
INSERT INTO public.organizations (id, name) VALUES ('{HLF}', 'HLF')
    ON CONFLICT DO NOTHING;
INSERT INTO public.mentors (organization_id, full_name) VALUES ('{HLF}', 'A mentor');
"""  # noqa: S608 (nothing from outside)


async def seen(url: str, organization_id: UUID | None) -> int:
    """
    How many mentors are seen, by a coordinator or, with None, by the owner.
    """
    engine = database.connect(url, application_name="test")
    try:
        if organization_id is None:
            async with database.reading(engine) as connection:
                return int(await connection.scalar(MENTORS) or 0)
        with callers.asking(coordinator(organization_id)):
            async with database.reading(callers.bound(engine)) as connection:
                return int(await connection.scalar(MENTORS) or 0)
    finally:
        await engine.dispose()


async def expired(url: str) -> int:
    """
    How many mentors the owner's own run hides: it reads and writes most of the tables.
    """
    engine = database.connect(url, application_name="test")
    async with engine.begin() as connection:
        await connection.execute(RUN_OUT)
    service = CertificationManagementService(engine, organization_id=HLF, timezone="UTC")
    pages = [page.mentors async for page in service.expire_all()]
    await service.aclose()
    async with database.reading(engine) as connection:
        assert await connection.scalar(EVENTS) == sum(pages)
    await engine.dispose()
    return sum(pages)


def migrate(url: str, *, before: str = "", after: str = FILL) -> None:
    """
    Prepare, migrate, fill.
    """
    with psycopg.connect(url, autocommit=True) as connection:
        if before:
            connection.execute(before)
        with environment(DATABASE_URL=url):
            command.upgrade(alembic_config(), "head")
        connection.execute(after)


@pytest.mark.usefixtures("database_url")  # whose migration made the roles
async def test_an_ordinary_owner_migrates_works_and_serves_people(server_url: str) -> None:
    """
    As its owner it sees everything, as the worker does; as a person, that person's rows. From
    PostgreSQL 16 on it may make roles, but not take one that is there: then it has it already.
    """
    with owned_by(server_url, "CREATEROLE IN ROLE authenticated") as url:
        migrate(url)
        assert await seen(url, None) == 1
        assert await seen(url, HLF) == 1
        assert await seen(url, UUID(int=7)) == 0
        assert await expired(url) == 1


def test_whoever_may_not_take_the_role_is_told_what_to_do(server_url: str) -> None:
    """
    And nothing is left behind.
    """
    with owned_by(server_url, "NOCREATEROLE") as url:
        with pytest.raises(CommandError, match="GRANT authenticated TO"):
            migrate(url)
        with psycopg.connect(url) as connection:
            left = connection.execute("SELECT count(*) FROM pg_namespace WHERE nspname = 'outbox'")
            assert left.fetchone() == (0,)


async def test_adopted_tables_that_their_owner_secured_are_opened_to_people(
    server_url: str,
) -> None:
    """
    Row by row; and taken back by the downgrade, while the tables stay.
    """
    with new_database(server_url) as url:
        migrate(url, before=THEIRS + SECURED_BY_THEM)
        assert await seen(url, HLF) == 1
        assert await seen(url, UUID(int=7)) == 0
        engine = database.connect(url, application_name="test")
        await callers.require_rows_kept_apart(engine)
        await engine.dispose()
        with environment(DATABASE_URL=url):
            command.downgrade(alembic_config(), "base")
        with psycopg.connect(url) as connection:
            left = connection.execute("SELECT count(*) FROM pg_policies").fetchone()
            assert left == (0,)


async def test_adopted_tables_that_nobody_secured_are_left_alone(server_url: str) -> None:
    """
    Their other readers go on reading, and the dashboard says what it needs.
    """
    with new_database(server_url) as url:
        migrate(url, before=THEIRS)
        engine = database.connect(url, application_name="test")
        with pytest.raises(SchemaError, match="certifications, mentors, organizations"):
            await callers.require_rows_kept_apart(engine)
        await engine.dispose()
