"""
The roles of migration 0006: exactly what is needed, also after there and back again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from alembic import command
from psycopg.rows import tuple_row

from tests.chaos.server import running
from tests.conftest import alembic_config, environment, new_database
from tests.integration.test_migrations import SECURED_BY_THEM, THEIRS, values
from worker.doctor.rights import PEOPLE, ROLES
from worker.tables import metadata

if TYPE_CHECKING:
    from collections.abc import Iterator

    from worker.doctor.rights import Duty

HELD = """
SELECT role, schemas.nspname || '.' || tables.relname, command, attname
  FROM unnest(%s::text[]) AS role, pg_class AS tables
  JOIN pg_namespace AS schemas ON schemas.oid = relnamespace
  JOIN pg_attribute ON attrelid = tables.oid AND (attnum > 0 OR attname = 'ctid'),
       unnest('{SELECT,INSERT,UPDATE,REFERENCES}'::text[]) AS command
 WHERE nspname IN ('public', 'outbox') AND relkind = 'r' AND NOT attisdropped
   AND has_column_privilege(role, tables.oid, attnum, command)
   -- That everything is granted says nothing of a column that belongs to PostgreSQL.
   AND NOT (attname = 'ctid' AND has_table_privilege(role, tables.oid, command))
 UNION ALL
SELECT role, schemas.nspname || '.' || tables.relname, command, ''
  FROM unnest(%s::text[]) AS role, pg_class AS tables
  JOIN pg_namespace AS schemas ON schemas.oid = relnamespace,
       unnest('{DELETE,TRUNCATE,TRIGGER}'::text[]) AS command
 WHERE nspname IN ('public', 'outbox') AND relkind = 'r'
   AND has_table_privilege(role, tables.oid, command)
"""

COLUMNS = {
    str(table): [column.name for column in table.columns] for table in metadata.sorted_tables
}
COLUMNS["outbox.alembic_version"] = ["version_num"]

REGISTER: Duty = {
    "public.organizations": {"SELECT": ""},
    "public.mentors": {"SELECT": ""},
    "public.certifications": {
        "SELECT": "",
        "UPDATE": "status, expires_on, expired_at, renewed_at",
    },
}
"""What people have besides, where these tables are ours or their owner kept rows apart."""

DUTIES = {**ROLES, "authenticated": (PEOPLE, REGISTER)}

Right = tuple[Any, ...]


def held(url: str) -> set[Right]:
    """
    What the database lets the roles do: role, table, command and column.
    """
    roles = list(DUTIES)
    with psycopg.connect(url, row_factory=tuple_row) as connection:
        return set(connection.execute(HELD.encode(), [roles, roles]))


def needed() -> set[Right]:
    """
    What the doctor asks for, in the same words.
    """
    return {
        (role, name, command, column)
        for role, duties in DUTIES.items()
        for duty in duties
        for name, commands in duty.items()
        for command, columns in commands.items()
        for column in _columns(name, command, columns)
    }


def _columns(name: str, command: str, columns: str) -> list[str]:
    if command == "DELETE":
        return [""]
    return columns.split(", ") if columns else COLUMNS[name]


def test_each_role_may_do_what_it_needs_and_nothing_else(database_url: str) -> None:
    """
    To the column, and in both directions: the migrations and the doctor's list are one.
    """
    assert sorted(needed() - held(database_url)) == []
    assert sorted(held(database_url) - needed()) == []


def test_no_role_of_ours_can_log_in_or_see_past_policies(database_url: str) -> None:
    """
    Logins are the operator's to make, and a policy is what lets a role see rows.
    """
    powerful = values(
        database_url,
        "SELECT rolname FROM pg_roles WHERE rolname = ANY (%s) AND (rolcanlogin OR rolsuper"
        " OR rolbypassrls OR rolcreaterole OR rolcreatedb OR rolreplication)",
        list(ROLES),
    )
    people = values(
        database_url,
        "SELECT rolname FROM pg_roles WHERE rolname = ANY (%s)"
        " AND pg_has_role(oid, 'authenticated', 'MEMBER') ORDER BY rolname",
        list(ROLES),
    )
    without_asking = values(
        database_url,
        "SELECT rolname FROM pg_roles WHERE rolname = ANY (%s)"
        " AND pg_has_role(oid, 'authenticated', 'USAGE')",
        list(ROLES),
    )

    assert powerful == []
    assert people == ["hlf_sync_web"]
    assert without_asking == []


# ------------------------------------------------------------------ there and back again

ACCESS = {
    "grants": """
        SELECT relnamespace::regnamespace::text, relname, '' AS attname,
               grantee::regrole::text, privilege_type
          FROM pg_class, aclexplode(coalesce(relacl, acldefault('r', relowner)))
         WHERE relnamespace::regnamespace::text IN ('public', 'outbox')
           AND relkind = 'r'
         UNION ALL
        SELECT relnamespace::regnamespace::text, relname, attname, grantee::regrole::text,
               privilege_type
          FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid, aclexplode(attacl)
         WHERE relnamespace::regnamespace::text IN ('public', 'outbox')
    """,
    "sequences": """
        SELECT relname, grantee::regrole::text, privilege_type
          FROM pg_class, aclexplode(coalesce(relacl, acldefault('s', relowner)))
         WHERE relnamespace::regnamespace::text IN ('public', 'outbox') AND relkind = 'S'
    """,
    "policies": "SELECT schemaname, tablename, policyname, roles::text, cmd, qual, with_check"
    " FROM pg_policies",
    "security": """
        SELECT relname, relrowsecurity, relforcerowsecurity FROM pg_class
         WHERE relkind = 'r' AND relnamespace::regnamespace::text IN ('public', 'outbox')
    """,
    "schemas": """
        SELECT nspname, grantee::regrole::text, privilege_type
          FROM pg_namespace, aclexplode(nspacl) WHERE nspname = 'outbox'
    """,
    "functions": """
        SELECT proname, grantee::regrole::text, privilege_type
          FROM pg_proc, aclexplode(proacl) WHERE pronamespace::regnamespace::text = 'outbox'
    """,
    "publication": "SELECT pubname, tablename FROM pg_publication_tables",
}


def access(url: str) -> dict[str, list[str]]:
    """
    Who may do what, and which rows they see.
    """
    with psycopg.connect(url, row_factory=tuple_row) as connection:
        return {
            kind: sorted(str(row) for row in connection.execute(query.encode()))
            for kind, query in ACCESS.items()
        }


@pytest.fixture(params=["", THEIRS, THEIRS + SECURED_BY_THEM], ids=["ours", "adopted", "secured"])
def prepared(server_url: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """
    A database with a publication of single tables, and perhaps with tables of somebody else's.
    """
    with new_database(server_url) as url, environment(DATABASE_URL=url):
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(request.param + "; CREATE PUBLICATION supabase_realtime;")
        yield url


def test_a_downgrade_takes_back_all_of_it_and_a_second_upgrade_is_like_the_first(
    prepared: str,
) -> None:
    """
    Policies, grants, force and the publication; whoever owns the mentors.
    """
    command.upgrade(alembic_config(), "0005")
    before = access(prepared)

    command.upgrade(alembic_config(), "0006")
    first = access(prepared)
    command.downgrade(alembic_config(), "0005")
    assert access(prepared) == before

    command.upgrade(alembic_config(), "0006")
    assert access(prepared) == first
    assert first["publication"] == ["('supabase_realtime', 'dynamics_sync_failures')"]


async def test_a_downgrade_takes_back_what_is_left_where_roles_are_gone() -> None:
    """
    Somebody dropped one or all of them, on a server of its own: elsewhere they are others' too.
    A new upgrade makes them again.
    """
    async with running() as server:
        with environment(DATABASE_URL=server.url()):
            command.upgrade(alembic_config(), "head")
            first = access(server.url())
            for gone in (["hlf_sync_cron"], list(DUTIES)):
                with psycopg.connect(server.url(), autocommit=True) as admin:
                    for role in gone:
                        admin.execute(f"DROP OWNED BY {role}; DROP ROLE {role}".encode())
                command.downgrade(alembic_config(), "base")

                assert not access(server.url())["policies"]
                command.upgrade(alembic_config(), "head")
                assert access(server.url()) == first


GIVEN_AWAY = """
    GRANT ALL ON SCHEMA outbox TO PUBLIC, authenticated;
    GRANT ALL ON ALL TABLES IN SCHEMA outbox TO authenticated;
    GRANT ALL ON ALL SEQUENCES IN SCHEMA outbox TO PUBLIC, authenticated;
    GRANT SELECT ON outbox.alembic_version, outbox.settled TO PUBLIC;
    GRANT EXECUTE ON FUNCTION outbox.may_act() TO PUBLIC;
    GRANT DELETE ON public.dynamics_sync_failures TO authenticated;
    GRANT SELECT ON public.portal_confirmations TO PUBLIC;
