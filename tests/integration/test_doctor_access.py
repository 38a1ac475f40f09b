"""
The doctor on grants, policies, poolers and strangers: each illness is named, and the cure that it
prints, pasted as it is, cures.
"""

from __future__ import annotations

import asyncio
import secrets
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import pytest
from alembic import command
from sqlalchemy.engine import make_url

from tests.chaos.pooler import PGBOUNCER, pooled
from tests.conftest import alembic_config, environment, new_database
from tests.integration.test_migrations import SECURED_BY_THEM, THEIRS
from worker import database
from worker.doctor import grants, session
from worker.doctor.database import examine_database
from worker.doctor.exposure import examine_exposure
from worker.doctor.rights import ROLES
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from sqlalchemy.ext.asyncio import AsyncEngine

    from worker.doctor import Finding


@pytest.fixture(scope="module")
def ward(server_url: str) -> Iterator[str]:
    """
    A migrated database for all that can be cured again.
    """
    with new_database(server_url) as url, environment(DATABASE_URL=url):
        command.upgrade(alembic_config(), "head")
        yield url


@pytest.fixture
async def engine(ward: str) -> AsyncIterator[AsyncEngine]:
    """
    As the tables' owner.
    """
    async with connected(ward) as engine:
        yield engine


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[AsyncEngine]:
    """
    An engine, until the block ends.
    """
    engine = database.connect(url, application_name="test")
    yield engine
    await engine.dispose()


def execute(url: str, statements: str) -> None:
    """
    Run statements, each committed.
    """
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statements.encode())


async def found(engine: AsyncEngine) -> dict[str, Finding]:
    """
    What the doctor says of the owner, the roles and everybody else.
    """
    findings = [await grants.of_this_user(engine), await grants.of_the_roles(engine)]
    findings += [finding async for finding in examine_exposure(engine)]
    return {finding.about: finding for finding in findings}


def ill(findings: dict[str, Finding]) -> dict[str, str]:
    """
    What is not well, and how bad it is.
    """
    return {
        about: finding.verdict for about, finding in findings.items() if finding.verdict != "ok"
    }


def statements(finding: Finding) -> str:
    """
    The part of a cure that is pasted.
    """
    return finding.cure.split(": ", maxsplit=1)[1]


@pytest.fixture
def somebody(server_url: str) -> Iterator[str]:
    """
    A login that has nothing to do with us; roles belong to the whole server.
    """
    name = f"hlf_test_{secrets.token_hex(4)}"
    execute(server_url, f"CREATE ROLE {name} LOGIN PASSWORD 'somebody'")
    yield name
    execute(server_url, f"DROP ROLE {name}")


# --------------------------------------------------------------------------------- roles


@pytest.mark.parametrize(
    ("illness", "says"),
    [
        (
            "REVOKE UPDATE (version) ON public.portal_visibility FROM hlf_sync_worker",
            "hlf_sync_worker lacks UPDATE (version) on public.portal_visibility",
        ),
        (
            "REVOKE DELETE ON outbox.doubts FROM hlf_sync_cron",
            "hlf_sync_cron lacks DELETE on outbox.doubts",
        ),
        (
            "REVOKE USAGE ON SCHEMA outbox FROM hlf_sync_metrics",
            "hlf_sync_metrics lacks USAGE on schema outbox",
        ),
        (
            "REVOKE SELECT (ctid) ON outbox.idempotency FROM hlf_sync_web",
            "hlf_sync_web lacks SELECT (ctid) on outbox.idempotency",
        ),
        (
            "REVOKE SELECT ON public.dynamics_sync_failures FROM authenticated",
            "authenticated lacks SELECT on public.dynamics_sync_failures",
        ),
        (
            "DROP POLICY hlf_sync_roles_select ON public.cert_notification_log",
            "hlf_sync_cron has no policy for SELECT on public.cert_notification_log",
        ),
    ],
)
async def test_what_a_role_lacks_is_named_and_the_cure_cures(
    ward: str, engine: AsyncEngine, illness: str, says: str
) -> None:
    """
    To the column, for whoever asks: here the owner, who lacks nothing.
    """
    execute(ward, illness)
    findings = await found(engine)
    assert ill(findings) == {"roles": "warning"}
    assert findings["roles"].says == says

    execute(ward, statements(findings["roles"]))
    assert ill(await found(engine)) == {}


