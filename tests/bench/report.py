"""
The report of a run, in Markdown for people and in JSON for whatever comes later.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.goals import Judgement, judge

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from tests.bench.goals import Comparison
    from tests.bench.measure import Figure, Measure, Scale

PACKAGES = (
    "aiohttp",
    "httpx",
    "psycopg",
    "SQLAlchemy",
    "uvloop",
    "procrastinate",
    "pgqueuer",
    "asyncpg",
    "faststream-outbox",
)
NODE_PACKAGES = Path(__file__).with_name("contenders") / "node" / "package.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """
    What one measure came to.

    Args:
        failed: why it came to nothing, or ended early.
    """

    name: str
    question: str
    figures: Sequence[Figure]
    judgements: Sequence[Judgement]
    seconds: float
    failed: str = ""

    @classmethod
    def of(
        cls, measure: Measure, figures: Sequence[Figure], *, seconds: float, failed: str = ""
    ) -> Taken:
        """
        Figures, judged by the measure's own goals.
        """
        return cls(
            name=measure.name,
            question=measure.question,
            figures=figures,
            judgements=[judge(goal, figures) for goal in measure.goals],
            seconds=seconds,
            failed=failed,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """
    Everything about one run.

    Args:
        absent: contenders and measures that did not take part, and why.
        ended_early: somebody stopped the run.
    """

    machine: Mapping[str, str]
    scale: Scale
    taken: Sequence[Taken]
    absent: Mapping[str, str]
    ended_early: bool = False

    def summary(self) -> str:
        """
        The whole report in Markdown.
        """
        lines = [
            "# Speed and cost, side by side",
            "",
            *(f"- {name}: {value}" for name, value in self.machine.items()),
            f"- rounds: {self.scale.rounds}, contenders in turn inside each"
            + ("; a quick run, whose figures are not worth much" * self.scale.quick)
            + ("; ENDED EARLY" * self.ended_early),
            "",
            "A ratio is the median, over the rounds, of two figures of the same round.",
            "",
            *self._goals(),
            *self._absent(),
        ]
        for one in self.taken:
            lines += _figures(one)
        return "\n".join(lines)

    def _goals(self) -> Iterator[str]:
        judgements = [judgement for one in self.taken for judgement in one.judgements]
        if judgements:
            yield "| goal | measured | compared with | ratio | |"
            yield "|---|---:|---:|---:|---|"
            yield from (_goal_line(one) for one in judgements)
            yield ""

    def _absent(self) -> Iterator[str]:
        yield from (f"- {name} did not take part: {why}" for name, why in self.absent.items())
        yield from (f"- {one.name}: {one.failed}" for one in self.taken if one.failed)
        for one in self.taken:
            failures = {(figure.what, figure.who): figure.failed for figure in one.figures}
            for (what, who), why in failures.items():
                if why:
                    yield f"- failed, {what}: {who}: {_one_line(why)}"
        yield ""


def _goal_line(judgement: Judgement) -> str:
    if judgement.measured is None:
        return f"| {judgement.sentence} | | | | not measured: {_one_line(judgement.why)} |"
    compared = "; ".join(_against(one) for one in judgement.compared)
    ratios = "; ".join(f"{one.ratio:.2f}" for one in judgement.compared)
    measured = f"{number(judgement.measured)} {judgement.unit}"
    return f"| {judgement.sentence} | {measured} | {compared} | {ratios} | {judgement.verdict} |"


def _against(comparison: Comparison) -> str:
    """
    A fixed value is not called anything.
    """
    value = number(comparison.value)
    fixed = comparison.against.startswith(value)
    return comparison.against if fixed else f"{comparison.against}: {value}"


def _figures(taken: Taken) -> Iterator[str]:
    yield f"## {taken.question}"
    yield ""
    yield f"`--only {taken.name}`, {taken.seconds:.0f} s"
    yield ""
    for what in dict.fromkeys(one.what for one in taken.figures):
        yield from _table(what, [one for one in taken.figures if one.what == what])


def _table(what: str, figures: Sequence[Figure]) -> Iterator[str]:
    """
    One setting: a line for each contender, a median for each unit, and all rounds behind them.
    """
    units = [unit for unit in dict.fromkeys(one.unit for one in figures) if unit]
    yield f"| {what} | {' | '.join(f'{unit} | rounds' for unit in units)} |"
    yield "|---|" + "---:|---|" * len(units)
    for who in dict.fromkeys(one.who for one in figures):
        mine = {one.unit: one for one in figures if one.who == who}
        nothing = "failed" if any(one.failed for one in mine.values()) else ""
        cells = [cell for unit in units for cell in _cells(mine.get(unit), nothing)]
        yield f"| {who} | {' | '.join(cells)} |"
    yield ""


def _cells(figure: Figure | None, nothing: str) -> tuple[str, str]:
    if figure is None or figure.median is None:
        return nothing, ""
    rounds = ", ".join("–" if one is None else number(one) for one in figure.rounds)
    return number(figure.median), rounds


def number(value: float) -> str:
    """
    Three digits that matter; thousands in full.
    """
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "¦")


def write(report: Report, folder: Path) -> None:
    """
    Write `report.md` and `report.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(report.summary() + "\n")
    document = json.dumps(asdict(report), indent=2, default=str)
    (folder / "report.json").write_text(document + "\n")


def machine(postgres: Path) -> dict[str, str]:
    """
    When, what and on what.

    Args:
        postgres: folder of its binaries.
    """
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _said("git", "rev-parse", "--short", "HEAD")
        + (" with changes" if _said("git", "status", "--porcelain") != "unknown" else ""),
        "machine": f"{os.cpu_count()} cores, {_memory()}, {platform.system()} {platform.machine()}",
        "load before": f"{os.getloadavg()[0]:.1f}",
        "PostgreSQL": f"{_said(str(postgres / 'postgres'), '--version')}, fsync and"
        " synchronous_commit on",
        "Python": platform.python_version(),
        "Node": _said("node", "--version"),
        "packages": ", ".join(f"{name} {version}" for name, version in versions(PACKAGES)),
        "Node packages": ", ".join(f"{name} {version}" for name, version in _node_packages()),
    }


def versions(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """
    Of those that are installed.
    """
    for name in names:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue


def _node_packages() -> Iterator[tuple[str, str]]:
    """
    What they are locked to.
    """
    if NODE_PACKAGES.exists():
        yield from json.loads(NODE_PACKAGES.read_text())["dependencies"].items()


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "none"
    return done.stdout.strip() or "unknown"


def _memory() -> str:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{pages / (1 << 30):.0f} GiB"