"""


def test_what_was_given_away_before_is_taken_back(server_url: str, database_url: str) -> None:
    """
    By somebody, or by a project's defaults: afterwards each has what it has in a new database.
    """
    with new_database(server_url) as url, environment(DATABASE_URL=url):
        command.upgrade(alembic_config(), "0005")
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(GIVEN_AWAY)
        command.upgrade(alembic_config(), "head")

        assert access(url) == access(database_url)


def test_a_table_that_nobody_secured_is_not_opened_to_the_roles(prepared: str) -> None:
    """
    What is somebody else's gets neither a grant nor a policy of ours, unless its rows are kept
    apart already; and is never forced.
    """
    command.upgrade(alembic_config(), "head")
    ours = {name for role, name, *_ in held(prepared) if role in ROLES}
    open_ = ours & {"public.mentors", "public.certifications"}
    secured = values(prepared, "SELECT relname FROM pg_class WHERE relrowsecurity ORDER BY 1")
    forced = values(prepared, "SELECT relname FROM pg_class WHERE relforcerowsecurity")
    theirs = values(prepared, "SELECT to_regtype('public.status_of_theirs') IS NOT NULL")

    assert bool(open_) == ("mentors" in secured)
    assert ("mentors" in forced) == (theirs == [False])


def test_a_publication_of_every_table_is_left_as_it_is(server_url: str) -> None:
    """
    The failures are in it already.
    """
    with new_database(server_url) as url, environment(DATABASE_URL=url):
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("CREATE PUBLICATION supabase_realtime FOR ALL TABLES")
        command.upgrade(alembic_config(), "head")
        command.downgrade(alembic_config(), "0005")
        assert "dynamics_sync_failures" in values(
            url, "SELECT tablename FROM pg_publication_tables"
        )
