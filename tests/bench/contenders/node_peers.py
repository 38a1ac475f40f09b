"""
The peers in Node: their commands. What these run is in the folder `node`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg

from tests.bench.processes import ProcessFailedError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import LiteralString

FOLDER = Path(__file__).with_name("node")
LOCK = FOLDER / "package-lock.json"
INSTALLED = FOLDER / "node_modules" / ".package-lock.json"

OLDEST_NODE = (20, 18)
"""Here undici begins; the others ask for 22, but run."""

INSTALL_SECONDS = 120.0
FILL_SECONDS = 60.0

TOLD_CHARACTERS = 300
"""Of what a failed process printed at last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePeer:
    """
    One package in one configuration.

    Args:
        script: plays all its roles.
        not_done: the statement that counts what is not durably done.
    """

    name: str
    script: str
    not_done: LiteralString

    def missing(self) -> str | None:
        """
        No Node, too old a Node, or no packages.
        """
        return missing()

    def prepare(self, database_url: str) -> None:
        """
        By its own means.
        """
        self._run(database_url, "prepare")

    def fill(self, database_url: str, keys: Sequence[str]) -> None:
        """
        By its own means for many at once.
        """
        self._run(database_url, "fill", stdin="\n".join(keys))
        with closing(psycopg.connect(database_url, autocommit=True)) as connection:
            connection.execute("ANALYZE")

    def left(self, database_url: str) -> int:
        """
        What its own tables say.
        """
        with closing(psycopg.connect(database_url)) as connection:
            [count] = connection.execute(self.not_done).fetchone() or [0]
        return int(count)

    def worker(self, *, concurrency: int) -> list[str]:
        """
        Its own worker.
        """
        return self._command("work", concurrency)

    def producer(self, *, clients: int, seconds: float, slice_seconds: float) -> list[str]:
        """
        Its way to enqueue in a transaction that is open.
        """
        return self._command("produce", clients, seconds, slice_seconds)

    def ticker(self, *, per_second: float, seconds: float) -> list[str]:
        """
        The same; each of them notifies its worker by itself.
        """
        return self._command("tick", per_second, seconds)

    def _command(self, role: str, *arguments: object) -> list[str]:
        return ["node", str(FOLDER / self.script), self.name, role, *map(str, arguments)]

    def _run(self, database_url: str, role: str, *, stdin: str = "") -> None:
        ended = _ended(
            self._command(role),
            seconds=FILL_SECONDS,
            stdin=stdin,
            environment={"BENCH_DATABASE_URL": database_url},
        )
        if ended.returncode:
            raise ProcessFailedError(f"{role} ended with {ended.returncode}: {_said(ended)}")


GRAPHILE_WORKER_LEFT: LiteralString = "SELECT count(*) FROM graphile_worker._private_jobs"
PG_BOSS_LEFT: LiteralString = "SELECT count(*) FROM pgboss.job WHERE state < 'completed'"

CONTENDERS = (
    NodePeer(name="graphile-worker", script="graphile_worker.js", not_done=GRAPHILE_WORKER_LEFT),
    NodePeer(
        name="graphile-worker:tuned", script="graphile_worker.js", not_done=GRAPHILE_WORKER_LEFT
    ),
    NodePeer(name="pg-boss", script="pg_boss.js", not_done=PG_BOSS_LEFT),
)


@cache
def missing() -> str | None:
    """
    Why there is no Node to run them, or None; the packages are installed if need be.
    """
    if not (shutil.which("node") and shutil.which("npm")):
        return "Node with npm is not installed."
    version = _ended(["node", "--version"]).stdout
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_NODE:
        return f"Node {version.strip()} is too old: {'.'.join(map(str, OLDEST_NODE))} is needed."
    if INSTALLED.exists() and INSTALLED.stat().st_mtime >= LOCK.stat().st_mtime:
        return None
    return _install()


def _install() -> str | None:
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    try:
        ended = _ended(command, seconds=INSTALL_SECONDS)
    except subprocess.TimeoutExpired:
        return f"npm ci took longer than {INSTALL_SECONDS:g} s."
    return f"npm ci failed: {_said(ended)}" if ended.returncode else None


def _ended(
    command: Sequence[str],
    *,
    seconds: float = 10.0,
    stdin: str = "",
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=FOLDER,
        env=os.environ | (environment or {}),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def _said(ended: subprocess.CompletedProcess[str]) -> str:
    return ended.stderr.strip()[-TOLD_CHARACTERS:]
