"""
Migrations: what they make, what they adopt, what they leave alone and what they refuse.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from contextlib import contextmanager
from datetime import date
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psycopg
import pytest
from alembic import command, util
from alembic.autogenerate import produce_migrations
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from psycopg import sql
from psycopg.errors import IntegrityError
from psycopg.rows import dict_row, tuple_row
from sqlalchemy import CheckConstraint, NullPool, create_engine, text

from outbox.tables import SCHEMA
from tests.conftest import ROOT, alembic_config, environment, new_database
from tests.integration.test_database import turning_away
from worker import bootstrap
from worker.certifications import CertificationManagementService
from worker.database import connect, parse_url
from worker.errors import UnknownMentorError
from worker.tables import ADOPTABLE, MARK, metadata

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from alembic.operations.ops import MigrationScript

PUBLIC = sorted(table.name for table in metadata.tables.values() if table.schema == "public")
MACHINERY = sorted(table.name for table in metadata.tables.values() if table.schema == SCHEMA)


@pytest.fixture
def url(server_url: str) -> Iterator[str]:
    """
    A database with nothing in it, which `DATABASE_URL` names.
    """
    with new_database(server_url) as url, environment(DATABASE_URL=url):
        yield url


def upgrade(revision: str = "head") -> None:
    """
    Migrate what `DATABASE_URL` names.
    """
    command.upgrade(alembic_config(), revision)


def downgrade() -> None:
    """
    Take everything back.
    """
    command.downgrade(alembic_config(), "base")


def execute(url: str, statements: str) -> None:
    """
    Run statements and commit.
    """
    with psycopg.connect(url) as connection:
        connection.execute(statements.encode())


def values(url: str, query: str, *parameters: object) -> list[Any]:
    """
    The first column of a query.
    """
    with psycopg.connect(url, row_factory=tuple_row) as connection:
        return [row[0] for row in connection.execute(query.encode(), parameters)]


TABLES = """
SELECT table_schema || '.' || table_name FROM information_schema.tables
 WHERE table_schema NOT IN ('pg_catalog', 'information_schema')
 ORDER BY 1
"""

# --------------------------------------------------------------- there and back again


def test_upgrade_makes_every_table_and_downgrade_takes_every_table_back(url: str) -> None:
    """
    There, back and there again: each time the same tables, and in between none.
    """
    ours = sorted(str(table) for table in metadata.tables.values())
    version = f"{SCHEMA}.alembic_version"

    upgrade()
    assert values(url, TABLES) == sorted([*ours, version])
    first = catalogue(url)

    downgrade()
    assert values(url, TABLES) == [version]

    upgrade()
    assert catalogue(url) == first


def test_each_migration_can_be_taken_back_by_itself(url: str) -> None:
    """
    Step by step up and down, the tables of a step are there exactly while it is applied.
    """
    revisions = [script.revision for script in scripts()]
    seen: list[list[str]] = []
    for revision in revisions:
        seen.append(values(url, TABLES))
        upgrade(revision)

    for before in reversed(seen):
        command.downgrade(alembic_config(), "-1")
        assert values(url, TABLES) == before or before == []


def scripts() -> list[Any]:
    """
    The migrations, first to last.
    """
    return list(ScriptDirectory.from_config(alembic_config()).walk_revisions())[::-1]


def test_an_upgrade_with_nothing_to_do_changes_nothing(url: str) -> None:
    """
    Deploying the same release twice is harmless.
    """
    upgrade()
    before = catalogue(url)

    upgrade()

    assert catalogue(url) == before


def test_the_release_asks_for_the_newest_migration() -> None:
    """
    The number that the commands check is the head of one straight line.
    """
    assert [script.revision for script in scripts()][-1] == bootstrap.REVISION
    assert len(ScriptDirectory.from_config(alembic_config()).get_heads()) == 1


# ----------------------------------------------------------------------------- drift

COLUMNS = """
SELECT format('%s.%s.%s', relnamespace::regnamespace, relname, attname) AS name,
       attnum, format_type(atttypid, atttypmod) AS type, attnotnull,
       pg_get_expr(adbin, adrelid) AS "default", attidentity, attgenerated, attstorage,
       attcollation::regcollation::text AS collation, col_description(attrelid, attnum) AS comment
  FROM pg_attribute
  JOIN pg_class ON pg_class.oid = attrelid AND relkind IN ('r', 'p')
  LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
 WHERE attnum > 0 AND NOT attisdropped
   AND relnamespace::regnamespace::text IN ('public', 'outbox')
   AND relname <> 'alembic_version'
"""

CONSTRAINTS = """
SELECT format('%s.%s', conrelid::regclass, conname) AS name, contype, condeferrable,
       convalidated, pg_get_constraintdef(oid) AS definition
  FROM pg_constraint
 WHERE connamespace::regnamespace::text IN ('public', 'outbox')
   AND conrelid <> coalesce(to_regclass('outbox.alembic_version'), 0)
"""

INDEXES = """
SELECT format('%s.%s', schemaname, indexname) AS name, indexdef AS definition
  FROM pg_indexes
 WHERE schemaname IN ('public', 'outbox') AND tablename <> 'alembic_version'
