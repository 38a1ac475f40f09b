"""
PgBouncer in transaction mode before a PostgreSQL: what hosted databases put before theirs.

Debian's 1.18 knows no prepared statements of clients, which makes it the harder test.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import tempfile
import time
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy.engine import make_url

from tests.chaos.server import free_port, owner

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

START_SECONDS = 20.0

SETTINGS = {
    "listen_addr": "127.0.0.1",
    "unix_socket_dir": "",
    # Whoever comes is the user of the address that was given.
    "auth_type": "any",
    "pool_mode": "transaction",
    "max_client_conn": "200",
    "ignore_startup_parameters": "extra_float_digits,options",
    # It would leave a server that was down alone for 15 s.
    "server_login_retry": "1",
    "log_connections": "0",
    "log_disconnections": "0",
    "log_stats": "0",
}


def _found() -> Path | None:
    found = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    return Path(found) if found else None


PGBOUNCER = _found()
"""None where it is not installed."""


@asynccontextmanager
async def pooled(url: str, *, servers: int = 3, **settings: str) -> AsyncIterator[str]:
    """
    The address of the same database through PgBouncer, until the block ends.

    Args:
        servers: connections it has to PostgreSQL, at most.
        settings: of the pooler, in place of `SETTINGS`.
    """
    assert PGBOUNCER is not None, "PgBouncer is not installed."
    known = {key: str(value) for key, value in conninfo_to_dict(url).items()}
    port = free_port()
    through = make_url(url).set(host="127.0.0.1", port=port, query={})
    address = through.render_as_string(hide_password=False)
    with tempfile.TemporaryDirectory(prefix="hlf-chaos-pooler-") as folder:
        ini, log = Path(folder) / "pgbouncer.ini", Path(folder) / "log"
        ini.write_text(_ini(known, port=port, servers=servers, settings=SETTINGS | settings))
        process = await _start(ini, log, _owner(known))
        try:
            await _answers(address, process, log)
            yield address
        finally:
            with suppress(ProcessLookupError):
                process.terminate()
            await process.wait()


async def _start(settings: Path, log: Path, owner: pwd.struct_passwd) -> asyncio.subprocess.Process:
    assert PGBOUNCER is not None
    for path in (settings.parent, settings):
        os.chown(path, owner.pw_uid, owner.pw_gid)
    with log.open("w") as output:
        return await asyncio.create_subprocess_exec(
            PGBOUNCER,
            settings,
            cwd="/tmp",  # noqa: S108 (any folder that the owner may enter)
            user=owner.pw_uid,
            group=owner.pw_gid,
            extra_groups=None if os.getuid() else [],
            stdout=asyncio.subprocess.DEVNULL,
            stderr=output,
        )


def _ini(known: Mapping[str, str], *, port: int, servers: int, settings: Mapping[str, str]) -> str:
    database = {
        "host": known["host"],
        "port": known.get("port", "5432"),
        "user": known.get("user", "postgres"),
        "password": known.get("password", ""),
        "pool_size": str(servers),
    }
    words = [f"{name}={_quoted(value)}" for name, value in database.items() if value]
    lines = [f"{name} = {value}" for name, value in settings.items()]
    return "\n".join(
        ["[databases]", f"* = {' '.join(words)}", "[pgbouncer]", f"listen_port = {port}", *lines]
    )


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _owner(known: Mapping[str, str]) -> pwd.struct_passwd:
    """
    Who runs it: it refuses root, and has to get at the server's socket if that is one.
    """
    if not os.getuid() and known["host"].startswith("/"):
        return pwd.getpwuid(Path(known["host"]).stat().st_uid)
    return owner()


async def _answers(url: str, process: asyncio.subprocess.Process, log: Path) -> None:
    """
    Wait until it lets somebody through to PostgreSQL.
    """
    ends_at = time.monotonic() + START_SECONDS
    while not await _lets_through(url):
        if process.returncode is not None or time.monotonic() > ends_at:
            said = await asyncio.to_thread(log.read_text)
            raise AssertionError(f"PgBouncer did not start.\n{said}")
        await asyncio.sleep(0.02)


async def _lets_through(url: str) -> bool:
    try:
        connection = await psycopg.AsyncConnection.connect(url, connect_timeout=5)
        await connection.execute("SELECT 1")
    except psycopg.Error:
        return False
    await connection.close()
    return True