async def test_a_login_of_a_role_is_told_what_its_own_role_lacks(ward: str, somebody: str) -> None:
    """
    As broken, since nothing would go; and no word of what other roles may do besides.
    """
    execute(ward, f"GRANT hlf_sync_worker TO {somebody}")
    own = make_url(ward).set(username=somebody, password="somebody")
    async with connected(own.render_as_string(hide_password=False)) as engine:
        assert ill(await found(engine)) == {}

        execute(
            ward,
            "REVOKE UPDATE (attempted_at, version) ON public.dynamics_sync_failures"
            " FROM hlf_sync_worker",
        )
        findings = await found(engine)
        assert ill(findings) == {"grants": "broken"}
        assert findings["grants"].says == (
            "missing: UPDATE (attempted_at, version) on public.dynamics_sync_failures"
        )
        assert "TO hlf_sync_worker;" in findings["grants"].cure

        execute(ward, statements(findings["grants"]))
        assert ill(await found(engine)) == {}


async def test_on_adopted_tables_the_owner_is_told_what_to_grant(server_url: str) -> None:
    """
    They were not ours to open. First the grants, and when the owner switches row-level security
    on later, the policies.
    """
    with new_database(server_url) as url, environment(DATABASE_URL=url):
        execute(url, THEIRS)
        command.upgrade(alembic_config(), "head")
        async with connected(url) as engine:
            findings = await found(engine)
            assert ill(findings) == {"roles": "warning"}
            assert (
                "hlf_sync_worker lacks SELECT (expires_on, id, mentor_id, status)"
                " on public.certifications"
            ) in findings["roles"].says
            execute(url, statements(findings["roles"]))
            assert ill(await found(engine)) == {}

            execute(url, SECURED_BY_THEM)
            findings = await found(engine)
            assert ill(findings) == {"roles": "warning"}
            assert "hlf_sync_cron has no policy for UPDATE" in findings["roles"].says
            execute(url, statements(findings["roles"]))
            assert ill(await found(engine)) == {}


async def test_a_policy_that_takes_rows_away_again_is_named(
    ward: str, engine: AsyncEngine, somebody: str
) -> None:
    """
    Beside one that shows every row, and whoever is kept from a mentor never delivers for it. One
    that every row passes, or that is for others, is no matter. The doctor looks on.
    """
    execute(
        ward,
        "CREATE POLICY harmless ON public.mentors AS RESTRICTIVE"
        "  USING (true) WITH CHECK (full_name <> '');"
        'CREATE POLICY "For people" ON public.mentors AS RESTRICTIVE TO authenticated'
        "  USING (false);"
        "CREATE POLICY deletions ON public.mentors AS RESTRICTIVE FOR DELETE USING (false)",
    )
    own = make_url(ward).set(username=somebody, password="somebody")
    url = own.render_as_string(hide_password=False)
    try:
        async with connected(url) as theirs:
            execute(ward, f"GRANT hlf_sync_worker TO {somebody}")
            assert ill(await found(engine)) == ill(await found(theirs)) == {}

            execute(
                ward,
                'CREATE POLICY "Ours" ON public.mentors AS RESTRICTIVE TO hlf_sync_worker'
                " USING (full_name <> '')",
            )
            findings = await found(engine)
            assert ill(findings) == {"roles": "warning"}
            assert findings["roles"].says == (
                'hlf_sync_worker may be kept from rows by the restrictive "Ours" on public.mentors'
            )
            findings = await found(theirs)
            assert ill(findings) == {"grants": "warning"}
            assert findings["grants"].says == (
                'a restrictive policy may keep rows from it: "Ours" on public.mentors'
            )
            assert "ALTER POLICY" in findings["grants"].cure

            with environment(DATABASE_URL=url, HLF_ORGANIZATION_ID=str(uuid4())):
                looked_at = [one.about async for one in examine_database(Settings.load())]
            assert "organisation" in looked_at
    finally:
        execute(
            ward,
            "DROP POLICY harmless ON public.mentors;"
            'DROP POLICY "For people" ON public.mentors;'
            "DROP POLICY deletions ON public.mentors;"
            'DROP POLICY IF EXISTS "Ours" ON public.mentors',
        )


async def test_a_policy_that_people_lost_is_named(ward: str, engine: AsyncEngine) -> None:
    """
    They would see an empty page, and Realtime would fall silent. Which rows a policy shows is
    more than a statement to paste, so where it is written is said.
    """
    lost = "hlf_sync_select ON public.dynamics_sync_failures"
    execute(ward, f"ALTER POLICY {lost} TO hlf_sync_metrics")
    try:
        findings = await found(engine)
        assert ill(findings) == {"roles": "warning"}
        assert findings["roles"].says == (
            "authenticated has no policy for SELECT on public.dynamics_sync_failures"
        )
        assert "migration 0005" in findings["roles"].cure
    finally:
        execute(ward, f"ALTER POLICY {lost} TO authenticated")


