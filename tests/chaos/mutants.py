"""
Mutants: the product broken on purpose, one way at a time, to see whether the tests notice.

    copy of the tree ── control: every named test passes on it
            │
            └── for each mutant: break the copy ── its test ── mend the copy
                     failed  ──► caught
                     else    ──► alive, and why

A mutant is caught only if the very test named beside it fails: not by a test that cannot be
collected, nor by a run that does not end. The product itself is never touched.

    python -m tests.chaos.mutants [NAME ...]
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import deque
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree  # noqa: ICN001 (its own name)

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from tests import conftest
from tests.chaos.mutants_model import Mutant, Verdict, broken
from tests.chaos.mutants_of_outbox import MUTANTS_OF_OUTBOX
from tests.chaos.mutants_of_people import MUTANTS_OF_PEOPLE
from tests.chaos.mutants_of_worker import MUTANTS_OF_WORKER

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence

MUTANTS: tuple[Mutant, ...] = (*MUTANTS_OF_OUTBOX, *MUTANTS_OF_WORKER, *MUTANTS_OF_PEOPLE)

LANES = 2
"""Mutants tried at once, each in a copy of its own."""

TRY_SECONDS = 60.0
"""How long one run of pytest may take; a mutant that takes longer is not caught."""

CONTROL_SECONDS = 300.0
"""How long half of all named tests may take on the unbroken copy."""

PYTEST = (
    *(sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=line"),
    *("-p", "no:randomly", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:hypothesispytest"),
)
"""Plug-ins that are not needed are left out: starting them takes as long as the test."""

SOME_FAILED = 1
"""Exit code of pytest; others mean that it could not run the tests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    """
    A tree with tests.

    Args:
        parts: files and folders to copy, from the root.
        packages: of the parts, those that must be imported from the copy.
    """

    root: Path
    parts: Sequence[str]
    packages: Sequence[str]


PRODUCT = Project(
    root=conftest.ROOT,
    parts=(
        *("outbox", "worker", "alembic", "alembic.ini", "supabase", "tests"),
        *("pyproject.toml", "README.md"),
    ),
    packages=("outbox", "worker", "tests"),
)


class UnknownMutantError(Exception):
    """
    There is no mutant of this name.
    """


class WrongCopyError(Exception):
    """
    Python imports the project from elsewhere, so nothing would be mutated.
    """


def find(names: Sequence[str]) -> list[Mutant]:
    """
    The mutants of these names, or all.

    Raises:
        UnknownMutantError: one of them is none.
    """
    known = {mutant.name: mutant for mutant in MUTANTS}
    if unknown := set(names) - set(known):
        raise UnknownMutantError(f"There is no mutant {', '.join(sorted(unknown))}.")
    return [known[name] for name in names or known]


async def hunt(
    server_url: str, *, names: Sequence[str] = (), advance: Callable[[Verdict], None]
) -> list[Verdict]:
    """
    Try these mutants, or all.

    Args:
        server_url: of a PostgreSQL where databases can be made.
        advance: told each verdict when it is known.

    Returns:
        The verdicts, in the order of the mutants.

    Raises:
        UnknownMutantError: one of the names is none.
        StaleMutantError: a mutant does not fit the source any more.
    """
    return await hunt_in(PRODUCT, find(names), server_url, advance=advance)


async def hunt_in(
    project: Project,
    mutants: Sequence[Mutant],
    server_url: str,
    *,
    advance: Callable[[Verdict], None],
) -> list[Verdict]:
    """
    The same for any project.
    """
    for mutant in mutants:
        broken(mutant, project.root)
    verdicts: dict[str, Verdict] = {}
    waiting = deque(mutants)

    async def work(copy: Copy) -> None:
        while waiting:
            verdict = await _judge(copy, waiting.popleft(), sound)
            verdicts[verdict.name] = verdict
            advance(verdict)

    with tempfile.TemporaryDirectory(prefix="hlf-sync-mutants-") as folder:
        copies = [Copy(project, Path(folder) / f"lane-{n}", server_url) for n in range(LANES)]
        sound = await _control(copies, mutants)
        async with asyncio.TaskGroup() as lanes:
            for copy in copies:
                lanes.create_task(work(copy))
    return [verdicts[mutant.name] for mutant in mutants]


