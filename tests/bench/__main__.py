"""
`python -m tests.bench`: everything side by side with its peers and its limits, in one run.
"""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.bench import postgres
from tests.bench.contenders import all_contenders
from tests.bench.far_side import open_far_side
from tests.bench.measure import Ground, Scale
from tests.bench.report import Report, machine, write
from tests.bench.suite import all_measures, run

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tests.bench.contender import Contender
    from tests.bench.measure import Measure
    from tests.bench.report import Taken

EXIT_INTERRUPTED = 130

COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
)


@click.command()
@click.option("--only", "measures", multiple=True, metavar="MEASURE", help="These alone.")
@click.option("--contenders", multiple=True, metavar="NAME", help="These alone.")
@click.option("--rounds", type=click.IntRange(1, 99), help="5, or 1 if quick.")
@click.option("--quick", is_flag=True, help="Minutes: to see that all of it works.")
@click.option("--report", type=click.Path(path_type=Path), default=Path("bench-report"))
@click.pass_context
def cli(
    context: click.Context,
    *,
    measures: tuple[str, ...],
    contenders: tuple[str, ...],
    rounds: int | None,
    quick: bool,
    report: Path,
) -> None:
    """
    Measure, compare with peers and limits, and write a report.
    """
    scale = Scale.short(rounds=rounds or 1) if quick else Scale.full(rounds=rounds or 5)
    chosen_measures = _chosen(all_measures(), measures, "--only")
    present, absent = all_contenders()
    chosen = _chosen(present, contenders, "--contenders")
    written = asyncio.run(_run(chosen_measures, chosen, scale, absent))
    write(written, report)
    Console(width=200).print(written.summary(), highlight=False, markup=False)
    click.echo(f"The report is in {report}/.")
    if written.ended_early:
        context.exit(EXIT_INTERRUPTED)


Named = TypeVar("Named", "Measure", "Contender")


def _chosen(everything: list[Named], names: tuple[str, ...], option: str) -> list[Named]:
    known = [one.name for one in everything]
    if unknown := [name for name in names if name not in known]:
        raise click.UsageError(f"{option} {unknown[0]}: choose from {', '.join(known)}.")
    return [one for one in everything if not names or one.name in names]


async def _run(
    measures: Sequence[Measure],
    contenders: Sequence[Contender],
    scale: Scale,
    absent: Mapping[str, str],
) -> Report:
    on = machine(postgres.binaries())  # asked first: somebody may commit meanwhile
    taken: list[Taken] = []
    ended_early = False
    _stop_at_the_first_signal()
    try:
        await _take(measures, contenders, scale, taken)
    except asyncio.CancelledError:
        ended_early = True
    return Report(machine=on, scale=scale, taken=taken, absent=absent, ended_early=ended_early)


def _stop_at_the_first_signal() -> None:
    """
    Later ones would disturb the cleaning up.
    """
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if not task.cancelling():
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)


async def _take(
    measures: Sequence[Measure],
    contenders: Sequence[Contender],
    scale: Scale,
    taken: list[Taken],
) -> None:
    console = Console(stderr=True)
    with Progress(*COLUMNS, console=console, disable=not console.is_terminal) as progress:
        line = progress.add_task("")

        def advance(done: str) -> None:
            progress.update(line, advance=1, description=done)

        def complain(what: str) -> None:
            console.print(what, highlight=False, markup=False)

        async with postgres.running() as databases, open_far_side() as far_side:
            ground = Ground(
                databases=databases,
                far_side=far_side,
                contenders=contenders,
                scale=scale,
                advance=advance,
                complain=complain,
            )
            progress.update(line, total=sum(one.turns(ground) for one in measures))
            async for one in run(ground, measures):
                taken.append(one)  # noqa: PERF401 (what is taken stays if the rest is not)


if __name__ == "__main__":
    cli()