"""

RELATIONS = """
SELECT format('%s.%s', relnamespace::regnamespace, relname) AS name, relkind, relpersistence,
       reloptions, obj_description(oid, 'pg_class') AS comment
  FROM pg_class
 WHERE relnamespace::regnamespace::text IN ('public', 'outbox')
   AND relname NOT LIKE 'alembic_version%'
"""


def catalogue(url: str) -> dict[str, dict[str, Mapping[str, Any]]]:
    """
    What the database itself says about columns, constraints, indexes and tables.
    """
    with psycopg.connect(
        url, row_factory=dict_row, options="-c search_path=pg_catalog"
    ) as connection:
        return {
            kind: {row["name"]: row for row in connection.execute(query.encode())}
            for kind, query in {
                "columns": COLUMNS,
                "constraints": CONSTRAINTS,
                "indexes": INDEXES,
                "relations": RELATIONS,
            }.items()
        }


def test_alembic_finds_nothing_to_migrate(url: str) -> None:
    """
    What the migrations made is what the models say, as far as autogenerate can see.
    """
    upgrade()

    command.check(alembic_config())


@pytest.mark.parametrize("kind", ["columns", "constraints", "indexes", "relations"])
def test_the_migrated_catalogue_is_the_one_that_the_models_make(
    server_url: str, database_url: str, kind: str
) -> None:
    """
    To the last default, predicate, check, comment and storage option, and in the same order.
    """
    with new_database(server_url) as bare:
        with create_engine(parse_url(bare), poolclass=NullPool).begin() as connection:
            connection.execute(text(f"CREATE SCHEMA {SCHEMA}"))
            metadata.create_all(connection)
        expected = catalogue(bare)[kind]

    migrated = catalogue(database_url)[kind]
    assert migrated == expected
    assert len(migrated) > 10


# ----------------------------------------------------------------------- autogenerate


def autogenerated(url: str) -> MigrationScript:
    """
    What autogenerate proposes, by the project's own environment.
    """
    config = alembic_config()
    directory = ScriptDirectory.from_config(config)
    proposed: list[MigrationScript] = []

    def look(_revision: object, context: Any) -> list[Any]:  # noqa: ANN401 (Alembic's own)
        proposed.append(produce_migrations(context, metadata))
        return []

    with (
        EnvironmentContext(config, directory, fn=look, dont_mutate=True),
        environment(DATABASE_URL=url),
    ):
        directory.run_env()
    [script] = proposed
    return script


STRANGERS = """
    CREATE TABLE public.flutter_owned (id uuid PRIMARY KEY, name text);
    CREATE INDEX flutter_by_name ON public.flutter_owned (name);
    CREATE SCHEMA auth;
    CREATE TABLE auth.users (id uuid PRIMARY KEY, email text UNIQUE);
    CREATE TABLE auth.mentor_pauses (id uuid PRIMARY KEY);
    CREATE TABLE outbox.foreign_notes (id int);
    CREATE VIEW public.shown AS SELECT id FROM public.flutter_owned;
"""


def test_strangers_tables_never_appear_in_autogenerate(url: str) -> None:
    """
    Nothing is proposed about them, in our schemas or in any other.
    """
    upgrade()
    execute(url, STRANGERS)

    assert autogenerated(url).upgrade_ops is not None
    assert autogenerated(url).upgrade_ops.is_empty()  # type: ignore[union-attr]
    command.check(alembic_config())


@pytest.mark.parametrize("path", ["auth, public", '"$user", public, extensions', "outbox, public"])
def test_autogenerate_does_not_depend_on_the_search_path(
    server_url: str, url: str, path: str
) -> None:
    """
    A role or database with a path of its own makes no table look new or strange.
    """
    upgrade()
    execute(url, STRANGERS)
    name = url.rsplit("/", maxsplit=1)[1].split("?", maxsplit=1)[0]
    with psycopg.connect(server_url, autocommit=True) as admin:
        admin.execute(
            sql.SQL("ALTER DATABASE {} SET search_path = {}").format(
                sql.Identifier(name), sql.SQL(path)
            )
        )

    command.check(alembic_config())


def test_a_real_change_of_our_own_table_is_noticed(url: str) -> None:
    """
    The allow-list hides strangers, not our own drift.
    """
    upgrade()
    execute(url, "ALTER TABLE public.portal_visibility ADD COLUMN surprise text")

    with pytest.raises(util.CommandError, match="surprise"):
        command.check(alembic_config())


# --------------------------------------------------------------------------- adoption

THEIRS = """
    CREATE TYPE public.status_of_theirs AS ENUM ('valid', 'expired', 'revoked');
    CREATE TABLE public.organizations (
        id uuid PRIMARY KEY, name varchar(200) NOT NULL, logo text);
    CREATE TABLE public.mentors (
        id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
        organization_id uuid NOT NULL,
        full_name varchar(200) NOT NULL,
        dynamics_id uuid,
        phone text UNIQUE);
    CREATE TABLE public.certifications (
        id uuid NOT NULL DEFAULT gen_random_uuid(),
        mentor_id uuid NOT NULL REFERENCES public.mentors (id) ON DELETE CASCADE,
        course text NOT NULL DEFAULT 'basic',
        expires_on date NOT NULL,
        status public.status_of_theirs NOT NULL DEFAULT 'valid',
        expired_at timestamptz,
        renewed_at timestamptz);
    CREATE UNIQUE INDEX certifications_id ON public.certifications (id);
    CREATE INDEX theirs_by_course ON public.certifications (course);
    COMMENT ON TABLE public.mentors IS 'The app''s mentors.';
    INSERT INTO public.organizations (id, name)
    VALUES ('00000000-0000-0000-0000-000000000001', 'HLF');