async def _control(copies: Sequence[Copy], mutants: Sequence[Mutant]) -> set[str]:
    """
    Which of the named tests pass as long as nothing is broken.
    """
    tests = sorted({mutant.caught_by for mutant in mutants})
    shares = [tests[n :: len(copies)] for n in range(len(copies))]
    for copy in copies:
        await copy.check_imports()
    async with asyncio.TaskGroup() as lanes:
        runs = [
            lanes.create_task(copy.run(share, seconds=CONTROL_SECONDS))
            for copy, share in zip(copies, shares, strict=True)
            if share
        ]
    return {test for run in runs for test in run.result().passed}


async def _judge(copy: Copy, mutant: Mutant, sound: set[str]) -> Verdict:
    started = time.monotonic()
    if mutant.caught_by in sound:
        with copy.broken_by(mutant):
            run = await copy.run([mutant.caught_by], "-x", seconds=TRY_SECONDS)
        caught, detail = _caught(run, mutant.caught_by)
    else:
        caught, detail = False, "its test does not pass on the unbroken product either"
    return Verdict(
        name=mutant.name,
        what=mutant.what,
        invariant=mutant.invariant,
        caught=caught,
        by=mutant.caught_by,
        seconds=round(time.monotonic() - started, 2),
        detail=detail,
    )


def _caught(run: Run, test: str) -> tuple[bool, str]:
    """
    Whether the mutant was caught, and how the test failed, or why it did not.
    """
    if run.code is None:
        return False, f"its test did not end within {TRY_SECONDS:.0f} s"
    if not run.code:
        return False, "survived: its test passes"
    if run.code == SOME_FAILED and test in run.failed:
        return True, run.failed[test]
    return False, f"its test could not be run (pytest exited with {run.code}): {run.last_line}"


# ---------------------------------------------------------------------------------- copies


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """
    What a run of pytest came to.

    Args:
        code: exit code, or None if it did not end in time.
        passed: ids of tests.
        failed: how, by id of the test; with several parameters, one failure is enough.
        last_line: of what it printed.
    """

    code: int | None
    passed: Sequence[str] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    last_line: str = ""


class Copy:
    """
    A copy of a project that may be broken.
    """

    def __init__(self, project: Project, root: Path, server_url: str) -> None:
        self.root = root
        self._packages = project.packages
        self._report = root.with_suffix(".xml")
        self._environment = _environment(root, server_url)
        root.mkdir()
        for part in project.parts:
            _copy(project.root / part, root / part)

    @contextmanager
    def broken_by(self, mutant: Mutant) -> Iterator[None]:
        """
        Break the copy for a while.
        """
        sources = broken(mutant, self.root)
        whole = {path: path.read_text(encoding="utf-8") for path in sources}
        try:
            for path, source in sources.items():
                path.write_text(source, encoding="utf-8")
            yield
        finally:
            for path, source in whole.items():
                path.write_text(source, encoding="utf-8")

    async def check_imports(self) -> None:
        """
        See to it that Python imports the copy, although the original is installed.

        Raises:
            WrongCopyError: it does not.
        """
        looking = (
            "import importlib.util, sys;"
            "[print(importlib.util.find_spec(name).origin) for name in sys.argv[1:]]"
        )
        async with self._started(sys.executable, "-c", looking, *self._packages) as process:
            output, _ = await process.communicate()
        found = output.decode().splitlines()
        expected = [str(self.root / name / "__init__.py") for name in self._packages]
        if found != expected:
            raise WrongCopyError(f"Expected {expected}, but imported {found}.")

    async def run(self, tests: Sequence[str], *options: str, seconds: float) -> Run:
        """
        Run these tests on the copy as it is.
        """
        self._report.unlink(missing_ok=True)
        command = (*PYTEST, f"--junit-xml={self._report}", *options, *tests)
        async with self._started(*command) as process:
            try:
                async with asyncio.timeout(seconds):
                    output, _ = await process.communicate()
            except TimeoutError:
                return Run(code=None)
        passed, failed = _read(self._report, tests)
        lines = output.decode(errors="replace").splitlines() or [""]
        return Run(code=process.returncode, passed=passed, failed=failed, last_line=lines[-1])

    @asynccontextmanager
    async def _started(self, *command: str) -> AsyncIterator[asyncio.subprocess.Process]:
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=self.root,  # from where workers that a test starts import, too
            env=self._environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):  # all that it started is in its group
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


