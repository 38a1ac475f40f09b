"""
The report of a run, in Markdown for people and in JSON for whatever comes later.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections import defaultdict
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tests.chaos.checker import NO_SURPRISE
from tests.chaos.invariants import INVARIANTS
from tests.chaos.scenarios.bout import Result, percentile
from tests.chaos.server import embedded_binaries

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

CHECKED_TOO = {
    "S1 (COMMIT)": "what a caller was told is saved is, and what failed is not",
    "S22": "no secret in a log or a row",
    "L1": "after the faults everything ends in time",
    NO_SURPRISE: "no error, no trace, no warning that was nobody's plan",
}
ELSEWHERE: Mapping[str, str] = {
    "S11": "no transaction is open during a request: test_held.py, and its mutant",
    "S13": "a late writer does not win for good: the scenario `late`, and S12 everywhere",
    "S14": "hide before show: the schedules",
    "S17": "a retry by two people is one send: tests/integration/test_coordinator.py",
    "S18": "several night runs, at once or killed, equal one: `nightly`",
    "S19": "only the database's clock counts: the scenario `clock`",
    "S20": "two releases work side by side: tests/acceptance/test_upgrades.py",
    "S21": "one organisation's credentials stay with it: test_dynamics_isolation.py",
    "L2": "a dead worker's claims are taken over within 2 s of their lease: `cold`",
    "L4": "what kills its workers delays nobody else: `poison`",
    "L5": "working again within 5 s of PostgreSQL's return: `restarts`",
    "L6": "SIGTERM: no new claim, everything given back: `signals`",
    "L7": "alerts come to the page and go by themselves: tests/integration/test_stream.py",
    "L8": "whoever is not at work says that it is not ready: tests/acceptance/test_monitoring.py",
}
NOT_YET: Mapping[str, str] = {
    "L3": "one organisation slow: a process serves one organisation",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """
    A bout that was run.

    Args:
        replay: the command that runs it again.
        said: the end of what it printed on stderr, if it went wrong.
    """

    scenario: str
    what: str
    seed: int
    count: int
    seconds: float
    replay: str
    result: Result
    said: str

    def line(self) -> str:
        """
        For the terminal.
        """
        if self.result.skipped:
            return f"skipped  {self.scenario}: {self.result.skipped}"
        if not self.result.violations:
            done = f"{self.result.done:,} {self.what}, {self.seconds:.0f} s"
            return f"held     {self.scenario}: {done}, seed {self.seed}"
        broken = "; ".join(f"{name}: {why[0]}" for name, why in self.result.violations.items())
        timeline = "".join(f"\n         {line}" for line in self.result.timeline[:40])
        return f"BROKEN   {self.scenario}: {broken}\n         {self.replay}{timeline}\n{self.said}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """
    Everything about one run.
    """

    full: bool
    seed: int
    machine: Mapping[str, str]
    outcomes: Sequence[Outcome]

    def summary(self) -> str:
        """
        The whole report in Markdown.
        """
        return "\n".join(
            [
                f"# Fault report, {'full' if self.full else 'each push'}",
                "",
                *(f"- {name}: {value}" for name, value in self.machine.items()),
                f"- first seed: {self.seed}",
                "",
                *self._scenarios(),
                *self._recoveries(),
                *self._invariants(),
                *self._broken(),
            ]
        )

    def _by_scenario(self) -> dict[str, list[Outcome]]:
        grouped: dict[str, list[Outcome]] = defaultdict(list)
        for outcome in self.outcomes:
            grouped[outcome.scenario].append(outcome)
        return grouped

    def _scenarios(self) -> list[str]:
        lines = [
            "| what | done | events | lost | unexpected | applied again | recovered | broken | s |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for bouts in self._by_scenario().values():
            results = [one.result for one in bouts]
            if results[0].skipped:
                lines.append(f"| {bouts[0].what} | skipped: {results[0].skipped} | | | | | | | |")
                continue
            cells = [
                sum(one.done for one in results),
                sum(one.tally.get("versions", 0) for one in results),
                sum(one.lost for one in results),
                sum(one.unexpected for one in results),
                sum(one.duplicated for one in results),
                sum(one.recovered for one in results),
                sum(bool(one.violations) for one in results),
                round(sum(one.seconds for one in bouts)),
            ]
            lines.append(f"| {bouts[0].what} | {' | '.join(f'{cell:,}' for cell in cells)} |")
        return [*lines, "", *self._measured()]

    def _measured(self) -> list[str]:
        """
        The largest of each figure, as no bout may be worse.
        """
        worst: dict[str, float] = {}
        for outcome in self.outcomes:
            for name, value in outcome.result.measured.items():
                key = f"{outcome.scenario}: {name}"
                worst[key] = max(value, worst.get(key, value))
        shown = {name: value for name, value in worst.items() if not name.startswith("lines:")}
        return [*(f"- {name}: {value:.3g}" for name, value in shown.items()), ""]

    def _recoveries(self) -> list[str]:
        times: dict[str, list[float]] = defaultdict(list)
        for outcome in self.outcomes:
            for name, values in outcome.result.recoveries.items():
                times[name].extend(values)
        lines = [
            "| seconds until work went on, after | times | median | p99 | longest |",
            "|---|---:|---:|---:|---:|",
        ]
        for name, values in sorted(times.items()):
            cells = [percentile(values, 0.5), percentile(values, 0.99), max(values)]
            seconds = " | ".join(f"{cell:.2f}" for cell in cells)
            lines.append(f"| {name} | {len(values):,} | {seconds} |")
        return [*lines, ""] if times else []

    def _invariants(self) -> list[str]:
        lines = ["| invariant | claim | looked at | broken |", "|---|---|---:|---:|"]
        claims = {one.name: one.claim for one in INVARIANTS} | CHECKED_TOO
        for name, claim in claims.items():
            looked = sum(name in one.result.checked for one in self.outcomes)
            broken = sum(name in one.result.violations for one in self.outcomes)
            lines.append(f"| {name} | {claim} | {looked} | {broken} |")
        lines += [f"| {name} | {where} | | |" for name, where in ELSEWHERE.items()]
        lines += [f"| {name} | not yet: {why} | | |" for name, why in NOT_YET.items()]
        return [*lines, ""]

    def _broken(self) -> list[str]:
        lines: list[str] = []
        for outcome in self.outcomes:
            for name, evidence in outcome.result.violations.items():
                lines += [
                    f"- **{name}** in `{outcome.replay}`",
                    *(f"  - {one}" for one in evidence),
                ]
            lines += [f"      {line}" for line in outcome.result.timeline]
        return ["## Broken", "", *lines] if lines else ["Nothing was broken."]


def write(report: Report, folder: Path) -> None:
    """
    Write `report.md` and `report.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(report.summary() + "\n")
    (folder / "report.json").write_text(json.dumps(asdict(report), indent=2, default=str) + "\n")


def machine(binaries: Path | None) -> dict[str, str]:
    """
    When, what and on what.
    """
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _said("git", "rev-parse", "--short", "HEAD"),
        "machine": f"{os.cpu_count()} cores, {_memory()}, {platform.system()} {platform.machine()}",
        "PostgreSQL": _said(str((binaries or embedded_binaries()) / "postgres"), "--version"),
        "Python": platform.python_version(),
    }


def _said(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _memory() -> str:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{pages / (1 << 30):.0f} GiB"
