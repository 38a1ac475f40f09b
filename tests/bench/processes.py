"""
Processes of contenders: started, heard out, ended; and what CPU they and their children used.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from typing import IO

ROOT = Path(__file__).resolve().parents[2]

STOP_SECONDS = 10.0
"""For a process to end by itself after SIGTERM."""

TOLD_CHARACTERS = 300
"""Of what a failed process printed at last."""

TICKS = os.sysconf("SC_CLK_TCK")


class ProcessFailedError(Exception):
    """
    A contender's process did not do what it was started for.
    """


class Process:
    """
    A process that was started, in a session of its own: a Ctrl+C reaches it through us only.
    """

    def __init__(self, handle: asyncio.subprocess.Process, said: IO[bytes]) -> None:
        self._handle = handle
        self._said = said

    @property
    def pid(self) -> int:
        """
        While it runs, and afterwards.
        """
        return self._handle.pid

    @property
    def said(self) -> str:
        """
        The end of what it printed on stderr.
        """
        self._said.seek(0)
        return self._said.read().decode(errors="replace").strip()[-TOLD_CHARACTERS:]

    def must_run(self) -> None:
        """
        Raises:
            ProcessFailedError: it has ended.
        """
        if self._handle.returncode is not None:
            raise ProcessFailedError(f"It ended with {self._handle.returncode}: {self.said}")

    async def first_line(self) -> str:
        """
        What it prints first on stdout.

        Raises:
            ProcessFailedError: it ended instead.
        """
        assert self._handle.stdout is not None
        line = await self._handle.stdout.readline()
        if not line:
            await self._handle.wait()
            self.must_run()
        return line.decode()

    async def everything(self) -> str:
        """
        What it prints on stdout until it ends well.

        Raises:
            ProcessFailedError: it ended badly.
        """
        printed, _ = await self._handle.communicate()
        if self._handle.returncode:
            self.must_run()
        return printed.decode()

    async def stop(self) -> None:
        """
        End it, and whatever it has started.
        """
        if self._handle.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGTERM)
            with suppress(TimeoutError):
                async with asyncio.timeout(STOP_SECONDS):
                    await self._handle.wait()
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        # To its end, or the pipe stays open until somebody collects it.
        await self._handle.communicate()


@asynccontextmanager
async def running(
    command: Sequence[str], environment: Mapping[str, str] | None = None, *, quiet: bool = False
) -> AsyncIterator[Process]:
    """
    A process, until the block ends.

    Args:
        environment: beside ours, of which nothing that decides about the product is passed on.
        quiet: what it prints on stdout is of no interest.
    """
    with tempfile.TemporaryFile() as said, tempfile.TemporaryDirectory() as folder:
        handle = await asyncio.create_subprocess_exec(
            *command,
            cwd=ROOT,
            env=_neutral() | {"TMPDIR": folder} | dict(environment or {}),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL if quiet else asyncio.subprocess.PIPE,
            stderr=said,
            limit=1 << 26,
            start_new_session=True,
        )
        process = Process(handle, said)
        try:
            yield process
        finally:
            await process.stop()


def python(module: str, *arguments: object) -> list[str]:
    """
    The command that runs a module by this interpreter.
    """
    return [sys.executable, "-m", module, *map(str, arguments)]


def _neutral() -> dict[str, str]:
    ours = ("HLF_", "DATABASE_URL", "LISTEN_DATABASE_URL", "PG")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def cpu_seconds(*roots: int) -> float:
    """
    What these processes and all below them have used, those included that ended meanwhile.
    """
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it may have ended since it was listed
            fields = path.read_text().rpartition(")")[2].split()
            pid = int(path.parent.name)
            parents[pid] = int(fields[1])
            ticks[pid] = sum(map(int, fields[11:15]))  # its own, and its reaped children's
    return sum(ticks[pid] for pid in ticks if _is_below(pid, roots, parents)) / TICKS


def _is_below(pid: int, roots: Sequence[int], parents: Mapping[int, int]) -> bool:
    while pid not in roots:
        if pid not in parents:
            return False
        pid = parents[pid]
    return True
