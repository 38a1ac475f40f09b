"""
Processes: whose CPU is counted, what is heard of them, and that none stays behind.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.bench.processes import ProcessFailedError, cpu_seconds, running
from tests.conftest import until

BURN = "import time\nwhile time.process_time() < 0.2: pass\n"


def python(code: str) -> list[str]:
    """
    The command that runs it.
    """
    return [sys.executable, "-c", code]


async def test_cpu_of_a_child_that_ended_counts() -> None:
    """
    A backend that came and went in between was work all the same.
    """
    code = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BURN!r}])\ninput()"
    async with running(["sh", "-c", '"$0" -c "$1"; sleep 60', sys.executable, code]) as process:
        await until(lambda: cpu_seconds(process.pid) >= 0.2)


def test_cpu_of_strangers_does_not_count() -> None:
    """
    A number that no process has stands for nobody.
    """
    assert cpu_seconds(-1) == 0


async def test_nothing_that_a_process_started_stays_behind() -> None:
    """
    Children go with it, also those that do not hear a SIGTERM.
    """
    deaf = "(trap '' TERM; exec sleep 600) >/dev/null & echo $!; wait"
    async with running(["sh", "-c", deaf]) as process:
        child = int(await process.first_line())

    await until(lambda: _is_gone(child))


def test_its_folder_goes_with_it() -> None:
    """
    Whatever a process puts among temporary files.
    """

    async def folder_and_file() -> list[str]:
        touch = 'touch "$TMPDIR/file"; echo "$TMPDIR"; ls "$TMPDIR"'
        async with running(["sh", "-c", touch]) as process:
            return (await process.everything()).split()

    folder, file = asyncio.run(folder_and_file())

    assert file == "file"
    assert not Path(folder).exists()


async def test_a_process_that_fails_says_why() -> None:
    """
    Its code, and the end of what it printed on stderr.
    """
    async with running(["sh", "-c", "echo no such setting >&2; exit 78"]) as process:
        with pytest.raises(ProcessFailedError, match=r"ended with 78: no such setting"):
            await process.everything()


async def test_what_decides_about_the_product_is_not_passed_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    A developer's own settings must not decide a measurement.
    """
    monkeypatch.setenv("HLF_SYNC_BATCH", "7")
    monkeypatch.setenv("DATABASE_URL", "postgresql://somewhere")

    async with running(["env"], {"BENCH_API_URL": "http://127.0.0.1:1"}) as process:
        variables = (await process.everything()).splitlines()

    names = {line.partition("=")[0] for line in variables}
    assert names.isdisjoint({"HLF_SYNC_BATCH", "DATABASE_URL"})
    assert "BENCH_API_URL" in names


def _is_gone(pid: int) -> bool:
    """
    Ended, whether somebody has asked after it or not.
    """
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True