"""


SECURED_BY_THEM = """
    ALTER TABLE public.organizations ENABLE ROW LEVEL SECURITY;
    ALTER TABLE public.mentors ENABLE ROW LEVEL SECURITY;
    ALTER TABLE public.certifications ENABLE ROW LEVEL SECURITY;
"""
"""What the owner of adopted tables has switched on before we came."""


def theirs(url: str) -> dict[str, Any]:
    """
    What the database says about the adopted tables, contents included.
    """
    return {
        kind: {name: row for name, row in rows.items() if adopted(name)}
        for kind, rows in catalogue(url).items()
    } | {"rows": values(url, "SELECT name FROM public.organizations")}


def adopted(name: str) -> bool:
    """
    Whether a name in the catalogue belongs to one of the three tables.
    """
    return name.split(".")[1].startswith(
        ("organizations", "mentors", "certifications", "theirs_by_course")
    )


def test_existing_tables_are_adopted_as_they_are(url: str) -> None:
    """
    Extra columns, an enum for the status, another owner's names: all stay to the letter.
    """
    execute(url, THEIRS)
    before = theirs(url)

    upgrade()

    assert theirs(url) == before
    command.check(alembic_config())


def test_adopted_tables_survive_a_downgrade(url: str) -> None:
    """
    What we did not make we do not drop.
    """
    execute(url, THEIRS)
    before = theirs(url)

    upgrade()
    downgrade()

    assert theirs(url) == before
    assert values(url, TABLES) == [
        f"{SCHEMA}.alembic_version",
        "public.certifications",
        "public.mentors",
        "public.organizations",
    ]


def test_an_adopted_table_gets_no_row_level_security_from_us(url: str) -> None:
    """
    It would lock its owner's users out.
    """
    execute(url, THEIRS)

    upgrade()

    secured = values(
        url,
        "SELECT tablename FROM pg_tables WHERE rowsecurity AND schemaname = 'public'",
    )
    assert set(secured) == set(PUBLIC) - {table.name for table in ADOPTABLE}


def test_tables_that_are_missing_are_made_beside_those_that_are_there(url: str) -> None:
    """
    Mentors exist, the others do not: ours are made, theirs adopted, and only ours dropped.
    """
    execute(
        url,
        "CREATE TABLE public.mentors (id uuid PRIMARY KEY, organization_id uuid,"
        " full_name text, dynamics_id uuid)",
    )

    upgrade()
    marked = "SELECT relname FROM pg_class WHERE obj_description(oid, 'pg_class') = %s ORDER BY 1"
    assert values(url, marked, MARK) == ["certifications", "organizations"]

    downgrade()
    assert values(url, TABLES) == [f"{SCHEMA}.alembic_version", "public.mentors"]


def test_transitions_work_on_adopted_tables(url: str) -> None:
    """
    An enum compares with what we write, and pauses refer to their mentors.
    """
    execute(url, THEIRS)
    upgrade()
    execute(
        url,
        """
        INSERT INTO public.mentors (id, organization_id, full_name)
        VALUES ('00000000-0000-0000-0000-000000000002',
                '00000000-0000-0000-0000-000000000001', 'A mentor');
        INSERT INTO public.certifications (id, mentor_id, expires_on)
        VALUES ('00000000-0000-0000-0000-000000000003',
                '00000000-0000-0000-0000-000000000002', '2001-01-01');
        """,
    )
    run_expiry(url)

    assert values(url, "SELECT status FROM public.certifications") == ["expired"]
    assert values(url, "SELECT count(*) FROM public.mentor_pauses") == [1]
    assert values(url, "SELECT visible FROM public.portal_visibility") == [False]


def run_expiry(url: str) -> None:
    """
    The command, in a process of its own.
    """
    environ = os.environ | {
        "DATABASE_URL": url,
        "HLF_ORGANIZATION_ID": "00000000-0000-0000-0000-000000000001",
    }
    subprocess.run(
        [sys.executable, "-m", "worker", "expire"],
        cwd=ROOT,
        env=environ,
        check=True,
        capture_output=True,
    )


def test_an_adopted_certification_without_a_mentor_stops_nobody_else(url: str) -> None:
    """
    Their tables may lack a foreign key; the night goes on for everybody who exists.
    """
    execute(url, THEIRS.replace("REFERENCES public.mentors (id) ON DELETE CASCADE", ""))
    upgrade()
    execute(
        url,
        """
        INSERT INTO public.mentors (id, organization_id, full_name)
        VALUES ('00000000-0000-0000-0000-000000000002',
                '00000000-0000-0000-0000-000000000001', 'A mentor');
        INSERT INTO public.certifications (id, mentor_id, expires_on)
        VALUES ('00000000-0000-0000-0000-000000000003',
                '00000000-0000-0000-0000-000000000002', '2001-01-01'),
               ('00000000-0000-0000-0000-000000000004',
                '00000000-0000-0000-0000-00000000dead', '2001-01-01');
        """,
    )

    run_expiry(url)

    assert values(url, "SELECT visible FROM public.portal_visibility") == [False]


async def test_a_transition_of_a_certification_without_a_mentor_is_refused(url: str) -> None:
    """
    There is nobody to pause or to show, so nothing is changed.
    """
    execute(url, THEIRS.replace("REFERENCES public.mentors (id) ON DELETE CASCADE", ""))
    upgrade()
    execute(
        url,
        """
        INSERT INTO public.certifications (id, mentor_id, expires_on)
        VALUES ('00000000-0000-0000-0000-000000000004',
                '00000000-0000-0000-0000-00000000dead', '2001-01-01');
        """,
    )
    engine = connect(url, application_name="test")
    service = CertificationManagementService(engine, organization_id=UUID(ID), timezone="UTC")
    certification_id = UUID("00000000-0000-0000-0000-000000000004")

    with pytest.raises(UnknownMentorError, match="00000000dead"):
        await service.expire(certification_id)
    with pytest.raises(UnknownMentorError, match="00000000dead"):
        await service.renew(certification_id, date(2999, 1, 1))

    await engine.dispose()
    assert values(url, "SELECT status FROM public.certifications") == ["valid"]


def refused(url: str) -> str:
    """
    What an upgrade that cannot be says; nothing may have been made.
    """
    before = values(url, TABLES)
    with pytest.raises(util.CommandError) as refusal:
        upgrade()
    assert values(url, TABLES) == before
    return str(refusal.value)


def test_all_that_is_missing_is_listed_at_once(url: str) -> None:
    """
    Columns that are not there, of the wrong type, and a missing key: in one sentence.
    """
    execute(
        url,
        """
        CREATE TABLE public.mentors (id uuid, organization_id int, full_name text);
        CREATE TABLE public.certifications (
            id uuid PRIMARY KEY, mentor_id text, expires_on timestamp, status text,
            expired_at timestamp);
        """,
    )

    sentence = refused(url)

    assert sentence.startswith("The tables that are already there cannot be adopted. ")
    for problem in (
        "mentors.organization_id (uuid), which is integer",
        "mentors.dynamics_id (uuid)",
        "a primary key on mentors.id",
        "certifications.mentor_id (uuid), which is text",
        "certifications.expires_on (date), which is timestamp without time zone",
        "certifications.expired_at (timestamp with time zone), which is timestamp",
        "certifications.renewed_at (timestamp with time zone)",
    ):
        assert problem in sentence
    assert "full_name" not in sentence
    assert "certifications.status" not in sentence
    assert "primary key on certifications.id" not in sentence


@pytest.mark.parametrize(
    "key",
    [
        "",
        "CREATE INDEX plain ON public.organizations (id);",
        "CREATE UNIQUE INDEX partial ON public.organizations (id) WHERE name <> '';",
        "CREATE UNIQUE INDEX wide ON public.organizations (id, name);",
        "CREATE UNIQUE INDEX other ON public.organizations (name);",
    ],
)
def test_a_table_whose_id_may_repeat_is_not_adopted(url: str, key: str) -> None:
    """
    Only a unique id can be referred to.
    """
    execute(url, f"CREATE TABLE public.organizations (id uuid, name text); {key}")

    assert "a primary key on organizations.id" in refused(url)


def test_a_table_whose_key_is_checked_late_is_not_adopted(url: str) -> None:
    """
    No foreign key can refer to it, so it has to be listed like a missing one.
    """
    execute(
        url,
        "CREATE TABLE public.organizations"
        " (id uuid PRIMARY KEY DEFERRABLE INITIALLY DEFERRED, name text)",
    )

    assert "a primary key on organizations.id" in refused(url)


def test_a_status_that_cannot_be_expired_is_not_adopted(url: str) -> None:
    """
    An enum without our two words would fail the first night.
    """
    execute(url, THEIRS.replace("'valid', 'expired', 'revoked'", "'valid', 'lapsed'"))

    assert "certifications.status" in refused(url)


def test_an_upgrade_that_is_refused_leaves_not_even_a_schema_behind(url: str) -> None:
    """
    It says that nothing was changed, and that is so to the letter.
    """
    execute(url, "CREATE TABLE public.organizations (id int)")
    refused(url)

    assert values(url, "SELECT nspname FROM pg_namespace WHERE nspname = 'outbox'") == []


def test_a_view_is_not_adopted(url: str) -> None:
    """
    It has no key, whatever it selects.
    """
    execute(
        url,
        "CREATE VIEW public.organizations AS SELECT gen_random_uuid() AS id, text 'HLF' AS name",
    )

    assert "a primary key on organizations.id" in refused(url)


def test_tables_of_the_same_name_elsewhere_are_not_adopted(url: str) -> None:
    """
    Only `public` is looked at.
    """
    execute(url, "CREATE SCHEMA app; CREATE TABLE app.mentors (id int)")

    upgrade()

    assert "public.mentors" in values(url, TABLES)
    assert values(url, "SELECT count(*) FROM app.mentors") == [0]


def test_a_failed_upgrade_can_be_repeated_when_the_tables_are_mended(url: str) -> None:
    """
    The list is worked off, and the same command goes through.
    """
    execute(url, "CREATE TABLE public.organizations (id uuid PRIMARY KEY)")
    assert "organizations.name (character varying or text)" in refused(url)

    execute(url, "ALTER TABLE public.organizations ADD COLUMN name text")
    upgrade()

    command.check(alembic_config())


# ----------------------------------------------------------------------------- access


def test_every_table_of_ours_has_row_level_security(database_url: str) -> None:
    """
    Nothing is readable until a policy says so, also for the owner, and no policy says it to
    everybody.
    """
    open_ = values(
        database_url,
        "SELECT relname FROM pg_class WHERE relkind IN ('r', 'p')"
        " AND NOT (relrowsecurity AND relforcerowsecurity)"
        " AND relnamespace IN ('public'::regnamespace, 'outbox'::regnamespace)",
    )
    everybody = values(
        database_url, "SELECT policyname FROM pg_policies WHERE 'public' = ANY (roles)"
    )

    assert open_ == ["alembic_version"]
    assert everybody == []


def test_nothing_is_granted_to_everybody(database_url: str) -> None:
    """
    Neither a table in either schema, nor the use of `outbox`.
    """
    granted = values(
        database_url,
        "SELECT format('%s.%s', table_schema, table_name) FROM information_schema.table_privileges"
        " WHERE grantee = 'PUBLIC' AND table_schema IN ('public', 'outbox')".replace("%", "%%"),
    )
    usable = values(
        database_url,
        "SELECT privilege_type FROM pg_namespace, aclexplode(nspacl)"
        " WHERE nspname = 'outbox' AND grantee = 0",
    )

    assert granted == []
    assert usable == []


API_ROLES = ("anon", "authenticated", "service_role")


@pytest.fixture
def api_roles(server_url: str) -> Iterator[None]:
    """
    The roles of a hosted API; roles belong to the whole server, so one test at a time.
    """
    with psycopg.connect(server_url, autocommit=True) as admin:
        admin.execute("SELECT pg_advisory_lock(hashtext('roles of the API'))")
        there = {row[0] for row in admin.execute("SELECT rolname FROM pg_roles")}
        # Migrations make `authenticated` themselves, and databases come to depend on it.
        made = [role for role in API_ROLES if role not in there | {"authenticated"}]
        if "authenticated" not in there:
            admin.execute("CREATE ROLE authenticated NOLOGIN")
        for role in made:
            admin.execute(sql.SQL("CREATE ROLE {} NOLOGIN").format(sql.Identifier(role)))
        try:
            yield
        finally:
            for role in made:
                admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


@contextmanager
def database_of_the_api(server_url: str, statements: str) -> Iterator[str]:
    """
    A database that was prepared and then migrated; gone before its roles are.
    """
    with new_database(server_url) as url, environment(DATABASE_URL=url):
        execute(url, statements)
        upgrade()
        yield url


ALLOWED = """
SELECT role || ' may ' || privilege || ' ' || relname
  FROM unnest(%s::text[]) AS role,
       unnest('{SELECT,INSERT,UPDATE,DELETE,TRUNCATE,REFERENCES,TRIGGER}'::text[]) AS privilege,
       pg_class
 WHERE relkind IN ('r', 'p') AND relnamespace = %s::regnamespace
   AND has_table_privilege(role, pg_class.oid, privilege)
