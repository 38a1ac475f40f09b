"""
`python -m tests.chaos`: break everything, at each push for minutes, or in full.

Each bout is a process of its own with a seed of its own, a few at a time. What it printed when
it went wrong, and the command that replays it, are in the report.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.chaos import processes
from tests.chaos.report import Outcome, Report, machine, write
from tests.chaos.scenarios.bout import Bout, Result
from tests.chaos.suite import SUITE, Scenario, find

LANES = 3
FULL_SECONDS, PUSH_SECONDS = 1800.0, 480.0
"""No bout takes longer, or it hangs."""

END_SECONDS = 60.0
"""In which a bout that was interrupted ends its processes."""

NAMES = click.Choice([scenario.name for scenario in SUITE])


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """
    A bout to run.

    Args:
        seconds: after which it is taken to hang.
    """

    scenario: Scenario
    seed: int
    count: int
    seconds: float

    @property
    def command(self) -> str:
        """
        What runs this bout again.
        """
        return (
            f".venv/bin/python -m tests.chaos bout {self.scenario.name}"
            f" --seed {self.seed} --count {self.count}"
        )


@click.group(invoke_without_command=True)
@click.option("--full", is_flag=True, help="An hour of it, not minutes.")
@click.option("--seed", type=int, help="Of the first bout; a new one each time if not given.")
@click.option("--only", type=NAMES, multiple=True, help="These scenarios alone.")
@click.option("--lanes", type=click.IntRange(1, 16), default=LANES, help="Bouts at a time.")
@click.option("--postgres", type=click.Path(path_type=Path), help="Folder of its binaries.")
@click.option("--report", type=click.Path(path_type=Path), default=Path("chaos-report"))
@click.pass_context
def cli(
    context: click.Context,
    *,
    full: bool,
    seed: int | None,
    only: tuple[str, ...],
    lanes: int,
    postgres: Path | None,
    report: Path,
) -> None:
    """
    Break everything and see that nothing is lost.
    """
    if context.invoked_subcommand:
        return
    seed = secrets.randbelow(1 << 20) if seed is None else seed
    orders = [
        Order(
            scenario=scenario,
            seed=one_seed,
            count=count,
            seconds=FULL_SECONDS if full else PUSH_SECONDS,
        )
        for scenario in SUITE
        if not only or scenario.name in only
        for one_seed, count in scenario.bouts(full=full, seed=seed)
    ]
    on = machine(postgres)  # asked first: somebody may commit meanwhile
    outcomes = asyncio.run(_run(orders, lanes=lanes, postgres=postgres))
    written = Report(full=full, seed=seed, machine=on, outcomes=outcomes)
    write(written, report)
    Console().print(written.summary(), highlight=False)
    failed = sum(bool(one.result.violations) for one in outcomes)
    skipped = sum(bool(one.result.skipped) for one in outcomes)
    again = [
        ".venv/bin/python -m tests.chaos",
        *(f"--only {name}" for name in only),
        f"--seed {seed}",
    ]
    click.echo(f"The report is in {report}/. Once more: {' '.join(again)}{' --full' * full}")
    click.echo(f"{len(outcomes) - failed - skipped} passed, {failed} failed, {skipped} skipped")
    sys.exit(bool(failed))


@cli.command()
@click.argument("name", type=NAMES)
@click.option("--seed", type=int, required=True)
@click.option("--count", type=click.IntRange(min=1), required=True)
@click.option("--postgres", type=click.Path(path_type=Path), help="Folder of its binaries.")
@click.option("--result", type=click.Path(path_type=Path), help="File for the result, as JSON.")
def bout(name: str, seed: int, count: int, postgres: Path | None, result: Path | None) -> None:
    """
    Run one bout, or run it again.
    """
    processes.preload()
    done = 0

    def advance(number: int) -> None:
        nonlocal done
        done += number
        if number:
            click.echo(done)

    order = Bout(seed=seed, count=count, advance=advance, binaries=postgres)
    came_to = _without_raising(find(name), order)
    document = json.dumps(asdict(came_to), indent=2, default=str)
    if result:
        result.write_text(document)
    else:
        click.echo(document)
    sys.exit(bool(came_to.violations))


def _without_raising(scenario: Scenario, order: Bout) -> Result:
    try:
        return asyncio.run(scenario.run(order))
    except Exception as error:  # noqa: BLE001 (whatever it is, the report has to show it)
        traceback.print_exc()
        result = Result()
        result.violate("it comes to its end", f"{type(error).__name__}: {error}"[:2000])
        return result


async def _run(orders: list[Order], *, lanes: int, postgres: Path | None) -> list[Outcome]:
    outcomes: list[Outcome] = []
    waiting = list(orders)
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        everything = progress.add_task("all bouts", total=len(orders))

        async def lane() -> None:
            while waiting:
                order = waiting.pop(0)
                line = progress.add_task(order.scenario.what, total=order.count)
                outcome = await _run_one(
                    order, postgres, lambda done, line=line: progress.update(line, completed=done)
                )
                progress.remove_task(line)
                progress.advance(everything)
                outcomes.append(outcome)
                console.print(outcome.line(), highlight=False)

        async with asyncio.TaskGroup() as group:
            for _ in range(lanes):
                group.create_task(lane())
    return outcomes


async def _run_one(order: Order, postgres: Path | None, told: object) -> Outcome:
    assert callable(told)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hlf-chaos-result-") as folder:
        file = Path(folder) / "result.json"
        arguments = [*order.command.split()[1:], "--result", str(file)]
        if postgres:
            arguments += ["--postgres", str(postgres)]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            stdout=asyncio.subprocess.PIPE,
            stderr=(Path(folder) / "stderr").open("wb"),
        )
        assert process.stdout is not None
        try:
            async with asyncio.timeout(order.seconds):
                async for text in process.stdout:
                    with suppress(ValueError):
                        told(int(text))
                await process.wait()
        except TimeoutError:
            await _end(process)
        result = _read(file)
        said = (Path(folder) / "stderr").read_text(errors="replace")
    return Outcome(
        scenario=order.scenario.name,
        what=order.scenario.what,
        seed=order.seed,
        count=order.count,
        seconds=time.monotonic() - began,
        replay=order.command,
        result=result,
        said=said[-4000:] if result.violations else "",
    )


async def _end(process: asyncio.subprocess.Process) -> None:
    """
    Interrupt a bout, so that it ends what it has started; kill it if it does not.
    """
    process.send_signal(signal.SIGINT)
    try:
        async with asyncio.timeout(END_SECONDS):
            await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()


def _read(file: Path) -> Result:
    if file.exists():
        return Result(**json.loads(file.read_text()))
    result = Result()
    result.violate("it comes to its end", "the bout ended without a result, or hung")
    return result


if __name__ == "__main__":
    cli()
