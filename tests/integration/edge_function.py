"""
The Edge Function, run by Deno as Supabase would run it, on a free port of loopback.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import shutil
import subprocess
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import ROOT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

FUNCTION = ROOT / "supabase" / "functions" / "hlf-dynamics-sync"
RUNTIME = Path(__file__).with_name("deno")
LOCK = RUNTIME / "package-lock.json"
INSTALLED = RUNTIME / "node_modules" / ".package-lock.json"
INSTALL_SECONDS = 100.0
START_SECONDS = 20.0
TOLD_CHARACTERS = 300

KEY = "canary-1d7b-edge-key-of-32-characters"
"""Of every function that tests start."""


@dataclass(frozen=True, kw_only=True)
class RunningFunction:
    """
    A function that answers.

    Args:
        lines: all that it has written so far.
    """

    url: str
    lines: list[str]


@cache
def missing() -> str | None:
    """
    Why there is no Deno, or None; it is installed if need be, by one process at a time.
    """
    if not (shutil.which("node") and shutil.which("npm")):
        return "Node with npm is not installed, which brings Deno."
    with (RUNTIME / "package.json").open(encoding="utf-8") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        if INSTALLED.exists() and INSTALLED.stat().st_mtime >= LOCK.stat().st_mtime:
            return None
        return _install()


def _install() -> str | None:
    try:
        ended = subprocess.run(
            ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"],  # noqa: S607
            cwd=RUNTIME,
            capture_output=True,
            text=True,
            timeout=INSTALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"Deno could not be had: npm ci took longer than {INSTALL_SECONDS:g} s."
    if ended.returncode:
        return f"Deno could not be had: npm ci failed: {ended.stderr.strip()[-TOLD_CHARACTERS:]}"
    return None


def deno(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """
    Run a command of Deno in the function's folder; the test is skipped where there is no Deno.
    """
    return subprocess.run(
        [_program(), *arguments],
        cwd=FUNCTION,
        env=_environment({}),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _program() -> str:
    if why := missing():
        pytest.skip(why)
    return str(next(RUNTIME.glob("node_modules/@deno/*/deno*")))


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return {
        **kept,
        "DENO_DIR": str(RUNTIME / "node_modules" / ".deno"),
        "DENO_NO_UPDATE_CHECK": "1",
        "NO_COLOR": "1",
        **more,
    }


@asynccontextmanager
async def running(settings: Mapping[str, str]) -> AsyncIterator[RunningFunction]:
    """
    The function with these settings, in a process of its own.
    """
    process = await asyncio.create_subprocess_exec(
        _program(),
        *("run", "--no-prompt", "--no-remote", "--no-npm", "--allow-env"),
        *("--allow-net=127.0.0.1,localhost", "index.ts"),
        cwd=FUNCTION,
        env=_environment({"DENO_SERVE_ADDRESS": "tcp:127.0.0.1:0", **settings}),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    lines: list[str] = []
    try:
        async with asyncio.timeout(START_SECONDS):
            url = await _address(process, lines)
        listening = asyncio.create_task(_listen(process, lines))
        yield RunningFunction(url=url, lines=lines)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
    await listening


async def _address(process: asyncio.subprocess.Process, lines: list[str]) -> str:
    """
    What Deno says first.
    """
    assert process.stdout is not None
    while line := (await process.stdout.readline()).decode():
        lines.append(line)
        if found := re.search(r"Listening on (http://127\.0\.0\.1:\d+)/", line):
            return f"{found.group(1)}/hlf-dynamics-sync"
    raise AssertionError("The function did not start: " + "".join(lines))


async def _listen(process: asyncio.subprocess.Process, lines: list[str]) -> None:
    assert process.stdout is not None
    while line := (await process.stdout.readline()).decode():
        lines.append(line)