async def test_a_dashboard_that_cannot_become_its_callers_is_named(
    ward: str, engine: AsyncEngine, somebody: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    With every grant of its own, and yet each page would fail. What roles are members of is the
    whole server's, where others are at work, so one that never was a member plays the dashboard's.
    """
    assert ill(await found(engine)) == {}
    monkeypatch.setattr(grants, "BECOME_PEOPLE", ["hlf_sync_metrics"])
    cure = "As the tables' owner: GRANT authenticated TO hlf_sync_metrics;"
    roles = (await found(engine))["roles"]
    assert roles.says == "hlf_sync_metrics lacks authenticated"
    assert roles.cure.endswith(": GRANT authenticated TO hlf_sync_metrics;")

    execute(ward, f"GRANT hlf_sync_metrics TO {somebody}")
    own = make_url(ward).set(username=somebody, password="somebody")
    async with connected(own.render_as_string(hide_password=False)) as theirs:
        lacking = await grants.of_this_user(theirs)
        assert (lacking.says, lacking.cure) == ("missing: authenticated", cure)

        execute(ward, f"GRANT authenticated TO {somebody}")
        assert ill(await found(theirs)) == {}


async def test_a_role_that_is_not_on_this_server_is_made_and_granted_what_it_needs(
    ward: str, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    As after a restore on another server, which knows the tables and not the roles: the migrations
    have run, and make nothing a second time.
    """
    name = f"hlf_test_{secrets.token_hex(4)}"
    monkeypatch.setattr(grants, "ROLES", {**ROLES, name: ROLES["hlf_sync_metrics"]})
    findings = await found(engine)
    assert ill(findings) == {"roles": "broken"}
    assert findings["roles"].says == f"missing: {name}"

    execute(ward, statements(findings["roles"]))
    try:
        findings = await found(engine)
        assert ill(findings) == {"roles": "warning"}
        assert f"{name} lacks SELECT on outbox.gates" in findings["roles"].says

        execute(ward, statements(findings["roles"]))
        assert ill(await found(engine)) == {}
    finally:
        execute(ward, f"DROP OWNED BY {name}; DROP ROLE {name}")


# ------------------------------------------------------------------------------ strangers


@pytest.mark.parametrize(
    ("illness", "verdict", "says"),
    [
        ("NO FORCE ROW LEVEL SECURITY", "warning", "does not bind the owner of outbox.gates"),
        ("DISABLE ROW LEVEL SECURITY", "broken", "is off on outbox.gates"),
    ],
)
async def test_a_table_without_row_level_security_is_named(
    ward: str, engine: AsyncEngine, illness: str, verdict: str, says: str
) -> None:
    """
    Off is worse than not forced.
    """
    execute(ward, f"ALTER TABLE outbox.gates {illness}")
    findings = await found(engine)
    assert ill(findings) == {"row security": verdict}
    assert findings["row security"].says == says

    execute(ward, statements(findings["row security"]))
    assert ill(await found(engine)) == {}


@pytest.mark.parametrize(
    ("illness", "says"),
    [
        ("SELECT ON outbox.settled TO PUBLIC", "PUBLIC has SELECT on outbox.settled"),
        ("DELETE ON outbox.audit TO authenticated", "authenticated has DELETE on outbox.audit"),
        ("CREATE ON SCHEMA outbox TO authenticated", "authenticated has CREATE on SCHEMA outbox"),
        (
            "UPDATE (outcome) ON outbox.audit TO authenticated",
            "authenticated has UPDATE on outbox.audit",
        ),
    ],
)
async def test_an_api_that_reaches_the_machinery_is_named(
    ward: str, engine: AsyncEngine, illness: str, says: str
) -> None:
    """
    Whoever has it, and what.
    """
    execute(ward, f"GRANT {illness}")
    findings = await found(engine)
    assert ill(findings) == {"API": "broken"}
    assert findings["API"].says == says

    execute(ward, statements(findings["API"]))
    assert ill(await found(engine)) == {}


async def test_whoever_may_change_certifications_past_the_transitions_is_named(
    ward: str, engine: AsyncEngine, somebody: str
) -> None:
    """
    A grant alone changes no row where policies decide; with a policy, or where a role sees past
    them, it does.
    """
    execute(ward, f"GRANT SELECT, UPDATE (status) ON public.certifications TO {somebody}")
    try:
        assert ill(await found(engine)) == {}

        execute(ward, f"ALTER ROLE {somebody} BYPASSRLS")
        findings = await found(engine)
        assert ill(findings) == {"certifications": "warning"}
        assert somebody in findings["certifications"].says
        assert "nightly" in findings["certifications"].cure

        execute(
            ward,
            f"ALTER ROLE {somebody} NOBYPASSRLS;"
            f"CREATE POLICY theirs ON public.certifications TO {somebody} USING (true)",
        )
        assert ill(await found(engine)) == {"certifications": "warning"}
    finally:
        execute(
            ward,
            "DROP POLICY IF EXISTS theirs ON public.certifications;"
            f"REVOKE ALL ON public.certifications FROM {somebody}",
        )


async def test_whoever_sees_past_policies_and_may_change_them_as_a_member_is_named(
    ward: str, engine: AsyncEngine, somebody: str
) -> None:
    """
    The grant is a group's, in which everybody else is bound.
    """
    group = f"{somebody}_group"
    execute(ward, f"CREATE ROLE {group} ROLE {somebody}")
    try:
        execute(ward, f"GRANT SELECT, UPDATE (status) ON public.certifications TO {group}")
        assert ill(await found(engine)) == {}

        execute(ward, f"ALTER ROLE {somebody} BYPASSRLS")
        findings = await found(engine)
        assert ill(findings) == {"certifications": "warning"}
        assert findings["certifications"].says.startswith(f"{somebody} may change them directly")
    finally:
        execute(ward, f"DROP OWNED BY {group}; DROP ROLE {group}")


async def test_a_publication_without_the_failures_is_named(ward: str, engine: AsyncEngine) -> None:
    """
    Where there is none, nobody listens, and nothing is said.
    """
    assert "Realtime" not in await found(engine)
    execute(ward, "CREATE PUBLICATION supabase_realtime FOR TABLE public.mentor_pauses")
    try:
        findings = await found(engine)
        assert ill(findings) == {"Realtime": "warning"}
        execute(ward, statements(findings["Realtime"]))
        assert ill(await found(engine)) == {}
    finally:
        execute(ward, "DROP PUBLICATION supabase_realtime")


# -------------------------------------------------------------------------------- poolers

needs_pooler = pytest.mark.skipif(
    PGBOUNCER is None, reason="PgBouncer is not installed: no pooler to be told apart."
)


def connecting(url: str) -> Any:  # noqa: ANN401 (psycopg's own)
    """
    What opens a connection to this address.
    """
    return lambda: psycopg.AsyncConnection.connect(url, autocommit=True)


async def test_a_server_is_told_from_a_pooler(ward: str) -> None:
    """
    By what it says of itself.
    """
    assert await session.way_of(connecting(ward)) == "direct"


async def warm(url: str, servers: int) -> None:
    """
    Have a pooler open all the servers it may, so that it has a choice.
    """
    async with AsyncExitStack() as stack:
        for _ in range(servers):
            client = await stack.enter_async_context(await connecting(url)())
            await stack.enter_async_context(client.transaction())
            await client.execute("SELECT 1", prepare=False)


@needs_pooler
@pytest.mark.parametrize("lending", ["0", "1"], ids=["the last", "in turns"])
@pytest.mark.parametrize("servers", [1, 3])
async def test_a_pooler_in_transaction_mode_gives_itself_away(
    ward: str, servers: int, lending: str
) -> None:
    """
    Every time, with one server or several, whichever of them it lends next.
    """
    async with pooled(ward, servers=servers, server_round_robin=lending) as url:
        await warm(url, servers)
        ways = [await session.way_of(connecting(url)) for _ in range(5)]

    assert ways == ["transaction pooler"] * 5


@needs_pooler
async def test_a_pooler_in_transaction_mode_gives_itself_away_while_others_use_it(
    ward: str,
) -> None:
    """
    Who hold servers for a moment and take them away from under us.
    """
    async with pooled(ward, servers=4) as url, await connecting(url)() as other:
        over = asyncio.Event()

        async def busy() -> None:
            while not over.is_set():
                async with other.transaction():
                    await other.execute("SELECT 1", prepare=False)

        task = asyncio.create_task(busy())
        ways = [await session.way_of(connecting(url)) for _ in range(5)]
        over.set()
        await task

    assert ways == ["transaction pooler"] * 5


@needs_pooler
async def test_a_pooler_in_session_mode_is_as_good_as_none(ward: str) -> None:
    """
    And is not taken for the other one.
    """
    async with pooled(ward, servers=3, pool_mode="session") as url:
        ways = [await session.way_of(connecting(url)) for _ in range(5)]

    assert ways == ["session pooler"] * 5


@needs_pooler
async def test_a_wake_up_through_a_pooler_says_which_setting_and_which_port(
    ward: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    And with a direct address for it, nothing is wrong.
    """
    async with pooled(ward) as through, connected(through) as engine:
        monkeypatch.setenv("DATABASE_URL", through)
        assert (await session.pooler()).says == session.SAYS["transaction pooler"]
        deaf = await session.wakeup(engine)
        monkeypatch.setenv("LISTEN_DATABASE_URL", ward)
        heard = await session.wakeup(engine)

    assert deaf.verdict == "warning"
    assert "LISTEN_DATABASE_URL" in deaf.cure
    assert "5432, not 6543" in deaf.cure
    assert heard.verdict == "ok"