"""

PEOPLE = "authenticated may "

OPENED = [
    f"{PEOPLE}{privilege} {table}"
    for privilege, tables in {
        "INSERT": ["portal_visibility"],
        "SELECT": [
            *("certifications", "dynamics_sync_failures", "mentor_pauses", "mentors"),
            *("organizations", "portal_confirmations", "portal_visibility"),
        ],
        "UPDATE": ["portal_visibility"],
    }.items()
    for table in tables
]
"""What row-level security lets people read, and transitions write; single columns come besides."""

OPENED_IN_OUTBOX = [
    f"{PEOPLE}{privilege} {table}"
    for privilege, tables in {
        "INSERT": ["audit", "commits", "events", "idempotency"],
        "SELECT": ["audit", "events", "gates", "idempotency", "nightly_runs", "settled"],
        "UPDATE": ["events"],
    }.items()
    for table in tables
]

GRANTED_IN_PUBLIC = """
    GRANT USAGE ON SCHEMA public TO anon, authenticated, service_role;
    ALTER DEFAULT PRIVILEGES IN SCHEMA public
        GRANT ALL ON TABLES TO anon, authenticated, service_role;
    ALTER DEFAULT PRIVILEGES IN SCHEMA public
        GRANT ALL ON SEQUENCES TO anon, authenticated, service_role;
