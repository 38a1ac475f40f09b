"""
A server that is shaped like a Supabase project, and databases on it.

The shape: `postgres` makes roles and sees past policies, but is no superuser; `anon`,
`authenticated` and `service_role` are there, and `authenticator` becomes each of them; schema
`auth` reads the claims; `supabase_realtime` publishes single tables. Projects differ in one thing:
those of before the end of October 2026 may grant every new table of `public` to the API.

`SUPABASE_DB_URL`, the direct address of a project's `postgres`, puts that server in its place.
Nothing that is in the project is touched: the tests make databases of their own there, and take
back the roles that they made.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import psycopg
import pytest
from alembic import command
from alembic.util import CommandError
from psycopg import sql
from sqlalchemy.engine import make_url

from tests.bench.postgres import DEBIAN
from tests.chaos.server import embedded_binaries, free_port, owner
from tests.conftest import alembic_config, environment, new_database
from worker.doctor.rights import ROLES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

HOSTED = "SUPABASE_DB_URL"

SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "wal_level": "logical",
    "fsync": "off",
    "shared_buffers": "32MB",
    "jit": "off",
}

Variant = Literal["grants by default", "no grants by default"]

PLATFORM = """
    CREATE ROLE postgres LOGIN CREATEROLE CREATEDB REPLICATION BYPASSRLS;
    CREATE ROLE anon NOLOGIN NOINHERIT;
    CREATE ROLE authenticated NOLOGIN NOINHERIT;
    CREATE ROLE service_role NOLOGIN NOINHERIT BYPASSRLS;
    CREATE ROLE authenticator LOGIN NOINHERIT;
    CREATE ROLE supabase_auth_admin NOLOGIN NOINHERIT CREATEROLE;
    GRANT anon, authenticated, service_role TO authenticator;
    GRANT anon, authenticated, service_role TO postgres WITH ADMIN OPTION;
    CREATE ROLE hlf_without_roles LOGIN IN ROLE authenticated;
"""
"""Made by `supabase_admin`, the superuser, whom nobody else gets to be."""

SHAPE = """
    CREATE SCHEMA auth;
    CREATE FUNCTION auth.jwt() RETURNS jsonb LANGUAGE sql STABLE
        RETURN CAST(nullif(current_setting('request.jwt.claims', true), '') AS jsonb);
    CREATE FUNCTION auth.uid() RETURNS uuid LANGUAGE sql STABLE
        RETURN CAST(auth.jwt() ->> 'sub' AS uuid);
    GRANT USAGE ON SCHEMA auth, public TO anon, authenticated, service_role;
    CREATE PUBLICATION supabase_realtime;