def _environment(root: Path, server_url: str) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HLF_", "PYTEST_", "PYTHON"))
    }
    return kept | {
        "PYTHONPATH": str(root),
        # A mutant of the same size, made within the same second, has the same cache entry.
        "PYTHONDONTWRITEBYTECODE": "1",
        "TEST_DATABASE_URL": server_url,
    }


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


def _read(report: Path, tests: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """
    Which of these tests passed and how others failed; what broke off did neither.
    """
    passed, failed = [], {}
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []  # noqa: S314 (our own file)
    for test in tests:
        ours = [case for case in cases if _is_of(case, test)]
        if failures := [failure for case in ours for failure in case.iter("failure")]:
            failed[test] = failures[0].get("message", "").partition("\n")[0]
        elif ours and not any({"error", "skipped"} & {part.tag for part in case} for case in ours):
            passed.append(test)
    return passed, failed


def _is_of(case: ElementTree.Element, test: str) -> bool:
    """
    Whether this is the test, or the test with one of its parameters.
    """
    file, _, name = test.partition("::")
    module = file.removesuffix(".py").replace("/", ".")
    return (case.get("classname"), case.get("name", "").partition("[")[0]) == (module, name)


# ----------------------------------------------------------------------------- command line


@contextmanager
def _server() -> Iterator[str]:
    """
    One PostgreSQL for everything: `TEST_DATABASE_URL`, else the embedded one.
    """
    if url := os.environ.get("TEST_DATABASE_URL"):
        yield url
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "XDG_RUNTIME_DIR is not set")
            with conftest._embedded() as url:
                yield url


def _hunt_with_a_bar(console: Console, names: Sequence[str]) -> list[Verdict]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    mutants = find(names)
    with (
        _server() as url,
        Progress(
            *columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal
        ) as bar,
    ):
        task = bar.add_task("control", total=len(mutants))

        def advance(verdict: Verdict) -> None:
            bar.update(task, advance=1, description=verdict.name)

        return asyncio.run(hunt(url, names=names, advance=advance))


def table_of(verdicts: Sequence[Verdict]) -> Table:
    """
    The verdicts, for a terminal.
    """
    table = Table(title="Mutants")
    table.add_column("mutant", no_wrap=True)
    table.add_column("invariant")
    table.add_column("caught by", overflow="fold")
    table.add_column("seconds", justify="right")
    for verdict in verdicts:
        by = Text(verdict.by.split("::")[-1])
        if not verdict.caught:
            by = Text(f"ALIVE: {verdict.detail} ({by})", style="bold red")
        table.add_row(verdict.name, verdict.invariant, by, f"{verdict.seconds:.1f}")
    return table


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME ...]")
def main(names: tuple[str, ...]) -> None:
    """
    Break the product in each of these ways, or in all, and see whether the tests notice.
    """
    console = Console()
    try:
        started = time.monotonic()
        verdicts = _hunt_with_a_bar(console, names)
    except UnknownMutantError as error:
        raise click.UsageError(str(error)) from None
    caught = sum(verdict.caught for verdict in verdicts)
    console.print(table_of(verdicts))
    console.print(f"{caught} of {len(verdicts)} caught in {time.monotonic() - started:.0f} s.")
    sys.exit(caught != len(verdicts))


if __name__ == "__main__":
    main()