"""


@pytest.mark.usefixtures("api_roles")
def test_the_roles_of_the_api_get_what_policies_limit_although_defaults_grant_everything(
    server_url: str,
) -> None:
    """
    As on a hosted project: default privileges hand out all tables, and ours are taken back.
    What people get is theirs alone, row by row.
    """
    with database_of_the_api(server_url, GRANTED_IN_PUBLIC) as url:
        assert sorted(values(url, ALLOWED, list(API_ROLES), "public")) == OPENED
        assert sorted(values(url, ALLOWED, list(API_ROLES), SCHEMA)) == OPENED_IN_OUTBOX
        assert values(url, USABLE, list(API_ROLES)) == ["authenticated"]


USABLE = """
SELECT role FROM unnest(%s::text[]) AS role WHERE has_schema_privilege(role, 'outbox', 'USAGE')
"""


@pytest.mark.usefixtures("api_roles")
def test_the_outbox_is_closed_to_the_api_whatever_defaults_the_database_has(
    server_url: str,
) -> None:
    """
    Defaults for every schema open neither the outbox nor its tables.
    """
    everywhere = """
        ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO anon, authenticated, service_role;
        ALTER DEFAULT PRIVILEGES GRANT ALL ON SCHEMAS TO anon, authenticated, service_role;
    """
    with database_of_the_api(server_url, everywhere) as url:
        assert sorted(values(url, ALLOWED, list(API_ROLES), "public")) == OPENED
        assert not {"anon", "service_role"} & set(values(url, USABLE, list(API_ROLES)))
        assert sorted(values(url, ALLOWED, list(API_ROLES), SCHEMA)) == OPENED_IN_OUTBOX


@pytest.mark.usefixtures("api_roles")
def test_adopted_tables_keep_the_grants_of_their_owner(server_url: str) -> None:
    """
    The app that reads them goes on reading them.
    """
    grants = THEIRS + "GRANT SELECT ON public.mentors TO anon;"
    with database_of_the_api(server_url, grants) as url:
        adopted = ("organizations", "mentors", "certifications")
        ours = [line for line in OPENED if not line.endswith(adopted)]
        assert sorted(values(url, ALLOWED, list(API_ROLES), "public")) == [
            "anon may SELECT mentors",
            *ours,
        ]


# ------------------------------------------------------------- impossible rows

ID = "00000000-0000-0000-0000-00000000000a"
OTHER = "00000000-0000-0000-0000-00000000000b"

SOUND: dict[str, dict[str, object]] = {
    "public.organizations": {"id": ID, "name": "HLF"},
    "public.mentors": {"id": ID, "organization_id": ID, "full_name": "an operator"},
    "public.certifications": {"id": ID, "mentor_id": ID, "expires_on": "2026-11-24"},
    "public.mentor_pauses": {"id": ID, "mentor_id": ID, "reason": "manual"},
    "public.portal_visibility": {"mentor_id": ID, "organization_id": ID, "visible": False},
    "public.portal_confirmations": {
        "mentor_id": ID,
        "organization_id": ID,
        "visible": False,
        "version": 1,
    },
    "public.dynamics_sync_failures": {
        "id": ID,
        "organization_id": ID,
        "mentor_id": ID,
        "visible": False,
        "version": 1,
        "error_code": "timeout",
        "error_message": "No answer.",
        "retry_count": 0,
        "recoverable": True,
    },
    "public.cert_notification_log": {
        "mentor_id": ID,
        "threshold_days": 30,
        "cert_id": ID,
        "expires_on": "2026-11-24",
    },
    "outbox.events": {
        "destination": "dynamics",
        "key": ID,
        "organization_id": ID,
        "version": 1,
        "payload": "{}",
    },
    "outbox.settled": {
        "event_id": 1,
        "destination": "dynamics",
        "key": ID,
        "organization_id": ID,
        "version": 1,
        "payload": "{}",
        "outcome": "delivered",
        "attempts": 1,
        "created_at": "2026-11-24",
    },
    "outbox.gates": {
        "destination": "dynamics",
        "organization_id": ID,
        "closed_until": "2026-11-24",
        "reason": "outage",
        "closed_by": "a worker",
    },
    "outbox.doubts": {"destination": "dynamics", "key": ID, "version": 1, "until": "2026-11-24"},
    "outbox.nightly_runs": {"organization_id": ID},
    "outbox.audit": {
        "organization_id": ID,
        "subject": "somebody",
        "name": "Somebody",
        "action": "retry",
        "outcome": "started",
    },
    "outbox.web_sessions": {"token_hash": b"1", "claims": "{}", "expires_at": "2026-11-24"},
    "outbox.idempotency": {
        "organization_id": ID,
        "subject": "somebody",
        "key": "once",
        "request_hash": b"1",
        "answer": "{}",
    },
}
"""One possible row for each table, in an order that foreign keys accept."""

CLAIMED: dict[str, object] = {
    "claim_token": ID,
    "claimed_by": ID,
    "claimed_version": 1,
    "attempts": 1,
    "first_attempt_at": "2026-11-24",
}

# Which constraint refuses what: the sound row, changed so.
IMPOSSIBLE: list[tuple[str, str, dict[str, object]]] = [
    ("public.mentors", "mentors_organization_id_fkey", {"id": OTHER, "organization_id": OTHER}),
    ("public.certifications", "certifications_mentor_id_fkey", {"id": OTHER, "mentor_id": OTHER}),
    ("public.certifications", "certifications_status_known", {"id": OTHER, "status": "unknown"}),
    (
        "public.certifications",
        "certifications_expired_with_a_time",
        {"id": OTHER, "status": "expired"},
    ),
    (
        "public.certifications",
        "certifications_expired_with_a_time",
        {"id": OTHER, "expired_at": "2026-11-24"},
    ),
    ("public.mentor_pauses", "mentor_pauses_mentor_id_fkey", {"id": OTHER, "mentor_id": OTHER}),
    ("public.mentor_pauses", "mentor_pauses_reason_known", {"id": OTHER, "reason": "holiday"}),
    (
        "public.mentor_pauses",
        "mentor_pauses_automatic_with_its_certification",
        {"id": OTHER, "reason": "certification_expired"},
    ),
    (
        "public.mentor_pauses",
        "mentor_pauses_automatic_with_its_certification",
        {"id": OTHER, "certification_id": ID},
    ),
    (
        "public.mentor_pauses",
        "mentor_pauses_resumed_after_paused",
        {"id": OTHER, "paused_at": "2026-11-24", "resumed_at": "2026-11-23"},
    ),
    ("public.mentor_pauses", "mentor_pauses_one_open", {"id": OTHER}),
    ("public.portal_visibility", "portal_visibility_mentor_id_fkey", {"mentor_id": OTHER}),
    (
        "public.portal_visibility",
        "portal_visibility_version_positive",
        {"mentor_id": OTHER, "version": 0},
    ),
    (
        "public.portal_confirmations",
        "portal_confirmations_version_positive",
        {"mentor_id": OTHER, "version": 0},
    ),
    (
        "public.dynamics_sync_failures",
        "dynamics_sync_failures_version_positive",
        {"id": OTHER, "mentor_id": OTHER, "version": 0},
    ),
    (
        "public.dynamics_sync_failures",
        "dynamics_sync_failures_retry_count_not_negative",
        {"id": OTHER, "mentor_id": OTHER, "retry_count": -1},
    ),
    (
        "public.dynamics_sync_failures",
        "dynamics_sync_failures_resolution_known",
        {"id": OTHER, "resolved_at": "2026-11-24", "resolution": "forgotten"},
    ),
    (
        "public.dynamics_sync_failures",
        "dynamics_sync_failures_resolved_wholly_or_not_at_all",
        {"id": OTHER, "resolved_at": "2026-11-24"},
    ),
    (
        "public.dynamics_sync_failures",
        "dynamics_sync_failures_resolved_wholly_or_not_at_all",
        {"id": OTHER, "mentor_id": OTHER, "resolution": "manual"},
    ),
    (
        "public.dynamics_sync_failures",
        "dynamics_sync_failures_resolved_wholly_or_not_at_all",
        {"id": OTHER, "mentor_id": OTHER, "resolved_by": "an operator"},
    ),
    ("public.dynamics_sync_failures", "dynamics_sync_failures_one_open", {"id": OTHER}),
    ("public.cert_notification_log", "cert_notification_log_once_per_threshold", {}),
    (
        "public.cert_notification_log",
        "cert_notification_log_threshold_positive",
        {"threshold_days": 0},
    ),
    ("outbox.events", "events_one_live_per_key", {}),
    ("outbox.events", "events_version_positive", {"key": OTHER, "version": 0}),
    ("outbox.events", "events_attempts_not_negative", {"key": OTHER, "attempts": -1}),
    ("outbox.events", "events_replaced_not_negative", {"key": OTHER, "replaced": -1}),
    (
        "outbox.events",
        "events_claimed_wholly_or_not_at_all",
        {"key": OTHER, **CLAIMED, "claimed_by": None},
    ),
    (
        "outbox.events",
        "events_claimed_wholly_or_not_at_all",
        {"key": OTHER, **CLAIMED, "claimed_version": None},
    ),
    ("outbox.events", "events_claimed_wholly_or_not_at_all", {"key": OTHER, "claimed_by": ID}),
    (
        "outbox.events",
        "events_claimed_no_future_version",
        {"key": OTHER, **CLAIMED, "claimed_version": 2},
    ),
    (
        "outbox.events",
        "events_claim_counts_as_attempt",
        {"key": OTHER, **CLAIMED, "attempts": 0},
    ),
    (
        "outbox.events",
        "events_claim_counts_as_attempt",
        {"key": OTHER, **CLAIMED, "first_attempt_at": None},
    ),
    ("outbox.events", "events_portal_key_is_a_mentor", {"key": "nobody"}),
    ("outbox.events", "events_portal_key_is_a_mentor", {"key": OTHER.upper()}),
    ("outbox.settled", "settled_outcome_known", {"outcome": "lost"}),
    ("outbox.gates", "gates_reason_known", {"organization_id": OTHER, "reason": "weather"}),
    ("outbox.gates", "gates_trips_not_negative", {"organization_id": OTHER, "trips": -1}),
    ("public.organizations", "organizations_pkey", {}),
    ("public.mentors", "mentors_pkey", {}),
    ("public.certifications", "certifications_pkey", {}),
    ("public.mentor_pauses", "mentor_pauses_pkey", {"resumed_at": "infinity"}),
    ("public.portal_visibility", "portal_visibility_pkey", {}),
    ("public.portal_confirmations", "portal_confirmations_pkey", {}),
    ("public.dynamics_sync_failures", "dynamics_sync_failures_pkey", {"mentor_id": OTHER}),
    ("outbox.gates", "gates_pkey", {}),
    ("outbox.doubts", "doubts_pkey", {}),
    (
        "outbox.nightly_runs",
        "nightly_runs_finished_wholly_or_not_at_all",
        {"finished_at": "2026-11-24", "ok": True},
    ),
    ("outbox.audit", "audit_action_known", {"action": "look"}),
    ("outbox.web_sessions", "web_sessions_pkey", {}),
    ("outbox.idempotency", "idempotency_pkey", {}),
]


@pytest.fixture
def rows(engine: object, database_url: str) -> Iterator[psycopg.Connection]:
    """
    A connection on which every table has one possible row; nothing is committed.
    """
    with psycopg.connect(database_url) as connection:
        for table, row in SOUND.items():
            insert(connection, table, row)
        yield connection
        connection.rollback()


def insert(connection: psycopg.Connection, table: str, row: Mapping[str, object]) -> None:
    """
    One row.
    """
    connection.execute(
        sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(
            sql.Identifier(*table.split(".")),
            sql.SQL(", ").join(map(sql.Identifier, row)),
            sql.SQL(", ").join(sql.Placeholder() * len(row)),
        ),
        list(row.values()),
    )


@pytest.mark.parametrize(
    ("table", "constraint", "change"),
    [pytest.param(*one, id=f"{one[1]}-{number}") for number, one in enumerate(IMPOSSIBLE)],
)
def test_an_impossible_row_is_refused_by_the_database(
    rows: psycopg.Connection, table: str, constraint: str, change: dict[str, object]
) -> None:
    """
    Whatever the code does, such a row cannot be.
    """
    with pytest.raises(IntegrityError) as refusal:
        insert(rows, table, SOUND[table] | change)

    assert refusal.value.diag.constraint_name == constraint


def test_every_named_constraint_is_shown_to_refuse_something() -> None:
    """
    The list above leaves out only keys that a database draws by itself.
    """
    named: set[object] = set()
    for table in metadata.tables.values():
        named |= {one.name for one in table.constraints} | {
            index.name for index in table.indexes if index.unique
        }

    assert named - {constraint for _, constraint, _ in IMPOSSIBLE} - {None} == {
        "audit_pkey",
        "commits_pkey",
        "events_pkey",
        "nightly_runs_pkey",
        "settled_pkey",
    }


def test_every_check_of_the_models_has_a_name() -> None:
    """
    An error that names its constraint can be understood, and a migration can drop it.
    """
    nameless = [
        str(constraint.sqltext)
        for table in metadata.tables.values()
        for constraint in table.constraints
        if isinstance(constraint, CheckConstraint) and constraint.name is None
    ]

    assert nameless == []


def test_what_may_be_is_accepted(rows: psycopg.Connection) -> None:
    """
    A closed pause beside an open one, a resolved failure beside an open one, a claimed event.
    """
    closed = {"paused_at": "2026-11-23", "resumed_at": "2026-11-24"}
    insert(rows, "public.mentor_pauses", SOUND["public.mentor_pauses"] | closed | {"id": OTHER})
    resolved = {"id": OTHER, "resolved_at": "2026-11-24", "resolution": "manual"}
    insert(
        rows,
        "public.dynamics_sync_failures",
        SOUND["public.dynamics_sync_failures"] | resolved | {"resolved_by": "an operator"},
    )
    insert(rows, "outbox.events", SOUND["outbox.events"] | CLAIMED | {"key": OTHER})


# --------------------------------------------------------------------- the environment


def alembic(*arguments: str, url: str | None) -> subprocess.CompletedProcess[str]:
    """
    The command line, as somebody types it.
    """
    environ = {name: value for name, value in os.environ.items() if "DATABASE_URL" not in name}
    if url is not None:
        environ["DATABASE_URL"] = url
    return subprocess.run(
        [sys.executable, "-m", "alembic", *arguments],
        cwd=ROOT,
        env=environ,
        check=False,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        (None, "DATABASE_URL is not set; set it, or DATABASE_URL_FILE"),
        ("", "DATABASE_URL is not set"),
        ("mysql://anna:geheim@db/hlf", "DATABASE_URL: write it like postgresql://"),
    ],
)
def test_an_address_that_is_missing_or_wrong_is_a_sentence(url: str | None, sentence: str) -> None:
    """
    No trace, no password, and an exit code that stops a deployment.
    """
    done = alembic("upgrade", "head", url=url)

    assert done.returncode != 0
    assert sentence in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "geheim" not in done.stdout + done.stderr


async def test_a_database_that_is_starting_is_not_told_as_one_that_is_not_there() -> None:
    """
    After a restart a migration may come too early; its address is right.
    """
    async with turning_away("57P03", "the database system is starting up") as url:
        done = await asyncio.to_thread(alembic, "upgrade", "head", url=url)

    assert done.returncode != 0
    assert "is starting, stopping or recovering" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_printing_the_statements_is_refused_with_a_reason(url: str) -> None:
    """
    Which tables exist is seen in the database, so there is nothing to print without one.
    """
    done = alembic("upgrade", "head", "--sql", url=url)

    assert done.returncode != 0
    assert "--sql is not supported" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