"""

BY_DEFAULT: dict[Variant, str] = {
    "grants by default": """
        ALTER DEFAULT PRIVILEGES IN SCHEMA public
            GRANT ALL ON TABLES TO anon, authenticated, service_role;
        ALTER DEFAULT PRIVILEGES IN SCHEMA public
            GRANT ALL ON FUNCTIONS TO anon, authenticated, service_role;
        ALTER DEFAULT PRIVILEGES IN SCHEMA public
            GRANT ALL ON SEQUENCES TO anon, authenticated, service_role;
    """,
    "no grants by default": "",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    """
    A migrated database.

    Args:
        url: as `postgres`, who migrated it.
        logins: by role of ours, the address of a login that is a member of it.
    """

    url: str
    logins: dict[str, str]

    @contextmanager
    def request(self, role: str, claims: str = "") -> Iterator[psycopg.Connection]:
        """
        A transaction as the API makes one for each request; nothing is committed.
        """
        with psycopg.connect(self.url) as connection:
            connection.execute(
                "SELECT set_config('role', %s, true), set_config('request.jwt.claims', %s, true)",
                [role, claims],
            )
            yield connection
            connection.rollback()


@dataclass(slots=True, kw_only=True)
class Platform:
    """
    The server.

    Args:
        url: as `postgres`.
        refusal: what a user who may not make roles was told by the migrations, and the schemas
            that were left behind; None where it could not be tried.
    """

    url: str
    refusal: tuple[str, Sequence[str]] | None = None
    _logins: dict[str, tuple[str, str]] = field(default_factory=dict)

    def login(self, role: str) -> tuple[str, str]:
        """
        Name and password of a login that is a member of this role.
        """
        if role not in self._logins:
            name, password = f"{role}_{secrets.token_hex(4)}", secrets.token_hex(16)
            self.execute(
                "CREATE ROLE {} LOGIN PASSWORD {} IN ROLE {}",
                *(sql.Identifier(name), sql.Literal(password), sql.Identifier(role)),
            )
            self._logins[role] = name, password
        return self._logins[role]

    @contextmanager
    def project(self, variant: Variant) -> Iterator[Project]:
        """
        A database in this shape, migrated by `postgres`.
        """
        with new_database(self.url) as url, environment(DATABASE_URL=url):
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute((SHAPE + BY_DEFAULT[variant]).encode())
            command.upgrade(alembic_config(), "head")
            yield Project(url=url, logins={role: self._address(url, role) for role in ROLES})

    def _address(self, url: str, role: str) -> str:
        name, password = self.login(role)
        own = make_url(url).set(username=name, password=password)
        return own.render_as_string(hide_password=False)

    def try_without_roles(self) -> None:
        """
        Migrate as somebody who may take `authenticated` and make a schema, but no roles.
        """
        with new_database(self.url) as url:
            name = sql.Identifier(str(make_url(url).database))
            self.execute("GRANT CREATE ON DATABASE {} TO hlf_without_roles", name)
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute("GRANT CREATE ON SCHEMA public TO hlf_without_roles")
            theirs = make_url(url).set(username="hlf_without_roles")
            with (
                environment(DATABASE_URL=theirs.render_as_string(hide_password=False)),
                pytest.raises(CommandError) as refused,
            ):
                command.upgrade(alembic_config(), "head")
            with psycopg.connect(url) as connection:
                left = connection.execute("SELECT nspname FROM pg_namespace").fetchall()
            self.refusal = str(refused.value), [name for (name,) in left]

    def take_back(self, before: set[str]) -> None:
        """
        Drop the logins, and the roles that were not there before.
        """
        made = [name for name, _ in self._logins.values()]
        for role in [*made, *sorted(ROLES.keys() - before)]:
            self.execute("DROP ROLE IF EXISTS {}", sql.Identifier(role))

    def roles(self) -> set[str]:
        """
        Those of the whole server.
        """
        with psycopg.connect(self.url) as connection:
            return {name for (name,) in connection.execute("SELECT rolname FROM pg_roles")}

    def execute(self, statement: str, *names: sql.Composable) -> None:
        """
        Run one statement.
        """
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(sql.SQL(statement).format(*names))


@contextmanager
def platform(server_url: str) -> Iterator[Platform]:
    """
    The hosted one, if it is named; else a server of our own, of the same release as the tests'.
    """
    if url := os.environ.get(HOSTED):
        hosted = Platform(url=url)
        before = hosted.roles()
        try:
            yield hosted
        finally:
            hosted.take_back(before)
        return
    with _server(_binaries(server_url)) as url:
        with psycopg.connect(url, autocommit=True) as admin:
            admin.execute(PLATFORM)
        own = Platform(
            url=make_url(url).set(username="postgres").render_as_string(hide_password=False)
        )
        own.try_without_roles()
        yield own


def _binaries(server_url: str) -> Path:
    with psycopg.connect(server_url) as connection:
        version = connection.info.server_version // 10_000
    debian = version == 15 and (DEBIAN / "initdb").exists()
    return DEBIAN if debian else embedded_binaries()


@contextmanager
def _server(binaries: Path) -> Iterator[str]:
    """
    A server with nothing in it, whose superuser is `supabase_admin`.
    """
    port = free_port()
    settings = " ".join(f"-c {name}='{value}'" for name, value in SETTINGS.items())
    with tempfile.TemporaryDirectory(prefix="hlf-supabase-") as folder:
        if not os.getuid():
            os.chown(folder, owner().pw_uid, owner().pw_gid)
        data = f"{folder}/data"
        control = [str(binaries / "pg_ctl"), "-D", data, "-w", "-s"]
        _run(
            binaries / "initdb",
            "-D",
            data,
            "-N",
            "-U",
            "supabase_admin",
            "--auth=trust",
            "--encoding=UTF8",
            "--no-locale",
        )
        _run(*control, "-l", f"{folder}/log", "-o", f"-p {port} {settings}", "start")
        try:
            yield f"postgresql://supabase_admin@127.0.0.1:{port}/postgres"
        finally:
            _run(*control, "-m", "immediate", "stop")


def _run(*arguments: str | Path) -> None:
    subprocess.run(
        arguments,
        check=True,
        cwd="/tmp",  # noqa: S108 (any folder that the owner may enter)
        user=None if os.getuid() else owner().pw_uid,
        group=None if os.getuid() else owner().pw_gid,
        extra_groups=None if os.getuid() else [],
        stdout=subprocess.DEVNULL,
    )
